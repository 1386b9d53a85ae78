"""The packed row against K separate causal runs, for every family: loss, gradients, and no leak between readouts."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from oracle import unrolled_loss

from rim_dist.attention.probe import probe_family
from rim_dist.attention.registration import rim_attention, use_plain_attention, use_rim_attention
from rim_dist.attention.visibility import MEMORY, QUESTION, READOUT, visible
from rim_dist.data.rows import Batch, Readout, build_row, collate
from rim_dist.errors import ModelError
from rim_dist.objective.loss import readout_loss, supervised_columns

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama tied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=12),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "mistral with a window": transformers.MistralConfig(**SIZES, sliding_window=9),
    "gpt2": transformers.GPT2Config(
        vocab_size=97, n_embd=48, n_layer=3, n_head=4, n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "gemma": transformers.GemmaConfig(**SIZES, head_dim=12),
    "gemma2": transformers.Gemma2Config(**SIZES, head_dim=12, sliding_window=9, attn_logit_softcapping=5.0),
    "gemma3": transformers.Gemma3TextConfig(**SIZES, head_dim=12, sliding_window=9),
    "qwen3 moe": transformers.Qwen3MoeConfig(
        **SIZES, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}
BLOCK = [94, 95, 95, 96]
Sample = tuple[list[int], int, list[Readout]]


def build(family: str) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(FAMILIES[family]).float()


def random_samples(seed: int) -> list[Sample]:
    """Questions, block counts, targets and weights of random sizes."""
    pick = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [pick.randrange(94) for _ in range(pick.randint(low, high))]

    samples = []
    for _ in range(3):
        blocks = pick.randint(1, 5)
        readouts = [
            Readout(k, tokens(1, 6), pick.uniform(0.1, 1.0)) for k in range(1, blocks + 1) if k == blocks or pick.random() < 0.8
        ]
        samples.append((tokens(1, 12), blocks, readouts))
    samples.append((tokens(3, 8), 0, [Readout(0, tokens(2, 6), 1.0)]))  # without blocks: a plain target
    return samples


def packed_loss(model: transformers.PreTrainedModel, batch: Batch) -> torch.Tensor:
    columns = supervised_columns(batch)
    logits = model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        rim_layout=batch.layout,
        use_cache=False,
        logits_to_keep=columns,
    ).logits
    return readout_loss(logits, batch, columns, 8).weighted_sum


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_packed_equals_unrolled(family: str, seed: int) -> None:
    samples = random_samples(seed)
    model = build(family).train()
    use_rim_attention(model)
    packed = packed_loss(model, collate([build_row(q, BLOCK, k, r) for q, k, r in samples]))
    packed.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    use_plain_attention(model)
    expected = sum(unrolled_loss(model, q, BLOCK, r) for q, _, r in samples)
    expected.backward()
    assert float(packed) == pytest.approx(float(expected), rel=1e-5)
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for name, parameter in model.named_parameters():
        difference = float((gradients[name] - parameter.grad).abs().max())
        assert difference <= 1e-5 * largest, f"{name}: {difference / largest:.1e} of the largest gradient entry"


@pytest.mark.parametrize("family", FAMILIES)
def test_no_readout_sees_another(family: str) -> None:
    """Other readouts' tokens changed at equal lengths: not one bit moves (experts mix tokens: 1e-5 there)."""
    pick = random.Random(1)
    question = [pick.randrange(94) for _ in range(7)]
    readouts = [Readout(k, [pick.randrange(94) for _ in range(5)], 1.0) for k in range(1, 5)]
    changed = [readouts[0], Readout(2, [pick.randrange(94) for _ in range(5)], 1.0), *readouts[2:]]
    model = build(family).eval()
    use_rim_attention(model)
    rows = [build_row(question, BLOCK, 4, r) for r in (readouts, changed)]
    with torch.no_grad():
        before, after = (
            model(input_ids=b.input_ids, position_ids=b.position_ids, rim_layout=b.layout, use_cache=False).logits[0]
            for b in (collate([row]) for row in rows)
        )
    others = [
        i for i, (kind, block) in enumerate(zip(rows[0].kind, rows[0].block, strict=True)) if kind != READOUT or block != 2
    ]
    own = [i for i in range(len(rows[0])) if i not in others]
    difference = float((before[others] - after[others]).abs().max())
    assert difference <= (1e-5 if "moe" in family else 0.0)
    assert float((before[own] - after[own]).abs().max()) > 1e-3  # the change itself is seen


