"""The slow, obvious computations that everything fast or parallel is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from rim_dist.attention.registration import use_plain_attention
from rim_dist.attention.visibility import MEMORY, QUESTION, READOUT
from rim_dist.checkpoint.start import model_of
from rim_dist.config import Dropouts, Recipe
from rim_dist.data.loader import BatchLoader, plan_stages
from rim_dist.data.samples import Readout, Row
from rim_dist.model.dropout import set_dropout
from rim_dist.training.schedule import learning_rate
from rim_dist.training.trainer import prepare_run
from rim_dist.unwrap import bare_model


def unrolled_loss(
    model: Any, question: Sequence[int], block: Sequence[int], readouts: Sequence[Readout], bidirectional: bool = False
) -> torch.Tensor:
    """Weighted loss sum of one sample as separate plain causal runs [x, m_1 .. m_k, r_k], by an unmodified model.

    `bidirectional`: the plain runs get a 4-D mask in which the tokens of a block see the whole block.
    """
    total = torch.zeros(())
    for readout in readouts:
        prefix = [*question, *(list(block) * readout.block)]
        ids = torch.tensor([[*map(int, prefix), *map(int, readout.target[:-1])]])
        extra = {}
        if bidirectional:
            seen = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()
            for start in range(len(question), len(prefix), len(block)):
                seen[start : start + len(block), start : start + len(block)] = True
            extra["attention_mask"] = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        logits = model(input_ids=ids, use_cache=False, **extra).logits[0, len(prefix) - 1 :]
        total = total + readout.weight * F.cross_entropy(
            logits.float(), torch.tensor([*map(int, readout.target)]), reduction="sum"
        )
    return total


def thought_loss(model: Any, row: Row, block: Sequence[int]) -> torch.Tensor:
    """Weighted loss sum of one latent row by an unmodified model: no cache, the whole sequence again for every thought."""
    model = bare_model(model)
    embed = model.get_input_embeddings()
    (readout,) = row.readouts

    def states_of(ids: Sequence[int]) -> torch.Tensor:
        return embed(torch.tensor([[*map(int, ids)]]))

    states = states_of([*row.question, block[0]])
    for _ in range(row.block_size - 2):
        thought = model.base_model(inputs_embeds=states, use_cache=False)[0][:, -1:]
        states = torch.cat([states, thought], dim=1)
    states = torch.cat([states, states_of([block[-1], *readout.target[:-1]])], dim=1)
    logits = model(inputs_embeds=states, use_cache=False).logits[0, -len(readout.target) :]
    target = torch.tensor([*map(int, readout.target)])
    return readout.weight * F.cross_entropy(logits.float(), target, reduction="sum")


@dataclass
class PlainRow:
    """One sample token by token, as the method's text says it; all lists have one entry a token."""

    input_ids: list[int]
    kind: list[int]
    block: list[int]
    position: list[int]
    label: list[int]
    weight: list[float]


def plain_row(row: Row, block_ids: Sequence[int]) -> PlainRow:
    """`question, m_1 .. m_K, r_1 .. r_n` laid out one token after the other; label -100: no target."""
    q, size = len(row.question), row.block_size
    prefix = q + row.blocks * size
    block_tokens = [block_ids[0], *[block_ids[1]] * (size - 2), block_ids[-1]]
    input_ids = [*map(int, row.question), *(block_tokens * row.blocks)]
    kind = [QUESTION] * q + [MEMORY] * (row.blocks * size)
    block = [0] * q + [k for k in range(1, row.blocks + 1) for _ in range(size)]
    position = list(range(prefix))
    label = [-100] * prefix
    weight = [0.0] * prefix
    for readout in row.readouts:
        start = q + readout.block * size
        target = [*map(int, readout.target)]
        label[start - 1], weight[start - 1] = target[0], readout.weight
        count = len(target) - 1
        input_ids += target[:-1]
        kind += [READOUT] * count
        block += [readout.block] * count
        position += range(start, start + count)
        label += target[1:]
        weight += [readout.weight] * count
    return PlainRow(input_ids, kind, block, position, label, weight)


def train_one_process(recipe: Recipe, trace: dict[str, Any] | None = None) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step by a bare loop: unrolled runs, one sample at a time, torch's AdamW, no DeepSpeed.

    `trace` takes the first step's `gradients` and the last `weights` of what is trained, by name.
    """
    trace = {} if trace is None else trace
    requirements, data = prepare_run(recipe)
    model = model_of(recipe, requirements)
    use_plain_attention(bare_model(model))
    set_dropout(model, Dropouts())
    trained = [p for p in model.parameters() if p.requires_grad]
    block = requirements.tokens.block

    def new_optimizer() -> torch.optim.AdamW:
        section = recipe.optimizer
        return torch.optim.AdamW(trained, lr=0.0, betas=(section.beta1, section.beta2), eps=section.eps, weight_decay=0.0)

    results = []
    for plan in plan_stages(recipe, len(data)):
        section = recipe.curriculum.stage(plan.name)
        optimizer = new_optimizer()
        loader = BatchLoader(recipe, data, requirements.tokens, 0, 1)
        for step in range(plan.steps):
            if step and loader.phase(plan, step) != loader.phase(plan, step - 1):
                optimizer = new_optimizer()
            rows = [(s, loader.row(plan, step, s)) for s in loader.step_samples(plan, step)]
            weight = sum(row.total_weight for _, row in rows)
            loss = torch.zeros(())
            for sample, row in rows:
                if row.latent:
                    loss = loss + thought_loss(model, row, block)
                else:
                    loss = loss + unrolled_loss(model, sample.question, block, row.readouts)
            loss = loss / weight
            optimizer.zero_grad()
            loss.backward()
            if not results:
                trace["gradients"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            norm = torch.nn.utils.clip_grad_norm_(trained, recipe.optimizer.gradient_clipping or 1e9)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(section, step, plan.steps)
            optimizer.step()
            results.append((float(loss.detach()), float(norm)))
    trace["weights"] = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return results
