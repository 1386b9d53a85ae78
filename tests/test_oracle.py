"""Every kernel against K separate causal runs, for every family: loss, gradients, and no leak between readouts."""

from __future__ import annotations

import functools
import itertools
import random
import re
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from families import (
    BLOCK,
    FAMILIES,
    KERNELS,
    REFUSED,
    TRAINED_ON_CPU,
    build,
    gradients,
    measure,
    pack_samples,
    random_samples,
    refusal,
)
from oracle import plain_row

from rim_dist.attention import split
from rim_dist.attention.dense import dense_mask
from rim_dist.attention.kernels import REFERENCE, kernel_of
from rim_dist.attention.registration import rim_attention, use_rim_attention
from rim_dist.attention.split import split_plan
from rim_dist.attention.visibility import MEMORY, QUESTION, READOUT, RowLayout, TokenCoordinates, visible
from rim_dist.data.rows import Batch, pack
from rim_dist.data.samples import Readout, Row
from rim_dist.errors import ModelError
from rim_dist.model.build import recompute_layers
from rim_dist.model.proof import tiny_config, tiny_model
from rim_dist.objective.forward import install_readout_loss, run_batch

pytestmark = pytest.mark.untraced
LAYERS = torch.nn.Identity()
# On a CPU flex is slow: the quick tier has a family with everything plain, one with as many key heads, one with a window, one
# with windows, softcaps and a scale.
FLEX = ("Llama", "GPT-2", "Mistral, sliding window", "Gemma 2")
EVERY_KERNEL = [
    pytest.param(kernel, family, marks=pytest.mark.thorough if kernel not in TRAINED_ON_CPU and family not in FLEX else ())
    for kernel, family in itertools.product(KERNELS, FAMILIES)
]


@pytest.mark.parametrize(("kernel", "family"), EVERY_KERNEL)
def test_packed_equals_unrolled(family: str, kernel: str) -> None:
    """Loss and gradients of two random batches, relative to the loss and to the model's largest gradient entry."""
    for seed in range(2):
        off = measure(family, kernel, seed)
        assert off.loss <= 1e-5, off
        assert off.gradient <= 1e-5, off


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["Llama", "GPT-2", "Phi-3"])
def test_bidirectional_blocks(family: str, kernel: str) -> None:
    off = measure(family, kernel, 0, bidirectional=True)
    assert max(off.loss, off.gradient) <= 1e-5, off
    both, causal = (run(build(family).eval(), pack_samples(random_samples(0), variant), kernel) for variant in (True, False))
    assert float((both - causal).abs().max()) > 1e-3  # the variant is another function


def test_the_table_of_families_says_what_is_measured() -> None:
    """docs/families.md lists exactly the families tested here, as exact or refused (`python tests/families.py --write`)."""
    page = (Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8")
    table = page.partition("<!-- table -->")[2].partition("<!-- end -->")[0]
    rows = dict(re.findall(r"^\| ([^|]+?) \| (exact|refused)", table, re.MULTILINE))
    assert rows == {**dict.fromkeys(FAMILIES, "exact"), **dict.fromkeys(REFUSED, "refused")}


def run(model: transformers.PreTrainedModel, batch: Batch, kernel: str) -> torch.Tensor:
    """Logits `[tokens, vocabulary]` of a packed batch."""
    use_rim_attention(model, kernel)
    with torch.no_grad():
        return model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, rim_layout=batch.layout, use_cache=False
        ).logits[0]


@pytest.mark.parametrize(("kernel", "family"), EVERY_KERNEL)
def test_no_readout_sees_another(family: str, kernel: str) -> None:
    """Other readouts' tokens changed at equal lengths: not one bit moves (experts mix tokens: 1e-5 there)."""
    pick = random.Random(1)
    question = [pick.randrange(94) for _ in range(7)]
    readouts = tuple(Readout(k, [pick.randrange(94) for _ in range(5)], 1.0) for k in range(1, 5))
    changed = (readouts[0], Readout(2, [pick.randrange(94) for _ in range(5)], 1.0), *readouts[2:])
    model = build(family).eval()
    batches = [pack([Row(question, 4, len(BLOCK), r)], BLOCK) for r in (readouts, changed)]
    before, after = (run(model, batch, kernel) for batch in batches)
    places = batches[0].layout.queries
    own = ((places.kind == READOUT) & (places.block == 2))[0]
    difference = float((before[~own] - after[~own]).abs().max())
    assert difference <= (1e-5 if re.search("MoE|Mixtral", family) else 0.0)
    assert float((before[own] - after[own]).abs().max()) > 1e-3  # the change itself is seen


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_sample_sees_another(kernel: str) -> None:
    """A sample's logits in company equal its logits alone."""
    model = build("Llama").eval()
    samples = random_samples(3)
    batch = pack_samples(samples)
    together = run(model, batch, kernel)
    for span, number in zip(batch.layout.spans, batch.order, strict=True):
        alone = run(model, pack_samples([samples[number]]), kernel)
        assert torch.allclose(together[span.start : span.start + span.length], alone, atol=1e-5)