def test_prediction_at_a_question_does_not_depend_on_other_lengths() -> None:
    model = build("llama").eval()
    use_rim_attention(model)
    question = [5, 6, 7]
    short = build_row(question, BLOCK, 2, [Readout(1, [9, 8], 1.0), Readout(2, [7, 6, 5], 1.0)])
    long = build_row(question, BLOCK, 2, [Readout(1, [9, 8, 4, 4, 4, 4], 1.0), Readout(2, [7, 6, 5], 1.0)])
    with torch.no_grad():
        a, b = (
            model(input_ids=x.input_ids, position_ids=x.position_ids, rim_layout=x.layout, use_cache=False).logits[0]
            for x in (collate([short]), collate([long]))
        )
    assert torch.allclose(a[-2:], b[-2:], atol=1e-5)


def test_visibility_by_brute_force() -> None:
    """The predicate against the sentence of the method, token pair by token pair, with two samples in one row."""
    rows = [build_row([1, 2, 3], BLOCK, 2, [Readout(1, [4, 5, 6], 1.0), Readout(2, [7, 8], 1.0)]), build_row([1], BLOCK, 1, [])]
    tokens = [(s, r.kind[i], r.block[i], r.position[i]) for s, r in enumerate(rows) for i in range(len(r))]
    for query in tokens:
        for key in tokens:
            (qs, qkind, qblock, qpos), (ks, kkind, kblock, kpos) = query, key
            if qs != ks or kpos > qpos:
                expected = False
            elif qkind in (QUESTION, MEMORY):
                expected = kkind in (QUESTION, MEMORY)
            else:
                expected = (
                    kkind == QUESTION or (kkind == MEMORY and kblock <= qblock) or (kkind == READOUT and kblock == qblock)
                )
            assert bool(visible(*map(torch.tensor, (*query, *key)))) == expected, (query, key)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.StableLmConfig(), "layout did not reach"),
        (transformers.BloomConfig(), "0 of 2 layers"),
        (transformers.MptConfig(), "0 of 2 layers"),
        (transformers.GptOssConfig(), "s_aux"),
        (transformers.FalconConfig(), "falcon"),
    ],
)
def test_family_that_cannot_take_the_mask_is_refused(config: transformers.PretrainedConfig, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        probe_family(config)


def test_missing_layout_is_refused() -> None:
    model = build("llama")
    use_rim_attention(model)
    with pytest.raises(ModelError, match="layout did not reach"):
        model(input_ids=torch.tensor([[1, 2]]))


def test_attention_dropout_is_honoured() -> None:
    batch = collate([build_row([1, 2, 3], BLOCK, 1, [Readout(1, [4, 5], 1.0)])])
    query = torch.randn(1, 4, len(batch.input_ids[0]), 8)
    torch.manual_seed(0)
    kept, _ = rim_attention(torch.nn.Identity(), query, query, query, None, rim_layout=batch.layout)
    dropped, _ = rim_attention(torch.nn.Identity(), query, query, query, None, dropout=0.5, rim_layout=batch.layout)
    capped, _ = rim_attention(torch.nn.Identity(), query, query, query, None, dropout=0.5, softcap=9.0, rim_layout=batch.layout)
    assert not torch.equal(kept, dropped)
    assert not torch.equal(dropped, capped)
