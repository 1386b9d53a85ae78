"""benchmarks/robustness.py around a stand-in for the trainer: what it starts, and what its page says of known curves."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import robustness  # noqa: E402
from reproduce import Plan, run_all  # noqa: E402

from rim_dist.recipe import load_recipe  # noqa: E402

LAUNCH = [sys.executable, "tests/workers/pretend_train.py"]
STARTS = [robustness.Start(seed, capability) for seed in (4, 5) for capability in robustness.CAPABILITIES]
METHODS = ("rim", "direct")


def with_curves(plan: Plan) -> None:
    """Block 1 takes off in the second window and has faded in the third; block 2 never learns and fades in the fourth."""
    windows = [([1.5, 1.6], [10, 6]), ([0.5, 1.6], [8, 6]), ([0.1, 1.6], [5, 6]), ([1.6], [0])]
    lines = [
        {"kind": "train", "stage": "stage1", "step_loss": losses, "step_readouts": counts}
        for losses, counts in windows
        for _ in range(robustness.WINDOW)
    ]
    lines.append({"kind": "train", "stage": "stage2", "step_loss": [], "step_readouts": []})
    for start in STARTS:
        path = plan.folder(start.name("rim")) / "metrics.jsonl"
        path.write_text(path.read_text().replace('"kind": "train"', '"kind": "train", "stage": "stage2"'))
        path.write_text("".join(json.dumps(line) + "\n" for line in lines) + path.read_text())


def test_starts_differ_in_seed_kernels_and_threads(tmp_path: Path) -> None:
    plan = robustness.make_plan(tmp_path, STARTS, METHODS, ["data.synthetic.step_text=room", "curriculum.stage1.samples=640"])
    assert len(plan.runs) == len(STARTS) * 3
    environments = [plan.runs[start.name("rim")].environment for start in STARTS]
    assert [e["ATEN_CPU_CAPABILITY"] for e in environments] == ["default", "avx2"] * 2
    assert [e["OMP_NUM_THREADS"] for e in environments] == ["1", "2", "2", "1"]
    for name, run in plan.runs.items():
        recipe = load_recipe(ROOT / run.recipe, [f"run.name={name}", *run.overrides()])
        assert recipe.data.synthetic.step_text == "room"
        assert recipe.run.seed == int(name.split("seed")[1][0])
    rim = plan.runs["rim-seed4-avx2"]
    assert rim.base == "base-seed4-avx2"
    assert f"model.init_from={tmp_path / 'base-seed4-avx2'}" in rim.overrides()


def test_page_of_known_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = robustness.make_plan(tmp_path, STARTS, METHODS, [])
    assert run_all(plan, LAUNCH, jobs=4, minutes=1)
    with_curves(plan)
    text, figures, holds = robustness.page(plan, STARTS, METHODS)
    assert "| 4 | default | 1 | 20.0 | 90.0 | 20.0 | 40 / 60 | never / 80 |" in text
    assert "| RiM | 95.0 | 90.0 | 100.0 |" in text
    assert not holds
    verdicts = [line.rpartition(": ")[2] for line in text.splitlines() if line.startswith("- ")]
    assert verdicts == ["NO", "yes", "NO", "yes"]  # two of four below 95 %; none below 80; the stand-in's base; 70 points
    robustness.draw(figures["curves"], 1.6, tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5_000
    # Figures and curves stay when the runs are gone.
    for name in plan.runs:
        (plan.folder(name) / "hf" / "rim_dist.json").unlink()
        (plan.folder(name) / "metrics.jsonl").unlink()
    again = robustness.make_plan(tmp_path, STARTS, METHODS, [])
    assert not again.left()
    assert robustness.page(again, STARTS, METHODS)[0] == text
