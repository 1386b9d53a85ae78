"""The curriculum's formulas, rows by hand, the learning rate, and scoring."""

from __future__ import annotations

import pytest
import torch

from rim_dist.attention.visibility import MEMORY, QUESTION, READOUT
from rim_dist.config import CurriculumSection, StageSection
from rim_dist.data.rows import IGNORE, Readout, build_row, collate
from rim_dist.evaluation.scoring import extract_answer, same_answer
from rim_dist.objective.curriculum import longest_sequence, sample_row, stage1_weights, stage2_weights
from rim_dist.objective.loss import readout_loss, supervised_columns
from rim_dist.training.schedule import learning_rate

BLOCK = [90, 91, 92]
EOS = 2
QUESTION_IDS = [5, 6]
STEPS = [[10, EOS], [11, 12, EOS], [13, EOS]]
ANSWER = [20, 21, EOS]


def test_stage1_weights() -> None:
    assert stage1_weights(4, 0.0, "relative", 13) == [1, 1, 1, 1]
    # u = 0.4: lambda_t = max(0, 1 - 1.6 / t)
    assert stage1_weights(4, 0.4, "relative", 13) == pytest.approx([0, 0.2, 1 - 1.6 / 3, 1])
    assert stage1_weights(4, 0.99, "relative", 13) == [0, 0, 0, 1]
    assert stage1_weights(4, 0.2, "absolute", 13) == pytest.approx([0, 0, 1 - 2.6 / 3, 1])
    assert stage1_weights(4, 0.9, "constant", 13) == [1, 1, 1, 1]
    assert stage1_weights(1, 0.9, "relative", 13) == [1]


def test_stage2_weights() -> None:
    assert stage2_weights(4, 1.0) == pytest.approx([0.1, 0.2, 0.3, 0.4])  # 2k / (K (K + 1))
    assert stage2_weights(4, 0.0) == [0.25] * 4
    assert sum(stage2_weights(7, 5.0)) == pytest.approx(1.0)


def row(method: str, stage: str, share: float = 0.0, **curriculum: dict) -> object:
    section = CurriculumSection.model_validate(curriculum)
    return sample_row(method, stage, section, 2, BLOCK, QUESTION_IDS, STEPS, ANSWER, share)  # type: ignore[arg-type]


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
    r = row("rim", "stage1", share=0.9)
    assert r.input_ids == [5, 6, *BLOCK, *BLOCK, *BLOCK, 20, 21]
    assert [label for label in r.label if label != IGNORE] == ANSWER


def test_same_step_targets() -> None:
    r = row("rim", "stage1", stage1={"targets": "same_step"})
    assert r.kind.count(MEMORY) == 4 * 3
    assert [r.label[i] for i in (4, 7, 10, 13)] == [10, 11, 13, 20]


def test_stage2_row() -> None:
    r = row("rim", "stage2")
    assert r.kind.count(MEMORY) == 2 * 3
    targets = [[r.label[i] for i in range(len(r)) if r.label[i] != IGNORE and r.block[i] == k] for k in (1, 2)]
    assert targets == [ANSWER, ANSWER]
    assert sorted(set(r.weight)) == pytest.approx([0, 1 / 3, 2 / 3])


def test_no_steps_is_one_block_with_the_answer() -> None:
    r = sample_row("rim", "stage1", CurriculumSection(), 2, BLOCK, QUESTION_IDS, [], ANSWER, 0.5)
    assert r.kind.count(MEMORY) == 3
    assert [label for label in r.label if label != IGNORE] == ANSWER


def test_baseline_rows() -> None:
    direct, chain = row("direct", "stage1"), row("cot", "stage2")
    assert direct.input_ids == [5, 6, 20, 21]
    assert direct.label == [IGNORE, 20, 21, EOS]
    assert chain.input_ids == [5, 6, 10, 11, 12, 13, 20, 21]
    assert chain.label == [IGNORE, 10, 11, 12, 13, 20, 21, EOS]


@pytest.mark.parametrize("method", ["rim", "direct", "cot"])
@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_longest_sequence_is_the_highest_position(method: str, stage: str) -> None:
    section = CurriculumSection.model_validate({stage: {"samples": 1}})
    r = sample_row(method, stage, section, 2, BLOCK, QUESTION_IDS, STEPS, ANSWER, 0.0)  # type: ignore[arg-type]
    lengths = [*map(len, STEPS)]
    # Positions from 0; the last target token of a readout is predicted, not run.
    assert longest_sequence(method, section, 2, len(BLOCK), 2, lengths, len(ANSWER)) >= max(r.position) + 2  # type: ignore[arg-type]


def test_loss_is_one_weighted_sum_however_it_is_cut() -> None:
    """Micro-batches of any size, and a weightless filler, give the same sum of weighted token losses."""
    rows = [build_row([1, 2, 3][:n], BLOCK, 2, [Readout(1, [4, 5], 0.3), Readout(2, [6] * n, 0.7)]) for n in (1, 2, 3)]
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(100, 100, generator=generator)

    def weighted_sum(parts: list[list]) -> float:
        total = 0.0
        for part in parts:
            batch = collate(part)
            columns = supervised_columns(batch)
            total += float(readout_loss(table[batch.input_ids[:, columns]], batch, columns, 4).weighted_sum)
        return total

    whole = weighted_sum([rows])
    assert weighted_sum([[r] for r in rows]) == pytest.approx(whole, rel=1e-6)
    assert weighted_sum([rows[:2], rows[2:], [rows[0].without_weight()]]) == pytest.approx(whole, rel=1e-6)
    batch = collate(rows)
    columns = supervised_columns(batch)
    loss = readout_loss(table[batch.input_ids[:, columns]], batch, columns, 4)
    assert loss.block_counts.tolist() == [0, 6, 6, 0, 0]
    expected = sum(
        float(-table[i].log_softmax(0)[label])
        for r in rows
        for i, label in zip(r.input_ids, r.label, strict=True)
        if label >= 0
    )
    assert float(loss.block_sums.sum()) == pytest.approx(expected, rel=1e-5)


def test_learning_rate() -> None:
    constant = StageSection(samples=1, learning_rate=1.0, warmup_fraction=0.1)
    assert [learning_rate(constant, s, 20) for s in (0, 1, 2, 19)] == [0.5, 1.0, 1.0, 1.0]
    linear = StageSection(samples=1, learning_rate=1.0, warmup_fraction=0.0, schedule="linear")
    assert [learning_rate(linear, s, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    cosine = StageSection(samples=1, learning_rate=1.0, warmup_fraction=0.0, schedule="cosine")
    assert learning_rate(cosine, 2, 4) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("#### 72", "72"),
        ("48/2=24\n#### 1,072", "1072"),
        ("####72.0\nand more", "72.0"),
        ("no marker 5", "no marker 5"),
        ("#### $18 ", "18"),
        ("", ""),
        ("####", ""),
        ("hall #", ""),
        (" \n#### \n", ""),
        ("#### -3", "-3"),
        ("# 1 ## 2", "2"),
        ("#### garden", "garden"),
    ],
)
def test_extract_answer(text: str, answer: str) -> None:
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("given", "target", "same"),
    [
        ("72", "72.0", True),
        ("72.", "72", True),
        ("1,000", "1000", True),
        ("9280000000000", "9.28e12", True),
        ("0.30000001", "0.3", False),
        ("-2.5", "-2.50", True),
        ("Garden", "garden.", True),
        ("hall", "garden", False),
        ("", "0", False),
        ("nan", "nan", True),
    ],
)
def test_same_answer(given: str, target: str, same: bool) -> None:
    assert same_answer(given, target) is same
