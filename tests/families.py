"""Every model family, attention kernel and variant against unrolled plain runs; writes the table of docs/families.md.

python tests/families.py            # print the table
python tests/families.py --write    # and put it into docs/families.md
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from oracle import unrolled_loss

from rim_dist.attention.kernels import kernel_names, kernel_of
from rim_dist.attention.registration import use_plain_attention, use_rim_attention
from rim_dist.data.rows import Batch, pack
from rim_dist.data.samples import Readout, Row
from rim_dist.errors import ModelError
from rim_dist.model.proof import prove_family
from rim_dist.objective.forward import install_readout_loss, run_batch
from rim_dist.table import Table

NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **NO_TOKENS,
}
NO_KV = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
GPT2 = {"vocab_size": 97, "n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, **NO_TOKENS}
DROPOUTS = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
T = transformers
FAMILIES: dict[str, transformers.PretrainedConfig] = {
    "Llama": T.LlamaConfig(**SIZES),
    "Llama, tied head": T.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "Qwen2": T.Qwen2Config(**SIZES),
    "Qwen3": T.Qwen3Config(**SIZES, head_dim=12),
    "Qwen3-MoE": T.Qwen3MoeConfig(**SIZES, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "Mistral": T.MistralConfig(**SIZES, sliding_window=None),
    "Mistral, sliding window": T.MistralConfig(**SIZES, sliding_window=9),
    "Mixtral": T.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "Gemma": T.GemmaConfig(**SIZES, head_dim=12),
    "Gemma 2": T.Gemma2Config(**SIZES, head_dim=12, sliding_window=9, attn_logit_softcapping=5.0),
    "Gemma 3": T.Gemma3TextConfig(**SIZES, head_dim=12, sliding_window=9),
    "GPT-2": T.GPT2Config(**GPT2, **DROPOUTS),
    "GPT-NeoX": T.GPTNeoXConfig(**NO_KV, hidden_dropout=0.0, attention_dropout=0.0),
    "OPT": T.OPTConfig(
        **{k: v for k, v in NO_KV.items() if k != "intermediate_size"}, ffn_dim=64, word_embed_proj_dim=48, dropout=0.0
    ),
    "Phi": T.PhiConfig(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0),
    "Phi-3": T.Phi3Config(**SIZES, resid_pdrop=0.0, embd_pdrop=0.0),
    "OLMo 2": T.Olmo2Config(**SIZES),
    "SmolLM3": T.SmolLM3Config(**SIZES),
    "Granite": T.GraniteConfig(**SIZES, attention_multiplier=0.3, logits_scaling=3.0),
    "Starcoder2": T.Starcoder2Config(**SIZES, residual_dropout=0.0, embedding_dropout=0.0, sliding_window=None),
    "Cohere": T.CohereConfig(**SIZES),
}
# Head counts that a group of ranks shares in different ways; the layers are those of Llama.
HEADS: dict[str, transformers.PretrainedConfig] = {
    f"Llama, {heads} heads, {kv_heads} for keys": T.LlamaConfig(
        **{**SIZES, "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    )
    for heads, kv_heads in ((4, 1), (6, 3), (3, 1), (8, 2))
}
REFUSED: dict[str, transformers.PretrainedConfig] = {
    "StableLM": T.StableLmConfig(),
    "BLOOM": T.BloomConfig(),
    "MPT": T.MptConfig(),
    "Falcon": T.FalconConfig(),
    "GPT-OSS": T.GptOssConfig(),
    "Mamba": T.MambaConfig(),
}
KERNELS = kernel_names()
# The others have a forward pass only on a CPU.
TRAINED_ON_CPU = [name for name in KERNELS if "cpu" in kernel_of(name).devices]
BLOCK = [94, 95, 95, 96]
Sample = tuple[list[int], int, list[Readout]]


def build(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = copy.deepcopy({**FAMILIES, **HEADS}[family])  # the model's attention function is a field of it
    return transformers.AutoModelForCausalLM.from_config(config).float()


def random_samples(seed: int) -> list[Sample]:
    """Questions, block counts, targets and weights of random sizes; two samples of the same shape; one without blocks."""
    pick = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [pick.randrange(94) for _ in range(pick.randint(low, high))]

    samples: list[Sample] = []
    for _ in range(3):
        blocks = pick.randint(1, 5)
        readouts = [
            Readout(k, tokens(1, 6), pick.uniform(0.1, 1.0)) for k in range(1, blocks + 1) if k == blocks or pick.random() < 0.8
        ]
        samples.append((tokens(1, 12), blocks, readouts))
    question, blocks, readouts = samples[0]
    twins = [Readout(r.block, tokens(len(r.target), len(r.target)), 0.5) for r in readouts]
    samples.append((tokens(len(question), len(question)), blocks, twins))
    samples.append((tokens(3, 8), 0, [Readout(0, tokens(2, 6), 1.0)]))
    return samples


def pack_samples(samples: list[Sample], bidirectional: bool = False) -> Batch:
    return pack([Row(q, k, len(BLOCK), tuple(r)) for q, k, r in samples], BLOCK, bidirectional)


def gradients(model: transformers.PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@dataclass(frozen=True)
class Difference:
    """Largest differences from the unrolled runs: of the loss (relative), of a gradient (of the model's largest entry)."""

    loss: float
    gradient: float
    where: str = ""


@functools.cache
def expected(family: str, seed: int, bidirectional: bool) -> tuple[float, dict[str, torch.Tensor]]:
    model = build(family).train()
    use_plain_attention(model)
    loss = sum(unrolled_loss(model, q, BLOCK, r, bidirectional) for q, _, r in random_samples(seed))
    loss.backward()
    return float(loss), gradients(model)


def measure(family: str, kernel: str, seed: int = 0, bidirectional: bool = False) -> Difference:
    """The packed loss and its gradients by one kernel against the unrolled ones; the loss alone without a backward pass."""
    loss, wanted = expected(family, seed, bidirectional)
    model = build(family).train()
    install_readout_loss(model)
    use_rim_attention(model, kernel)
    batch = pack_samples(random_samples(seed), bidirectional)
    with torch.set_grad_enabled(kernel in TRAINED_ON_CPU):
        weighted_sum, token_losses = run_batch(model, batch)
    off = abs(float(weighted_sum) / loss - 1)
    off = max(off, abs(float((token_losses * batch.targets.weight).sum()) / loss - 1))
    if kernel not in TRAINED_ON_CPU:
        return Difference(off, 0.0)
    weighted_sum.backward()
    got = gradients(model)
    assert got.keys() == wanted.keys()
    largest = max(float(g.abs().max()) for g in wanted.values())
    worst = max((float((got[name] - wanted[name]).abs().max()) / largest, name) for name in wanted)
    return Difference(off, *worst)


def refusal(config: transformers.PretrainedConfig) -> str:
    """Why a family is refused; empty if it is not."""
    try:
        prove_family(config)
    except ModelError as error:
        return str(error).splitlines()[0]
    return ""


def table() -> str:
    heads = [name if name in TRAINED_ON_CPU else f"{name} (forward)" for name in KERNELS]
    rows = []
    for family in FAMILIES:
        cells = []
        for kernel in KERNELS:
            worst = [measure(family, kernel, seed) for seed in range(2)]
            loss, gradient = max(d.loss for d in worst), max(d.gradient for d in worst)
            cells.append(f"exact ({loss:.0e}" + (f", {gradient:.0e})" if kernel in TRAINED_ON_CPU else ")"))
            assert max(loss, gradient) <= 1e-5, (family, kernel, worst)
        rows.append([family, *cells])
    for family, config in REFUSED.items():
        why = refusal(config).partition(": ")[2].partition(" (")[0]
        rows.append([family, f"refused: {why[:110]}", *[""] * (len(KERNELS) - 1)])
    return Table(["family", *heads], rows, align="l").markdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    text = table()
    print(text)
    if parser.parse_args().write:
        page = Path(__file__).parents[1] / "docs" / "families.md"
        head, mark, rest = page.read_text(encoding="utf-8").partition("<!-- table -->\n")
        page.write_text(head + mark + text + "".join(rest.partition("<!-- end -->")[1:]), encoding="utf-8")
