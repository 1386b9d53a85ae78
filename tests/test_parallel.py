"""Tensor and sequence ranks: a selection of the parallel matrix, and whole runs from recipe to answers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY_MODEL, partitioned, tiny_recipe, write_recipe
from oracle import train_one_process
from parallel_matrix import LAYOUTS, TOLERANCE, Case, all_cases, pairwise_cases, run_cases, table
from ranks import run

from rim_dist.checkpoint.hf_export import export_checkpoint
from rim_dist.checkpoint.store import complete_checkpoints, find_checkpoint, folder_of
from rim_dist.cli import main
from rim_dist.metrics import read_metrics
from rim_dist.recipe import load_recipe

# Four key heads, so that TP2 x SP2 has enough of them.
MODEL = {**TINY_MODEL, "num_key_value_heads": 4}


EIGHT = [case for case in pairwise_cases() if LAYOUTS[case.layout].ranks == 8]


@pytest.mark.untraced
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "cases",
    [
        pytest.param([case for case in pairwise_cases() if case not in EIGHT], id="2 and 4 ranks"),
        pytest.param(EIGHT, marks=pytest.mark.thorough, id="8 ranks"),
    ],
)
def test_every_mix_of_ranks_equals_one_process(cases: list[Case], tmp_path: Path) -> None:
    """Every pair of values of two dimensions of the matrix; `python tests/parallel_matrix.py` runs all of it."""
    assert len(cases) < len(all_cases()) / 5
    results = run_cases(cases, tmp_path, timeout=1500)
    print(table(results))
    assert len(results) == len(cases)
    for case, difference in results.items():
        assert difference.worst <= TOLERANCE, (case, difference)


def shared_run(folder: Path, name: str, **parallel: Any) -> dict:
    """Both stages, saved on the way, evaluated during training and at the end."""
    return tiny_recipe(
        folder,
        run={"name": name},
        model={"config": dict(MODEL)},
        data={"cache_dir": str(folder / "data")},
        optimizer={"micro_batch_tokens": 150},
        parallel={"zero_stage": 3, "deepspeed_config": partitioned(folder), **parallel},
        checkpoint={"every_steps": 3, "keep": 5},
        evaluation={"every_steps": 5, "samples": 10},
    )


RUNS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor": 2},
    "sp2": {"sequence": 2},
    "offload-tp2": {"tensor": 2, "offload": True, "deepspeed_config": None},
    "offload-sp2": {"sequence": 2, "offload": True, "deepspeed_config": None},
    "bf16-tp2": {"tensor": 2},
}
SLOW = ("sp2", "offload-tp2")
NAMES = [pytest.param(name, marks=pytest.mark.thorough) if name in SLOW else name for name in RUNS]


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs of 2 ranks from recipe to export, each once; returns the folder of all."""
    folder = tmp_path_factory.mktemp("shared")

    def make(name: str) -> Path:
        if not (folder / name).exists():
            recipe = shared_run(folder, name, **RUNS[name])
            if name.startswith("bf16"):
                recipe["model"] |= {"dtype": "bf16"}
            run("fork", 2, ["-m", "rim_dist", "train", str(write_recipe(folder / f"{name}.yaml", recipe))], timeout=300)
        return folder

    return make


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "bf16-tp2"])
def test_a_run_of_shared_matrices_or_rows_is_one_process(train: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    expected = train_one_process(load_recipe(write_recipe(tmp_path / "r.yaml", shared_run(tmp_path, "one"))))
    lines = [line for line in read_metrics(train(name) / name / "metrics.jsonl") if line["kind"] == "train"]
    assert len(lines) == len(expected) == 8
    for line, (loss, norm) in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(loss, rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert lines[-1]["samples"] == 128


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", NAMES)
def test_answers_of_shared_ranks_are_the_exports(train: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    """What the ranks answered together during training, and what one process answers with the exported folder."""
    runs = train(name)
    report = json.loads((runs / name / "report" / "evaluation.json").read_text())
    assert report["questions"] == 10
    answers = [json.loads(line) for line in (runs / name / "report" / "answers.jsonl").read_text().splitlines()]
    out = tmp_path / "report"
    command = ["evaluate", str(runs / name / "hf"), "synthetic", "--samples", "10", "--output", str(out), "--timed", "1"]
    assert main([*command, "--max-new-tokens", "3"]) == 0
    again = {a["question"]: a for a in map(json.loads, (out / "answers.jsonl").read_text().splitlines())}
    assert len(again) == len(answers) == 10
    for answer in answers:
        assert answer["answers"] == again[answer["question"]]["answers"], answer["question"]


def test_other_degrees_name_the_command(train: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    runs = train("tp2")
    assert main(["train", str(runs / "tp2.yaml"), "parallel.tensor=1"]) == 2
    error = capsys.readouterr().err
    assert "holds a run of other degrees (parallel.tensor: 2 there, 1 here)" in error
    assert f"rim-dist convert reshape {runs / 'tp2'} OUT --tensor 1 --sequence 1 --data N" in error


@pytest.mark.timeout(700)
def test_a_killed_run_of_tensor_ranks_goes_on_exactly(tmp_path: Path) -> None:
    """Half a run with dropout, then the rest in new processes: the same parameters as without a break, bit for bit."""
    paths = []
    for name in ("whole", "broken"):
        recipe = shared_run(tmp_path, name, tensor=2)
        recipe["curriculum"] = {stage: {**fields, "attention_dropout": 0.1} for stage, fields in recipe["curriculum"].items()}
        recipe["evaluation"] = {"at_end": False}
        paths.append(write_recipe(tmp_path / f"{name}.yaml", recipe))
    run("fork", 2, ["tests/workers/train_many.py", *map(str, paths)], timeout=300)
    folder = tmp_path / "broken"
    for checkpoint in complete_checkpoints(folder / "checkpoints"):
        if checkpoint != folder_of(folder / "checkpoints", 6):
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "hf")
    run("fork", 2, ["-m", "rim_dist", "train", str(paths[1])], timeout=300)
    exports = [export_checkpoint(find_checkpoint(tmp_path / n), tmp_path / f"{n}-hf") for n in ("whole", "broken")]
    assert main(["convert", "diff", *map(str, exports)]) == 1  # the recipes' names
    assert (exports[0] / "model.safetensors").read_bytes() == (exports[1] / "model.safetensors").read_bytes()
    losses = [[line["loss"] for line in read_metrics(tmp_path / n / "metrics.jsonl")] for n in ("whole", "broken")]
    assert losses[0] == losses[1]
