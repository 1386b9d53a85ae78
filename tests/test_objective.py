"""The curriculum's formulas, rows by hand, the learning rate."""

from __future__ import annotations

import pytest
import torch
from oracle import PlainRow, plain_row

from rim_dist.attention.visibility import MEMORY, QUESTION, READOUT
from rim_dist.config import Recipe, StageSection
from rim_dist.data.rows import pack
from rim_dist.data.samples import EncodedSample, Readout, Row
from rim_dist.methods import method_names, method_of
from rim_dist.methods.base import StageProgress
from rim_dist.methods.rim import stage1_weights, stage2_weights
from rim_dist.objective import loss as loss_module
from rim_dist.objective.loss import HeadWeights, LogitRule, ReadoutLoss, plain_cross_entropy, weighted_cross_entropy
from rim_dist.training.schedule import learning_rate

BLOCK = [90, 91, 92]
EOS = 2
QUESTION_IDS = [5, 6]
STEPS = [[10, EOS], [11, 12, EOS], [13, EOS]]
ANSWER = [20, 21, EOS]


def test_stage1_weights() -> None:
    assert stage1_weights(4, 0.0, "relative", 13) == (1, 1, 1, 1)
    # u = 0.4: lambda_t = max(0, 1 - 1.6 / t)
    assert stage1_weights(4, 0.4, "relative", 13) == pytest.approx([0, 0.2, 1 - 1.6 / 3, 1])
    assert stage1_weights(4, 0.99, "relative", 13) == (0, 0, 0, 1)
    assert stage1_weights(4, 0.2, "absolute", 13) == pytest.approx([0, 0, 1 - 2.6 / 3, 1])
    assert stage1_weights(4, 0.9, "constant", 13) == (1, 1, 1, 1)
    assert stage1_weights(1, 0.9, "relative", 13) == (1,)


def test_stage2_weights() -> None:
    assert stage2_weights(4, 1.0) == pytest.approx([0.1, 0.2, 0.3, 0.4])  # 2k / (K (K + 1))
    assert stage2_weights(4, 0.0) == (0.25,) * 4
    assert sum(stage2_weights(7, 5.0)) == pytest.approx(1.0)


IGNORE = -100


SAMPLE = EncodedSample(QUESTION_IDS, STEPS, ANSWER, line=1)


def recipe_of(method: str, curriculum: dict | None = None, **sections: dict) -> Recipe:
    """Two blocks of one memory token, both stages of 100 samples unless given."""
    stages = {"stage1": {"samples": 100}, "stage2": {"samples": 100}, **(curriculum or {})}
    model = {"config": {"model_type": "llama"}, "tokenizer": "synthetic"}
    memory = {"blocks": 2, "tokens_per_block": 1}
    return Recipe.model_validate({"method": method, "model": model, "memory": memory, "curriculum": stages, **sections})


def row(method: str, stage: str, fraction: float = 0.0, **curriculum: dict) -> PlainRow:
    return plain_row(method_of(recipe_of(method, curriculum)).row(SAMPLE, StageProgress(stage, fraction)), BLOCK)  # type: ignore[arg-type]


def test_stage1_row_by_hand() -> None:
    """Three steps: three blocks; block t predicts step t + 1, the last one the answer; step 1 is never a target."""
    r = row("rim", "stage1")
    assert r.input_ids == [5, 6, *BLOCK, *BLOCK, *BLOCK, 11, 12, 13, 20, 21]
    assert r.kind == [QUESTION] * 2 + [MEMORY] * 9 + [READOUT] * 5
    assert r.block == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 1, 1, 2, 3, 3]
    assert r.position == [*range(11), 5, 6, 8, 11, 12]  # readout k starts at q + k (M + 2)
    x = IGNORE
    assert r.label == [x, x, x, x, 11, x, x, 13, x, x, 20, 12, EOS, EOS, 21, EOS]
    assert r.weight == [0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1]


def test_faded_steps_leave_the_row_but_not_their_blocks() -> None:
    r = row("rim", "stage1", fraction=0.9)
    assert r.input_ids == [5, 6, *BLOCK, *BLOCK, *BLOCK, 20, 21]
    assert [label for label in r.label if label != IGNORE] == ANSWER


def test_same_step_targets() -> None:
    r = row("rim", "stage1", stage1={"samples": 1, "targets": "same_step"})
    assert r.kind.count(MEMORY) == 4 * 3
    assert [r.label[i] for i in (4, 7, 10, 13)] == [10, 11, 13, 20]


