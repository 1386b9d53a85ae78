"""The warning of a block that fades out unlearned, and the warning at the end of a run that learned nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run

from rim_dist.data.rows import Targets, pack
from rim_dist.data.samples import Readout, Row
from rim_dist.metrics import read_metrics
from rim_dist.training.grounding import GroundingWatch, near_guessing

GUESSING = math.log(4)  # four first tokens, equally often


def targets_of(readouts: list[int]) -> Targets:
    """Step readouts by block, their first tokens 0 to 3 in turns, and an answer after them."""
    rows = [
        Row([1], 9, 3, (Readout(block, [i % 4, 9], 1.0, is_step=True), Readout(9, [8, 8, 9], 1.0)))
        for block, count in enumerate(readouts, 1)
        for i in range(count)
    ]
    return pack(rows, [10, 11, 12]).targets


def line(losses: list[float | None], counts: list[int], stage: str = "stage1") -> dict[str, Any]:
    return {"stage": stage, "step_loss": losses, "step_readouts": counts}


def feed(watch: GroundingWatch, steps: int, losses: list[float | None], counts: list[int], known: bool = True) -> list[str]:
    said: list[str] = []
    for _ in range(steps):
        targets: Iterable[Targets] = [targets_of(counts)] if known else ()
        said += watch.observe(line(losses, counts), targets)
    return said


def test_only_first_tokens_of_steps_count() -> None:
    targets = targets_of([4, 8])
    assert targets.label[targets.opens_step].tolist() == [0, 1, 2, 3] * 3
    assert set(targets.block[targets.opens_step].tolist()) == {1, 2}
    assert pack([Row([1], 1, 3, (Readout(1, [4, 9], 1.0),))], [10, 11, 12]).targets.opens_step.sum() == 0


def test_an_unlearned_block_is_named_once_when_half_of_its_steps_are_gone() -> None:
    watch = GroundingWatch()
    assert feed(watch, 40, [0.9 * GUESSING, 0.01], [8, 8]) == []
    # The mean of the last 20 steps has half of the readouts after the 20th of these.
    assert feed(watch, 19, [0.9 * GUESSING, 0.01], [4, 8]) == []
    (said,) = feed(watch, 1, [0.9 * GUESSING, 0.01], [4, 8])
    assert said.startswith(
        f"warning: block 1 is fading out and has not learned its steps: their first token has a loss of "
        f"{0.9 * GUESSING:.2f}, guessing it {GUESSING:.2f}."
    )
    assert "docs/learning.md" in said
    assert feed(watch, 100, [0.9 * GUESSING], [1]) == []  # block 1 was named, block 2 has learned


@pytest.mark.parametrize(("loss", "warned"), [(0.75, True), (0.65, False)])
def test_what_counts_as_learned(loss: float, warned: bool) -> None:
    watch = GroundingWatch()
    feed(watch, 40, [GUESSING], [8])
    assert bool(feed(watch, 20, [loss * GUESSING], [4])) == warned


def test_no_fade_no_warning_and_a_new_stage_begins_anew() -> None:
    watch = GroundingWatch()
    assert feed(watch, 200, [GUESSING], [8]) == []
    assert [text for _ in range(60) for text in watch.observe(line([], [], "stage2"))] == []
    assert (watch._stage, dict(watch._seen)) == ("stage2", {})


def test_an_earlier_start_is_history() -> None:
    watch = GroundingWatch()
    assert feed(watch, 30, [GUESSING], [8], known=False) == []
    assert len(feed(watch, 30, [GUESSING], [4])) == 1
    watch = GroundingWatch()
    assert feed(watch, 60, [GUESSING], [8], known=False) + feed(watch, 60, [GUESSING], [4], known=False) == []
    assert feed(watch, 20, [GUESSING], [4]) == []  # the earlier start has said it


def test_near_guessing() -> None:
    assert [near_guessing(a) for a in (0.18, 0.23, 0.39, 0.41, 0.95)] == [True, True, True, False, False]


def test_a_run_made_to_fail_says_so(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """A rate at which nothing can be learned: block 1 fades out at guessing, and the run ends with a plain sentence."""
    curriculum = {
        "stage1": {"samples": 60 * 16, "learning_rate": 1e-7, "max_steps": 4},
        "stage2": {"samples": 32, "learning_rate": 1e-7},
    }
    synthetic = {"synthetic": {"samples": 1000, "min_steps": 3, "max_steps": 4}}
    path = recipe_file(
        curriculum=curriculum, data=synthetic, memory={"blocks": 4}, evaluation={"samples": 32, "data": "synthetic:1"}
    )
    out = run("fork", 2, ["-m", "rim_dist", "train", str(path)]).stdout.splitlines()
    warnings = [text for text in out if "warning: block" in text]
    assert len(warnings) == len({text.partition(" is ")[0] for text in warnings}) >= 2
    assert "warning: block 1 is fading out and has not learned its steps" in warnings[0]
    assert "RiM did not learn:" in out[-1]
    assert "guessing gets 20 %" in out[-1]
    assert any(text.startswith("done: ") for text in out)
    lines = [x for x in read_metrics(tmp_path / "runs" / "tiny" / "metrics.jsonl") if x["kind"] == "train"]
    assert lines[0]["step_readouts"][:2] == [16, 16]  # walks of three and four doors: block 1 and 2 have a step for each
    assert all(x["step_loss"] == x["step_readouts"] == [] for x in lines if x["stage"] == "stage2")
    assert torch.tensor(lines[0]["step_loss"]).mean() > 2