def test_kernels_agree_in_every_block_loss() -> None:
    model = build("Llama").eval()
    install_readout_loss(model)
    batch = pack_samples(random_samples(5))
    losses = {}
    for kernel in KERNELS:
        use_rim_attention(model, kernel)
        with torch.no_grad():
            losses[kernel] = run_batch(model, batch)[1]
    for kernel in KERNELS:
        assert torch.allclose(losses[kernel], losses["dense"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("offload", [False, True])
def test_recomputed_layers_give_the_same_gradients(offload: bool) -> None:
    """Activation checkpointing, with and without its inputs in CPU memory, on the split kernel."""
    found = []
    for checkpointing in (False, True):
        model = build("Llama").train()
        install_readout_loss(model)
        use_rim_attention(model, "split")
        if checkpointing:
            recompute_layers(model, offload)
        weighted_sum, _ = run_batch(model, pack_samples(random_samples(2)))
        weighted_sum.backward()
        found.append(gradients(model))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_layers_are_recomputed_by_either_name_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.17 has no `activation_checkpointing_enable`; 5.23 warns of `gradient_checkpointing_enable`."""

    def earlier(model: transformers.PreTrainedModel, gradient_checkpointing_kwargs: dict | None = None) -> None:
        function = functools.partial(torch.utils.checkpoint.checkpoint, **(gradient_checkpointing_kwargs or {}))
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)

    calls = {}
    for name in ("later", "earlier", "never"):
        if name == "earlier":
            monkeypatch.delattr(transformers.PreTrainedModel, "activation_checkpointing_enable")
            monkeypatch.setattr(transformers.PreTrainedModel, "gradient_checkpointing_enable", earlier)
        model = build("Llama").train()
        install_readout_loss(model)
        use_rim_attention(model, "split")
        if name != "never":
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*gradient_checkpointing_enable")
                recompute_layers(model, offload=False)
        counted: list[int] = []
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_: counted.append(1))  # noqa: B023 - called in this turn
        run_batch(model, pack_samples(random_samples(2)))[0].backward()
        calls[name] = len(counted)
    assert calls["later"] == calls["earlier"] == 2 * calls["never"] > 0


@pytest.mark.parametrize("modules", [["lm_head", "q_proj"], ["q_proj"]])
def test_heads_that_peft_wraps(modules: list[str]) -> None:
    """Adapters on the head, or trained rows in it: the loss is that of the model's own logits, and so are all gradients."""
    rows = {} if "lm_head" in modules else {"embed_tokens": [94, 95, 96], "lm_head": [94, 95, 96]}
    config = peft.LoraConfig(r=2, target_modules=modules, init_lora_weights=False, trainable_token_indices=rows or None)
    model = peft.get_peft_model(build("Llama"), config)
    bare = model.get_base_model()
    use_rim_attention(bare, "split")
    install_readout_loss(bare)
    batch = pack_samples(random_samples(1))
    run_batch(model, batch)[0].backward()
    got = gradients(model)
    logits = model(batch.input_ids, position_ids=batch.position_ids, rim_layout=batch.layout, use_cache=False).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[batch.targets.column], batch.targets.label, reduction="none")
    (losses * batch.targets.weight).sum().backward()
    wanted = gradients(model)
    assert got.keys() == wanted.keys()
    assert len(wanted) > (6 if rows else 7)
    largest = max(float(g.abs().max()) for g in wanted.values())
    for name, gradient in wanted.items():
        assert float((got[name] - gradient).abs().max()) <= 1e-5 * largest, name


def test_packed_rows_are_the_plain_rows() -> None:
    """Token by token: ids, places, labels and weights of the packed row against rows laid out the slow way."""
    for seed in range(20):
        rows = [Row(q, k, len(BLOCK), tuple(r)) for q, k, r in random_samples(seed)]
        batch = pack(rows, BLOCK)
        plain = [plain_row(row, BLOCK) for row in sorted(rows, key=lambda r: r.span().shape)]
        places = batch.layout.queries
        assert batch.input_ids[0].tolist() == [t for r in plain for t in r.input_ids]
        for name in ("kind", "block", "position"):
            assert getattr(places, name)[0].tolist() == [t for r in plain for t in getattr(r, name)], name
        assert places.segment[0].tolist() == [i for i, r in enumerate(plain) for _ in r.input_ids]
        label, weight = [-100] * batch.tokens, [0.0] * batch.tokens
        for column, *target in zip(
            *(t.tolist() for t in (batch.targets.column, batch.targets.label, batch.targets.weight)), strict=True
        ):
            label[column], weight[column] = target
        assert label == [t for r in plain for t in r.label]
        assert weight == pytest.approx([t for r in plain for t in r.weight])
        assert batch.targets.block.tolist() == [places.block[0, c] for c in batch.targets.column.tolist()]
        assert sum(len(r) for r in rows) == batch.tokens
        assert sum(r.targets for r in rows) == len(batch.targets.label)
        assert sum(s.pairs for s in batch.layout.spans) == int(dense_mask(batch.layout).sum())


def plan_mask(layout: RowLayout, window: int | None, whole_masks: bool) -> torch.Tensor:
    """The mask that the calls of the split kernel amount to."""
    seen = torch.zeros(layout.queries.kind.shape[1], layout.queries.kind.shape[1], dtype=torch.bool)
    start = 0
    for group in split_plan(layout, window, torch.float32, whole_masks):
        for _ in range(group.count):
            for call in group.calls:
                for part in call.slices:
                    columns = torch.tensor([start + i for r in part.ranges for i in range(*r)])
                    rows = torch.arange(start + call.start, start + call.stop)[:, None]
                    assert not seen[rows, columns].any()  # no key twice
                    whole = torch.ones(len(rows), len(columns), dtype=torch.bool)
                    seen[rows, columns] = whole.tril() if part.causal else whole if part.mask is None else part.mask == 0
            start += group.length
    return seen


@pytest.mark.parametrize("whole_masks", [True, False])
@pytest.mark.parametrize("limit", [1, 40, 200, 1 << 20])
@pytest.mark.parametrize("window", [None, 1, 5, 12, 1000])
def test_split_calls_add_up_to_the_predicate(
    window: int | None, limit: int, whole_masks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "MASK_ENTRIES", limit)
    monkeypatch.setattr(split, "CHUNK", 3)
    for seed in range(4):
        for bidirectional in (False, True) if window is None else (False,):
            layout = pack_samples(random_samples(seed), bidirectional).layout
            assert torch.equal(plan_mask(layout, window, whole_masks), dense_mask(layout, window)[0, 0])


@pytest.mark.parametrize("family", ["Llama", "Mistral, sliding window", "GPT-2", "Gemma 2"])
def test_many_small_parts_are_as_exact(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readouts in groups, their parts merged by log-sum-exp; windows and softcaps in chunks: as with long blocks."""
    for limit in (1, 40):
        monkeypatch.setattr(split, "MASK_ENTRIES", limit)
        monkeypatch.setattr(split, "CHUNK", 3)
        off = measure(family, "split", 1)
        assert max(off.loss, off.gradient) <= 1e-5, off


def test_visibility_by_brute_force() -> None:
    """The predicate against the sentence of the method, token pair by token pair, with two samples in one row."""
    rows = [
        plain_row(Row([1, 2, 3], 2, 4, (Readout(1, [4, 5, 6], 1.0), Readout(2, [7, 8], 1.0))), BLOCK),
        plain_row(Row([1], 1, 4, ()), BLOCK),
    ]
    tokens = [(s, r.kind[i], r.block[i], r.position[i]) for s, r in enumerate(rows) for i in range(len(r.kind))]
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
            q, k = (TokenCoordinates(*map(torch.tensor, places)) for places in (query, key))
            assert bool(visible(q, k)) == expected, (query, key)
            in_window = expected and qpos - kpos < 4
            assert bool(visible(q, k, sliding_window=4)) == in_window, (query, key)
            inside = qs == ks and qkind == kkind == MEMORY and qblock == kblock
            assert bool(visible(q, k, bidirectional=True)) == (expected or inside), (query, key)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("StableLM", "layout did not reach"),
        ("BLOOM", "0 of 2 layers"),
        ("MPT", "0 of 2 layers"),
        ("GPT-OSS", "s_aux"),
        ("Falcon", "falcon"),
        ("Mamba", "mamba"),
    ],
)
def test_family_that_cannot_take_the_mask_is_refused(family: str, reason: str) -> None:
    assert reason in refusal(REFUSED[family])


_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 4096}
_LONG = {"hidden_size": 384, "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 8192}
T = transformers


@pytest.mark.parametrize(
    "config",
    [
        # Factors for every channel of a head: a small copy with other heads could not have them.
        T.Phi3Config(**_LONG, rope_parameters={**_ROPE, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}),
        T.DeepseekV3Config(n_routed_experts=8, n_group=2, topk_group=1, num_experts_per_tok=2),  # sizes inside its attention
        # A width for every layer.
        T.Gemma3nTextConfig(
            num_hidden_layers=10,
            intermediate_size=[64 + i for i in range(10)],
            hidden_size=64,
            head_dim=16,
            num_attention_heads=4,
        ),
        T.CwmConfig(),  # its special tokens cannot be unset
        T.SeedOssConfig(),  # a dropout that is no module: not what "in training mode" below means
    ],
    ids=lambda config: config.model_type,
)
def test_what_belongs_together_in_size_stays_together(config: transformers.PretrainedConfig) -> None:
    assert refusal(config) == ""


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        # A mask of its own, whose parameters are zeros before they are trained.
        (T.DogeConfig(), "a packed row differs from its unrolled runs"),
        # Attention in chunks, longer than any small row unless they are made small too.
        (T.Llama4TextConfig(num_local_experts=2), "a packed row differs from its unrolled runs"),
        (T.OPTConfig(layerdrop=0.3), "in training mode it draws at random"),
        (T.PhimoeConfig(num_local_experts=4), "in training mode it draws at random"),
        (T.Gemma4TextConfig(), "per-layer"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_only_a_trained_model_shows_is_refused(config: transformers.PretrainedConfig, reason: str) -> None:
    found = refusal(config)
    assert config.model_type in found
    assert reason in found


def test_every_parameter_of_a_small_copy_is_drawn() -> None:
    """No matrix and no vector of zeros or ones, and the same in every process; the random state is left as it was."""
    before = torch.get_rng_state()
    for config in (FAMILIES["Gemma 2"], FAMILIES["GPT-2"], T.DogeConfig(), T.Glm4MoeConfig(n_routed_experts=4)):
        first, again = (tiny_model(tiny_config(config)).state_dict() for _ in range(2))
        for name, tensor in first.items():
            assert tensor.float().std() > 1e-3, name
            assert torch.equal(tensor, again[name])
    assert torch.equal(torch.get_rng_state(), before)


def test_missing_layout_is_refused() -> None:
    model = build("Llama")
    use_rim_attention(model, "split")
    with pytest.raises(ModelError, match="layout did not reach"):
        model(input_ids=torch.tensor([[1, 2]]))


def attend(kernel: str, batch: Batch, **keywords: object) -> torch.Tensor:
    """One call of the attention on random heads, the layout's masks not kept between calls."""
    torch.manual_seed(0)
    query = torch.randn(1, 4, batch.tokens, 8)
    layout = replace(batch.layout, cache={})
    return rim_attention(LAYERS, query, query, query, None, rim_layout=layout, kernel=kernel_of(kernel), **keywords)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", [name for name in KERNELS if kernel_of(name).dropout])
def test_attention_dropout_is_honoured(kernel: str) -> None:
    """A part of the weights is dropped and the rest scaled up: zero where all of few keys are dropped, right on average."""
    batch = pack_samples(random_samples(0))
    kept = attend(kernel, batch)
    assert not torch.equal(kept, attend(kernel, batch, dropout=0.5))
    capped = attend(kernel, batch, softcap=9.0)
    assert not torch.equal(capped, attend(kernel, batch, softcap=9.0, dropout=0.5))
    query = torch.ones(1, 1, batch.tokens, 8)
    torch.manual_seed(1)
    outputs = [
        rim_attention(LAYERS, query, query, query, None, rim_layout=batch.layout, kernel=kernel_of(kernel), dropout=0.5)[0]  # type: ignore[arg-type]
        for _ in range(400)
    ]
    assert float(torch.stack(outputs).mean()) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if name != REFERENCE])
def test_softcap_scale_and_window_by_kernel(kernel: str) -> None:
    for seed in range(3):
        batch = pack_samples(random_samples(seed))
        for keywords in ({"softcap": 2.0}, {"scaling": 0.7}, {"sliding_window": 7}, {"softcap": 2.0, "sliding_window": 7}):
            if not all(getattr(kernel_of(kernel), name, True) for name in keywords):
                continue
            assert torch.allclose(attend(kernel, batch, **keywords), attend(REFERENCE, batch, **keywords), atol=1e-5), keywords


def test_bidirectional_blocks_with_a_window_are_refused() -> None:
    with pytest.raises(ModelError, match="sliding window of 3 cannot be combined"):
        attend("split", pack_samples(random_samples(0), True), sliding_window=3)