def test_stage2_row() -> None:
    r = row("rim", "stage2")
    assert r.kind.count(MEMORY) == 2 * 3
    targets = [[r.label[i] for i in range(len(r.label)) if r.label[i] != IGNORE and r.block[i] == k] for k in (1, 2)]
    assert targets == [ANSWER, ANSWER]
    assert sorted(set(r.weight)) == pytest.approx([0, 1 / 3, 2 / 3])


def test_no_steps_is_one_block_with_the_answer() -> None:
    sample = EncodedSample(QUESTION_IDS, [], ANSWER, line=1)
    r = plain_row(method_of(recipe_of("rim")).row(sample, StageProgress("stage1", 0.5)), BLOCK)
    assert r.kind.count(MEMORY) == 3
    assert [label for label in r.label if label != IGNORE] == ANSWER


def test_baseline_rows() -> None:
    direct, chain = row("direct", "stage1"), row("cot", "stage2")
    assert direct.input_ids == [5, 6, 20, 21]
    assert direct.label == [IGNORE, 20, 21, EOS]
    assert chain.input_ids == [5, 6, 10, 11, 12, 13, 20, 21]
    assert chain.label == [IGNORE, 10, 11, 12, 13, 20, 21, EOS]


@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_longest_rows(method: str, stage: str) -> None:
    """No step makes a longer row than those the data is checked with."""
    other = {"stage1": "stage2", "stage2": "stage1"}[stage]
    bound = method_of(recipe_of(method, {other: {"samples": 0}}))
    longest = list(bound.longest_rows(SAMPLE))
    for fraction in (0.0, 0.2, 0.5, 0.99):
        one = bound.row(SAMPLE, StageProgress(stage, fraction))  # type: ignore[arg-type]
        r = plain_row(one, BLOCK)
        assert len(one) == len(r.input_ids) <= max(map(len, longest))
        # Positions from 0; the last target token of a readout is predicted, not run.
        assert max(r.position) + 2 <= one.longest_sequence <= max(row.longest_sequence for row in longest)


def heads(seed: int) -> tuple[torch.Tensor, HeadWeights]:
    """A table of hidden states by token id, and a head of 100 x 16 with bias."""
    generator = torch.Generator().manual_seed(seed)
    table, weight, bias = (torch.randn(shape, generator=generator) for shape in ((100, 16), (100, 16), (100,)))
    return table, HeadWeights(weight, bias)


def test_loss_is_one_weighted_sum_however_it_is_cut() -> None:
    """Micro-batches of any size, and a dummy row, give the same sum of weighted token losses."""
    rows = [Row([1, 2, 3][:n], 2, len(BLOCK), (Readout(1, [4, 5], 0.3), Readout(2, [6] * n, 0.7))) for n in (1, 2, 3)]
    table, head = heads(0)

    def loss(part: list[Row]) -> ReadoutLoss:
        batch = pack(part, BLOCK)
        hidden = table[batch.input_ids[0, batch.targets.column]]
        return ReadoutLoss.of(*weighted_cross_entropy(hidden, head, LogitRule(), batch.targets), batch.targets, 4)

    def weighted_sum(parts: list[list[Row]]) -> float:
        return sum(float(loss(part).weighted_sum) for part in parts)

    whole = weighted_sum([rows])
    assert weighted_sum([[r] for r in rows]) == pytest.approx(whole, rel=1e-6)
    assert weighted_sum([rows[:2], rows[2:], [rows[0].without_weight()]]) == pytest.approx(whole, rel=1e-6)
    assert loss([rows[0].without_weight()]).by_block.sum() == 0  # nor does the filler enter the block losses
    together = loss(rows)
    assert together.by_block[1].tolist() == [0, 6, 6, 0, 0]
    expected = 0.0
    for r in (plain_row(r, BLOCK) for r in rows):
        for i, label in zip(r.input_ids, r.label, strict=True):
            if label >= 0:
                expected += float(-(head.weight @ table[i] + head.bias).log_softmax(0)[label])
    assert float(together.by_block[0].sum()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(0.3), LogitRule(1.0, 2.0), LogitRule(0.5, 3.0)])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("entries", [1, 700, 1 << 25])
