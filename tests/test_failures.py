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
from rim_dist.config import LoggingSection
from rim_dist.metrics import read_metrics
from rim_dist.training.lease import Lease
from rim_dist.training.metrics_log import MetricsLog

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


@pytest.mark.thorough
@pytest.mark.timeout(300)
def test_full_file_is_named_and_the_next_start_goes_on(tmp_path: Path) -> None:
    """The kernel's own /dev/full in the place of saves.jsonl; then the run ends with the bits of an undisturbed one."""
    paths = [write_recipe(tmp_path / f"{name}.yaml", tiny_recipe(tmp_path, run={"name": name})) for name in ("a", "b")]
    saves = tmp_path / "b" / "checkpoints" / "saves.jsonl"
    run("fork", 1, ["-m", "rim_dist", "train", str(paths[0])])
    run("fork", 1, ["-m", "rim_dist", "train", str(paths[1]), "--until", "stage1"])
    saves.unlink()
    saves.symlink_to("/dev/full")
    failed = run("fork", 1, ["-m", "rim_dist", "train", str(paths[1])], check=False)
    assert failed.returncode == 1
    assert re.search(rf"rim-dist: .* cannot be written \(No space left on device: {saves}; .* is kept; ", failed.stdout)
    assert "Traceback" not in failed.stdout
    saves.unlink()
    run("fork", 1, ["-m", "rim_dist", "train", str(paths[1])])
    exports = [(tmp_path / name / "hf" / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert exports[0] == exports[1]
    assert [line["step"] for line in read_metrics(tmp_path / "b" / "metrics.jsonl") if line["kind"] == "train"] == list(
        range(1, 9)
    )


def test_log_on_a_full_disk_names_its_file(tmp_path: Path) -> None:
    """Neither write nor fsync says of which file it speaks; what ends the run is the first error, and the lease is let go."""
    log = MetricsLog(tmp_path, LoggingSection(), 0, {})
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._file.fileno())
    for action in (lambda: log.write({"kind": "train", "step": 1}), log.close):
        with pytest.raises(OSError, match=r"metrics\.jsonl") as raised:
            action()
        assert raised.value.errno == errno.ENOSPC
    os.close(full)


def test_lease_that_cannot_be_removed_does_not_hide_why_the_run_ends(tmp_path: Path) -> None:
    """A run folder that has become a file: the owner ends, and says nothing of its lease."""
    lease = Lease(tmp_path / "run")
    lease.acquire()
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").touch()
    lease.release()
    assert (tmp_path / "moved" / "owner.json").exists()


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
