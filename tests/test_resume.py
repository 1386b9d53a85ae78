"""Killed at any moment, or asked to stop: the run goes on and ends bit for bit where one never stopped does."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe, write_recipe
from forked import start_forked
from ranks import ROOT, command, environment, run
from safetensors.torch import load_file
from states import trained_weights

from rim_dist.checkpoint.store import complete_checkpoints, find_checkpoint, read_state
from rim_dist.metrics import read_metrics


def long_recipe(folder: Path, name: str, steps: int = 351) -> dict:
    """Short steps over both stages, dropout on, a checkpoint every seven steps, evaluations between."""
    samples = 8 * steps
    return tiny_recipe(
        folder,
        run={"name": name},
        curriculum={
            "stage1": {"samples": samples, "learning_rate": 1e-3, "max_steps": 4, "attention_dropout": 0.1},
            "stage2": {"samples": samples - 8, "learning_rate": 5e-4, "attention_dropout": 0.2},
        },
        model={"config": {**tiny_recipe(folder)["model"]["config"], "attention_dropout": 0.1}},
        data={"synthetic": {"samples": 700, "min_steps": 1, "max_steps": 4}},
        parallel={"zero_stage": 3},
        checkpoint={"every_steps": 7},
        evaluation={"every_steps": 40},
    )


def same_weights(a: Path, b: Path) -> None:
    left, right = load_file(a / "hf" / "model.safetensors"), load_file(b / "hf" / "model.safetensors")
    assert left.keys() == right.keys()
    for name in left:
        assert torch.equal(left[name], right[name]), name


def steps_of(folder: Path) -> list[tuple[str, int]]:
    return [(line["kind"], line["step"]) for line in read_metrics(folder / "metrics.jsonl")]


@pytest.mark.thorough
@pytest.mark.timeout(900)
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    whole = write_recipe(tmp_path / "whole.yaml", long_recipe(tmp_path, "whole"))
    killed = write_recipe(tmp_path / "killed.yaml", long_recipe(tmp_path, "killed"))
    run("fork", 1, ["-m", "rim_dist", "train", str(whole)])
    pick = random.Random(time.time_ns())
    lines: list[int] = []
    for kill in range(10):
        process = subprocess.Popen(
            command("python", 1, ["-m", "rim_dist", "train", str(killed)]),
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        # Two kills at any moment of the start, the others at any moment after some more steps.
        goal = 0 if kill in (3, 7) else len(steps_of(tmp_path / "killed")) + pick.randint(1, 30)
        deadline = time.monotonic() + 60
        while len(steps_of(tmp_path / "killed")) < goal and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(pick.uniform(0, 4 if kill in (3, 7) else 0.05))
        assert process.poll() is None, "the run ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        lines.append(len(steps_of(tmp_path / "killed")))
    print("lines written at each kill:", lines)
    run("fork", 1, ["-m", "rim_dist", "train", str(killed)])
    same_weights(tmp_path / "whole", tmp_path / "killed")
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole")


@pytest.mark.timeout(300)
def test_a_run_in_two_halves_is_the_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--until stage1` saves and ends there; the same command without it goes on to the same parameters."""
    from rim_dist.cli import main

    whole, halves = (write_recipe(tmp_path / f"{n}.yaml", tiny_recipe(tmp_path, run={"name": n})) for n in ("whole", "halves"))
    run("fork", 1, ["-m", "rim_dist", "train", str(whole)])
    run("fork", 1, ["-m", "rim_dist", "train", str(halves), "--until", "stage1"])
    state = read_state(find_checkpoint(tmp_path / "halves"))
    assert (state.stage, state.step, state.finished) == ("stage1", 4, False)
    assert not (tmp_path / "halves" / "hf").exists()
    run("fork", 1, ["-m", "rim_dist", "train", str(halves)])
    same_weights(tmp_path / "whole", tmp_path / "halves")
    assert steps_of(tmp_path / "halves") == steps_of(tmp_path / "whole")
    assert main(["train", str(whole), "curriculum.stage1.samples=0", "--until", "stage1"]) == 2
    assert "the recipe leaves this stage out" in capsys.readouterr().err