def test_chunked_loss_is_the_plain_one(
    rule: LogitRule, rows: bool, bias: bool, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loss, token losses and all gradients against logits in full and torch's cross-entropy, whatever the chunk."""
    monkeypatch.setitem(loss_module.LOGITS_ENTRIES, "cpu", entries)
    batch = pack([Row([1, 2], 2, len(BLOCK), (Readout(1, [4, 5, 6], 0.3), Readout(2, [7, 8, 9, 1], 0.7)))] * 3, BLOCK)
    table, plain = heads(1)
    ids = (3, 98)
    given = [table[batch.input_ids[0, batch.targets.column]], plain.weight]
    given += [plain.bias] if bias else []
    given += [plain.weight[list(ids)] * 0.5 + 1] if rows else []

    def leaves() -> list[torch.Tensor]:
        return [t.clone().requires_grad_(not (rows and i == 1)) for i, t in enumerate(given)]

    ours = leaves()
    head = HeadWeights(ours[1], ours[2] if bias else None, ours[-1] if rows else None, ids if rows else ())
    total, token_losses = weighted_cross_entropy(ours[0], head, rule, batch.targets, gradient_scale=0.25)
    (total * 0.5).backward()

    wanted = leaves()
    weight = wanted[1].index_copy(0, torch.tensor(ids), wanted[-1]) if rows else wanted[1]
    logits = torch.nn.functional.linear(wanted[0], weight, wanted[2] if bias else None)
    in_full = plain_cross_entropy(logits.detach(), rule, batch.targets)
    logits = logits * rule.scale
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    losses = torch.nn.functional.cross_entropy(logits, batch.targets.label, reduction="none")
    ((losses * batch.targets.weight).sum() * 0.5).backward()
    for found in (token_losses, in_full[1]):
        assert torch.allclose(found, losses, rtol=1e-5, atol=1e-6)
    assert float(in_full[0]) == pytest.approx(float(total), rel=1e-5)
    for a, b in zip(ours, wanted, strict=True):
        if b.grad is None:
            assert a.grad is None
        else:
            assert float((a.grad - b.grad).abs().max()) <= 1e-5 * max(1.0, float(b.grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_chunks_of_a_16_bit_loss_are_added_up_in_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of weight, bias and rows are fp32 products of the rounded gradient of the logits, rounded once."""
    torch.manual_seed(0)
    row = Row([1, 2], 2, len(BLOCK), (Readout(1, [4, 5, 6], 0.3), Readout(2, [7, 8, 9, 1], 0.7)))
    targets = pack([row] * 40, BLOCK).targets
    hidden, weight = torch.randn(len(targets.label), 16, dtype=dtype), torch.randn(100, 16, dtype=dtype)
    bias, ids = torch.randn(100, dtype=dtype), (3, 98)
    rows = torch.randn(2, 16, dtype=dtype)
    logits = torch.nn.functional.linear(hidden, weight.index_copy(0, torch.tensor(ids), rows), bias)
    d_logits = logits.float().log_softmax(1).exp()
    d_logits[torch.arange(len(logits)), targets.label] -= 1
    d_logits = (d_logits * targets.weight[:, None]).to(dtype).float()
    in_full = d_logits.T @ hidden.float()
    in_full_rows, in_full[list(ids)] = in_full[list(ids)].clone(), 0
    for entries in (100, 700, 1 << 25):
        monkeypatch.setitem(loss_module.LOGITS_ENTRIES, "cpu", entries)
        ours = [t.clone().requires_grad_() for t in (hidden, weight, bias, rows)]
        head = HeadWeights(ours[1], ours[2], ours[3], ids)
        weighted_cross_entropy(ours[0], head, LogitRule(), targets)[0].backward()
        for found, wanted in zip(ours[1:], (in_full, d_logits.sum(0), in_full_rows), strict=True):
            assert found.grad is not None
            assert found.grad.dtype == dtype
            # The sums differ in the last bits of fp32, so that a few are rounded to the other neighbour.
            assert float((found.grad != wanted.to(dtype)).float().mean()) < 0.01
            assert torch.allclose(found.grad.float(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_products_on_a_gpu_are_added_up_in_fp32() -> None:
    """The operation that a GPU would run, on tensors without values."""
    total = torch.zeros(6, 4, dtype=torch.float32, device="meta")
    left, right = (torch.zeros(*shape, dtype=torch.bfloat16, device="meta") for shape in ((3, 6), (3, 4)))
    loss_module._add_product(total, left.T, right)
    assert (total.dtype, total.shape) == (torch.float32, (6, 4))


def test_learning_rate() -> None:
    constant = StageSection(samples=1, learning_rate=1.0, warmup_fraction=0.1)
    assert [learning_rate(constant, s, 20) for s in (0, 1, 2, 19)] == [0.5, 1.0, 1.0, 1.0]
    linear = StageSection(samples=1, learning_rate=1.0, warmup_fraction=0.0, schedule="linear")
    assert [learning_rate(linear, s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = StageSection(samples=1, learning_rate=1.0, warmup_fraction=0.0, schedule="cosine")
    assert learning_rate(cosine, 2, 4) == pytest.approx(0.5)
