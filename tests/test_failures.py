"""A rank that raises or is killed in the middle of a backward pass ends the whole job soon, is named, and nothing is lost."""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from pathlib import Path

import pytest
from conftest import tiny_recipe, write_recipe
from ranks import run

from rim_dist.checkpoint.store import complete_checkpoints, find_checkpoint, read_state
from rim_dist.cli import main
from rim_dist.metrics import read_metrics

MOST_SECONDS = 60
HOST = socket.gethostname()


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_rank_that_fails_in_the_middle_of_a_backward(tmp_path: Path) -> None:
    """TP2 x SP2 on 4 ranks: rank 3 raises, then rank 1 is killed, then the run goes on to the end of its stage."""
    recipe = write_recipe(
        tmp_path / "r.yaml",
        tiny_recipe(
            tmp_path,
            run={"name": "r"},
            curriculum={"stage1": {"samples": 128, "learning_rate": 1e-3, "max_steps": 4}},
            parallel={"tensor": 2, "sequence": 2, "zero_stage": 3},
            checkpoint={"every_steps": 2},
        ),
    )
    failed_at = tmp_path / "failed_at"

    def start(fail: str) -> tuple[int, str, float]:
        """Exit status, what was said, seconds from the failure to the end."""
        done = run(
            "torchrun",
            4,
            ["tests/workers/failing_train.py", "train", str(recipe), "--until", "stage1"],
            check=False,
            RIM_TEST_FAIL=fail,
            RIM_TEST_FAILED_AT=str(failed_at),
        )
        return done.returncode, done.stdout, time.time() - float(failed_at.read_text())

    def newest_step() -> int:
        return read_state(find_checkpoint(tmp_path / "r")).step

    status, said, seconds = start("3:5:raise")
    print(f"raised: ended after {seconds:.1f} s")
    assert status
    assert seconds < MOST_SECONDS
    lines = re.findall(r"^(?:\w*Error|rim-dist): .*", said, re.MULTILINE)
    assert lines[:2] == ["ValueError: boom", "rim-dist: rank 3: failed; this is a bug or a fault of the machine"]
    assert sorted(lines[2:]) == [
        f"rim-dist: rank {rank}: lost a peer: rank 3 (host {HOST}) failed: ValueError: boom" for rank in range(3)
    ]
    assert newest_step() == 4

    status, said, seconds = start("1:2:kill")
    print(f"killed: ended after {seconds:.1f} s")
    assert status
    assert seconds < MOST_SECONDS
    assert "resumed from" in said
    for rank in (0, 2, 3):
        assert f"rim-dist: rank {rank}: lost a peer: rank 1 (host {HOST}) is gone: killed" in said
    assert newest_step() == 6

    status, said, _ = start("")
    assert status == 0, said
    assert [line["step"] for line in read_metrics(tmp_path / "r" / "metrics.jsonl")] == list(range(1, 9))
    assert newest_step() == 8
    assert len(complete_checkpoints(tmp_path / "r" / "checkpoints")) == 2


@pytest.mark.parametrize(
    ("number", "status", "message"),
    [
        (errno.EIO, 1, "Input/output error (m.jsonl); what was complete is kept; look at the file system and start"),
        (errno.ESTALE, 1, "look at the file system"),
        (errno.EROFS, 1, "Read-only file system (m.jsonl); what was complete is kept; make it writable and start"),
        (errno.ENOSPC, 1, "make room"),
        (errno.ENAMETOOLONG, 2, "File name too long (m.jsonl); choose a shorter name"),
    ],
)
def test_error_of_the_file_system_is_one_message(
    number: int, status: int, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number), "m.jsonl")

    monkeypatch.setattr("rim_dist.recipe.load_recipe", fail)
    assert main(["train", "r.yaml"]) == status
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
