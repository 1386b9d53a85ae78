"""Time of a training step's forward and backward pass against what a user would write, unrolled runs, and a floor.

    python benchmarks/step_time.py [--quick]

Micro-batches of 16 samples with GSM8K's lengths, layers of SmolLM2-135M, fp32, all on the same rows:

- rim: the packed row through this project's batch, attention and loss;
- padded: rows side by side, padded to the longest, one 4-D mask, SDPA, logits everywhere (plain transformers);
- unrolled: every block budget as a plain causal sequence of its own, batches of 16 padded sequences, logits everywhere;
- floor: the same layers over the concatenated real tokens, attention as one causal call per row, head at as many positions.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import torch
from common import VOCABULARIES, block_ids, llama, publish, real_rows, side_by_side
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rim_dist.attention.dense import dense_mask
from rim_dist.attention.registration import use_plain_attention, use_rim_attention
from rim_dist.data.rows import pack
from rim_dist.data.samples import Row
from rim_dist.objective.forward import install_readout_loss, run_batch
from rim_dist.table import Table

SAMPLES = 16
Step = Callable[[], Any]


def rim_step(model: Any, rows: list[Row], ids: list[int]) -> Step:
    def step() -> None:
        use_rim_attention(model, "split")
        model.zero_grad()
        run_batch(model, pack(rows, ids))[0].backward()

    return step


class PaddedRows:
    """The rows as a user would lay them out: padded on the right, a boolean 4-D mask, labels at the predicting position."""

    def __init__(self, rows: list[Row], ids: list[int]) -> None:
        batches = [pack([row], ids) for row in rows]
        length = max(batch.tokens for batch in batches)
        shape = (len(rows), length)
        self.input_ids, self.positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        self.labels, self.weights = torch.full(shape, -100), torch.zeros(shape)
        self.mask = torch.zeros(len(rows), 1, length, length, dtype=torch.bool)
        self.mask[:, 0] = torch.eye(length, dtype=torch.bool)  # padding sees itself, so that no row is empty
        for i, batch in enumerate(batches):
            n, t = batch.tokens, batch.targets
            self.input_ids[i, :n], self.positions[i, :n] = batch.input_ids[0], batch.position_ids[0]
            self.labels[i, t.column], self.weights[i, t.column] = t.label, t.weight
            self.mask[i, :, :n, :n] |= dense_mask(batch.layout)[0]

    @property
    def tokens(self) -> int:
        return self.input_ids.numel()


def padded_step(model: Any, rows: PaddedRows) -> Step:
    def step() -> None:
        use_plain_attention(model)
        model.zero_grad()
        logits = model(input_ids=rows.input_ids, position_ids=rows.positions, attention_mask=rows.mask, use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), rows.labels.flatten(), reduction="none")
        (losses * rows.weights.flatten()).sum().backward()

    return step


class Unrolled:
    """Every readout as a plain sequence, sorted by length into batches of 16, padded on the right."""

    def __init__(self, rows: list[Row], ids: list[int]) -> None:
        sequences = []
        for row in rows:
            for r in row.readouts:
                prefix = [*row.question, *ids * r.block]
                sequences.append((prefix + list(r.target[:-1]), [-100] * (len(prefix) - 1) + list(r.target), r.weight))
        sequences.sort(key=lambda s: len(s[0]))
        self.batches = []
        for start in range(0, len(sequences), SAMPLES):
            part = sequences[start : start + SAMPLES]
            length = max(len(s[0]) for s in part)
            inputs = torch.tensor([s + [0] * (length - len(s)) for s, _, _ in part])
            labels = torch.tensor([t + [-100] * (length - len(t)) for _, t, _ in part])
            self.batches.append((inputs, labels, torch.tensor([[w] for _, _, w in part])))

    @property
    def tokens(self) -> int:
        return sum(batch[0].numel() for batch in self.batches)


def unrolled_step(model: Any, unrolled: Unrolled) -> Step:
    def step() -> None:
        use_plain_attention(model)
        model.zero_grad()
        for inputs, labels, weights in unrolled.batches:
            logits = model(input_ids=inputs, use_cache=False).logits
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
            (losses * weights).sum().backward()

    return step


def floor_step(model: Any, rows: list[Row], ids: list[int]) -> Step:
    batch = pack(rows, ids)
    sizes = [span.length for span in batch.layout.spans]
    positions = torch.cat([torch.arange(n) for n in sizes]).unsqueeze(0)
    column, label, weight = batch.targets.column, batch.targets.label, batch.targets.weight
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    body = model.model

    def step() -> None:
        model.zero_grad()
        x = body.embed_tokens(batch.input_ids)
        cos, sin = body.rotary_emb(x, position_ids=positions)
        for layer in body.layers:
            attention = layer.self_attn
            h = layer.input_layernorm(x)
            q, k, v = (
                projection(h).unflatten(-1, (n, -1)).transpose(1, 2)
                for projection, n in ((attention.q_proj, heads), (attention.k_proj, kv_heads), (attention.v_proj, kv_heads))
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            outputs = [
                F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True).transpose(1, 2)
                for qkv in zip(*(t.split(sizes, dim=2) for t in (q, k, v)), strict=True)
            ]
            x = x + attention.o_proj(torch.cat(outputs, dim=1).flatten(2))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        hidden = body.norm(x)[0].index_select(0, column)
        losses = F.cross_entropy(F.linear(hidden, model.lm_head.weight), label, reduction="none")
        (losses * weight).sum().backward()

    return step


def measure(vocabulary: int, stage: str, memory: int, layers: int, rounds: int, against: tuple[str, ...]) -> dict[str, Any]:
    """Seconds of every candidate on the same rows, and what the counts alone say."""
    model = llama(vocabulary, num_hidden_layers=layers).train()
    install_readout_loss(model)
    ids = block_ids(vocabulary, memory)
    rows = real_rows(SAMPLES, stage, 8, len(ids), vocabulary, seed=1)  # type: ignore[arg-type]
    body = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    head = model.lm_head.weight.numel()
    tokens, targets = sum(map(len, rows)), sum(row.targets for row in rows)
    cost = tokens * body + targets * head
    candidates: dict[str, Step] = {"rim": rim_step(model, rows, ids)}
    said: dict[str, float] = {}
    counts = {"tokens": tokens, "targets": targets}
    if "floor" in against:
        candidates["floor"] = floor_step(model, rows, ids)
    if "padded" in against:
        padded = PaddedRows(rows, ids)
        candidates["padded"] = padded_step(model, padded)
        counts["padded"], said["padded"] = padded.tokens, padded.tokens * (body + head) / cost
    seconds = side_by_side(candidates, rounds)
    if "unrolled" in against:
        unrolled = Unrolled(rows, ids)
        counts["unrolled"], said["unrolled"] = unrolled.tokens, unrolled.tokens * (body + head) / cost
        seconds |= side_by_side({"unrolled": unrolled_step(model, unrolled)}, 1, 0)  # once: it takes a minute or two
    return {"counts": counts, "seconds": seconds, "said": said}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="stage 2 at 49k only, 4 layers, 3 rounds, nothing written")
    parser.add_argument("--rounds", type=int, default=2, help="measured rounds")
    parser.add_argument("--only", help="substring of the cases to run, nothing written")
    options = parser.parse_args()
    layers, rounds = (4, 3) if options.quick else (30, options.rounds)
    # Long blocks take minutes a layer: fewer layers, which leaves the head and what is done once a batch a larger share.
    few = min(layers, 8)
    cases: list[tuple[str, str, int, tuple[str, ...], int]] = [
        (v, s, 2, ("padded", "unrolled", "floor"), layers) for v, s in itertools.product(VOCABULARIES, ("stage1", "stage2"))
    ]
    cases += [("49k", "stage2", 64, ("padded", "floor"), few), ("49k", "stage2", 256, ("floor",), few)]
    if options.quick:
        cases = cases[1:2]
    figures, lines = {}, []
    for vocabulary, stage, memory, against, layers in cases:
        name = f"{stage}, M = {memory}, {vocabulary}, {layers} layers"
        if options.only and options.only not in name:
            continue
        result = figures[name] = measure(VOCABULARIES[vocabulary], stage, memory, layers, rounds, against)
        seconds, said = result["seconds"], result["said"]

        def against_counts(other: str, seconds: dict[str, float] = seconds, said: dict[str, float] = said) -> str:
            if other not in seconds:
                return "-"
            ratio = seconds[other] / seconds["rim"]
            return f"{ratio:.2f}x of {said[other]:.2f}x = {ratio / said[other]:.2f}"

        counts = result["counts"]
        lines.append(
            [
                name,
                counts["tokens"],
                counts["targets"],
                f"{seconds['rim']:.2f}",
                f"{seconds['rim'] / seconds['floor']:.3f}",
                against_counts("padded"),
                against_counts("unrolled"),
            ]
        )
        print(lines[-1], flush=True)
    head = [
        "rows",
        "tokens",
        "targets",
        "rim, s",
        "rim / floor",
        "padded / rim, of what counts say",
        "unrolled / rim, likewise",
    ]
    text = (
        f"{SAMPLES} samples with GSM8K's lengths, K = 8, layers of SmolLM2-135M (tied head), fp32, medians of "
        f"{rounds} rounds in turns after one to warm up, unrolled runs once.\nOf counts: measured ratio "
        "of what the counts of this very batch say,\npadded (unrolled) tokens x (layers + head) / (real tokens x layers + "
        "targets x head).\n\n"
    )
    publish("step-time", "Step time", text + Table(head, lines).markdown(), figures, options.quick or bool(options.only))


if __name__ == "__main__":
    main()
