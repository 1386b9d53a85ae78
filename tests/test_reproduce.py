"""benchmarks/reproduce.py around a stand-in for the trainer: what it starts, how it stops and goes on, what the page says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import reproduce  # noqa: E402

from rim_dist.recipe import load_recipe  # noqa: E402

LAUNCH = [sys.executable, "tests/workers/pretend_train.py"]
METHODS = ("rim", "direct", "stage2")


def plan_in(folder: Path, seeds: tuple[int, ...] = (0, 2)) -> reproduce.Plan:
    return reproduce.make_plan(reproduce.small(), folder, METHODS, seeds)


def given(plan: reproduce.Plan, name: str) -> dict[str, Any]:
    return json.loads((plan.folder(name) / "given.json").read_text())


def test_runs_stop_go_on_and_are_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETEND_SLOW", "direct-seed2")
    plan = plan_in(tmp_path)
    assert not reproduce.run_all(plan, LAUNCH, jobs=4, minutes=0.1)
    assert plan.finished("direct-compute-seed0")
    assert not plan.finished("direct-seed2")
    before = (plan.folder("rim-seed0") / "metrics.jsonl").stat().st_mtime_ns
    monkeypatch.delenv("PRETEND_SLOW")
    plan = plan_in(tmp_path)
    assert reproduce.run_all(plan, LAUNCH, jobs=4, minutes=1)
    assert (plan.folder("rim-seed0") / "metrics.jsonl").stat().st_mtime_ns == before  # what is complete is not run again

    # Every command is one that `rim-dist train` takes.
    for name, run in plan.runs.items():
        load_recipe(ROOT / run.recipe, [f"run.name={name}", *run.overrides()])
    rim, direct, more = (given(plan, n) for n in ("rim-seed2", "direct-seed2", "direct-compute-seed2"))
    samples = [sum(int(g[f"curriculum.stage{s}.samples"]) for s in (1, 2)) for g in (rim, direct, more)]
    assert samples[0] == samples[1] == samples[2] / 3
    assert rim["model.init_from"] == direct["model.init_from"] == str(tmp_path / "base-seed2")
    only = given(plan, "stage2-seed0")
    assert (only["method"], only["curriculum.stage1.samples"]) == ("rim", "0")
    assert int(only["curriculum.stage2.samples"]) == samples[0]

    text, figures = reproduce.page(plan, METHODS, (0, 2), {})
    assert "| RiM | samples | 60.0 ± 10.0 |" in text
    assert "| SFT without CoT | compute | 20.0 ± 0.0 |" in text
    assert "| SFT without CoT | +40.0 ± 10.0 | +40.0 ± 10.0 |" in text
    assert "| RiM, stage 2 only | +0.0 ± 0.0 |  |" in text  # the stand-in takes it for rim
    assert figures["margins"]["direct"]["samples"] == pytest.approx([0.3, 0.5])


def test_figures_of_another_machine_are_not_made_again(tmp_path: Path) -> None:
    here, there, figures = tmp_path / "here", tmp_path / "there", tmp_path / "figures"
    all_seeds = reproduce.make_plan(reproduce.small(), here, METHODS, (0, 2), figures=figures)
    first = reproduce.make_plan(reproduce.small(), here, METHODS, (0,), figures=figures)
    assert reproduce.run_all(first, LAUNCH, jobs=4, minutes=1)
    assert {path.stem for path in figures.iterdir()} == set(first.runs)
    text, _ = reproduce.page(first, METHODS, (0,), {})  # one seed: the error of ten questions
    assert "| RiM | samples | 50.0 ± 15.8 |" in text
    assert "| SFT without CoT | +30.0 ± 20.2 | +30.0 ± 20.2 |" in text
    (figures / "direct-compute-seed0.json").unlink()
    plan = reproduce.make_plan(reproduce.small(), there, METHODS, (0, 2), figures=figures)
    second = {name for name in plan.runs if name.endswith("seed2")}
    # The base is made again where a run that is left starts from it; the run's length comes from the figures of others.
    assert set(plan.left()) == second | {"base-seed0", "direct-compute-seed0"}
    assert reproduce.run_all(plan, LAUNCH, jobs=4, minutes=1)
    assert {path.name for path in there.iterdir() if path.is_dir()} == second | {"base-seed0", "direct-compute-seed0"}
    assert reproduce.page(plan, METHODS, (0, 2), {}) == reproduce.page(all_seeds, METHODS, (0, 2), {})

    (there / "rim-seed2" / "hf" / "rim_dist.json").unlink()
    with pytest.raises(SystemExit, match="no seed has all its models in"):
        reproduce.timed(plan, METHODS, (0, 2), 1)
    (figures / "latency.json").write_text('{"rim": {}}')
    assert reproduce.timed(plan, METHODS, (0, 2), 1) == {"rim": {}}


def test_figures_of_other_runs_are_refused(tmp_path: Path) -> None:
    """Such as a short trial's, or those of a recipe that was changed: the page would mix them in silence."""

    def plan_with(folder: str, samples: int | None) -> reproduce.Plan:
        return reproduce.make_plan(reproduce.small(), tmp_path / folder, METHODS, (0,), samples, tmp_path / "figures")

    trial = plan_with("trial", 640)
    assert reproduce.run_all(trial, LAUNCH, jobs=4, minutes=1)
    trial.check_kept()
    plan_with("elsewhere", 640).check_kept()
    plan = plan_with("full", None)
    with pytest.raises(SystemExit, match=r"rim-seed0.json has figures of another recipe or length .*; choose another"):
        plan.check_kept()
    for method in METHODS:
        (tmp_path / "figures" / f"{method}-seed0.json").unlink()
    plan.check_kept()  # the length of a run at equal compute is known when those before it are
    assert plan.finished("direct-compute-seed0")
    assert reproduce.run_all(plan, LAUNCH, jobs=4, minutes=1)
    with pytest.raises(SystemExit, match=r"direct-compute-seed0.json has figures of another recipe or length"):
        reproduce.page(plan, METHODS, (0,), {})
    (tmp_path / "figures" / "rim-seed0.json").write_text('{"accuracy": 1.0}')
    with pytest.raises(SystemExit, match=r"rim-seed0.json does not hold a run's figures .*; remove it and"):
        plan.check_kept()


def test_a_failed_run_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETEND_FAIL", "base-seed0")
    with pytest.raises(SystemExit, match="base-seed0 ended with 2"):
        reproduce.run_all(plan_in(tmp_path, (0,)), LAUNCH, jobs=1, minutes=1)