@pytest.mark.timeout(300)
def test_signal_stops_all_ranks_and_the_run_goes_on(tmp_path: Path) -> None:
    """Two ranks: SIGTERM to one of them; both finish the step, save and end with 75; then the run is completed."""
    whole = write_recipe(tmp_path / "whole.yaml", long_recipe(tmp_path, "whole", 61))
    stopped = write_recipe(tmp_path / "stopped.yaml", long_recipe(tmp_path, "stopped", 61))
    run("fork", 2, ["tests/workers/train_many.py", str(whole)])
    with two_ranks(stopped) as (ranks, outputs):
        _wait_for_steps(tmp_path / "stopped", 12, ranks)
        ranks[1].terminate()
        for process in ranks:
            process.join(60)
        assert [process.exitcode for process in ranks] == [75, 75], [output.read_text() for output in outputs]
    assert "stopped by a signal after step" in outputs[0].read_text()
    run("fork", 2, ["-m", "rim_dist", "train", str(stopped)])
    same_weights(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.timeout(300)
def test_lost_rank_ends_the_other_in_time(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "lost.yaml", long_recipe(tmp_path, "lost"))
    with two_ranks(recipe) as (ranks, outputs):
        _wait_for_steps(tmp_path / "lost", 12, ranks)
        ranks[1].kill()
        ranks[0].join(60)
        assert ranks[0].exitcode == 75, outputs[0].read_text()
    assert f"rank 0: lost a peer: rank 1 (host {socket.gethostname()}) is gone: killed" in outputs[0].read_text()
    assert complete_checkpoints(tmp_path / "lost" / "checkpoints")


@pytest.mark.timeout(300)
def test_checkpoint_that_cannot_be_written_keeps_the_last(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """Writes fail as on a full disk (a limit on file sizes): a message, status 1, no half checkpoint, and the run goes on."""
    path = recipe_file()
    result = run("fork", 1, ["tests/workers/small_files.py", str(path)], check=False, RIM_TEST_RANK="0")
    assert result.returncode == 1, result.stdout
    assert "the checkpoint of step 3 cannot be written" in result.stdout
    assert "Traceback" not in result.stdout
    assert not list((tmp_path / "runs" / "tiny" / "checkpoints").iterdir())
    run("fork", 1, ["-m", "rim_dist", "train", str(path)])
    assert (tmp_path / "runs" / "tiny" / "hf" / "config.json").is_file()


@pytest.mark.parametrize(
    ("function", "step", "said"),
    [
        ("block_answers:2", 6, "resumed from"),  # the evaluation after step 6
        ("block_answers:3", 8, "step 8: "),  # the last one
        ("export_checkpoint:1", 8, "done: "),
    ],
)
def test_killed_in_an_evaluation_or_export_does_what_is_left(
    recipe_file: Callable[..., Path], tmp_path: Path, function: str, step: int, said: str
) -> None:
    """Of 8 steps with evaluations after 3, 6 and 8: no step is run twice, and every evaluation is there once."""
    path, folder = recipe_file(evaluation={"samples": 8, "max_new_tokens": 3, "every_steps": 3}), tmp_path / "runs" / "tiny"
    killed = run("fork", 1, ["tests/workers/die_in.py", str(path)], check=False, RIM_TEST_FUNCTION=function)
    assert killed.returncode == -signal.SIGKILL
    assert read_state(find_checkpoint(folder)).step == step
    before = steps_of(folder)
    again = run("fork", 1, ["-m", "rim_dist", "train", str(path)]).stdout
    assert said in again
    assert steps_of(folder)[: len(before)] == before
    evaluations = [number for kind, number in steps_of(folder) if kind == "evaluation"]
    assert evaluations == [3, 6, 8]
    assert [number for kind, number in steps_of(folder) if kind == "train"] == list(range(1, 9))
    assert json.loads((folder / "report" / "evaluation.json").read_text())["step"] == 8
    if function.startswith("export"):
        assert "step 8: " not in again
    scores = json.loads((folder / "checkpoints" / "scores.json").read_text())
    assert "accuracy" in scores[f"step-{step:08d}"]


@contextmanager
def two_ranks(recipe: Path) -> Iterator[tuple[list[BaseProcess], list[Path]]]:
    """A training on two ranks, killed at the end if it still runs: its processes, and the files of what they say."""
    outputs = [recipe.with_suffix(f".rank-{rank}") for rank in range(2)]
    target = ["-m", "rim_dist", "train", str(recipe)]
    ranks = start_forked([target] * 2, environment(), [str(output) for output in outputs])
    try:
        yield ranks, outputs
    finally:
        for process in ranks:
            process.kill()
            process.join()


def _wait_for_steps(folder: Path, steps: int, processes: list[BaseProcess]) -> None:
    deadline = time.monotonic() + 90
    while len(steps_of(folder)) < steps:
        assert time.monotonic() < deadline, "no steps"
        for process in processes:
            assert process.is_alive(), "ended before it was disturbed"
        time.sleep(0.05)


@pytest.mark.timeout(300)
def test_damaged_and_half_checkpoints_are_passed_over(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """A truncated newest checkpoint and a half-written one: resume takes the last good one and ends the same."""
    from rim_dist.cli import main

    path = recipe_file(checkpoint={"keep": 5})
    run("fork", 1, ["-m", "rim_dist", "train", str(path)])
    folder = tmp_path / "runs" / "tiny"
    reference = trained_weights(find_checkpoint(folder))
    checkpoints = complete_checkpoints(folder / "checkpoints")
    assert [read_state(c).step for c in checkpoints] == [3, 4, 6, 8]
    (folder / "checkpoints" / "step-00000009.partial").mkdir()
    victim = next((checkpoints[-1] / "engine").glob("*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:100])
    (checkpoints[-2] / "state.json").unlink()
    for leftover in ("hf", "report"):
        subprocess.run(["rm", "-r", str(folder / leftover)], check=True)
    assert read_state(find_checkpoint(folder)).step == 4
    output = run("fork", 1, ["-m", "rim_dist", "train", str(path)]).stdout
    assert "resumed from" in output
    again = trained_weights(find_checkpoint(folder))
    assert all(torch.equal(reference[name], again[name]) for name in reference)
    assert json.loads((folder / "checkpoints" / find_checkpoint(folder).name / "state.json").read_text())["finished"]
    assert main(["train", str(path)]) == 0
