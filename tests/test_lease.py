"""One owner for a run's folder: a second start is refused, a lost owner is followed, a frozen one writes nothing more."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from forked import start_forked
from ranks import environment, run

from rim_dist.checkpoint.store import complete_checkpoints
from rim_dist.errors import ConfigError, Superseded
from rim_dist.training import lease
from rim_dist.training.lease import OWNER, Lease

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_TOUCH_SECONDS", 0.05)
    monkeypatch.setattr(lease, "_LOOK_SECONDS", 0.1)


def test_owner_that_lives_is_named(tmp_path: Path) -> None:
    owner = Lease(tmp_path / "run")
    owner.acquire()
    owner.check()
    with pytest.raises(ConfigError, match=rf"process {os.getpid()} on \S+ runs it; stop that one, or choose another run.name"):
        Lease(tmp_path / "run", 5).acquire()
    owner.check()
    owner.release()
    assert list((tmp_path / "run").iterdir()) == []
    Lease(tmp_path / "run").acquire()


@pytest.mark.parametrize("where", ["another machine", "not written"])
def test_silent_owner_is_followed_after_the_stated_time(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    identity = {"host": "n7", "machine": "other", "pid": 12, "start_time": "3", "job": "17"}
    (tmp_path / OWNER).write_text(json.dumps(identity) if where == "another machine" else "")
    (tmp_path / "checkpoints" / "step-00000003.partial").mkdir(parents=True)
    began = time.monotonic()
    Lease(tmp_path, 0.5).acquire()
    assert time.monotonic() - began > 0.5
    assert not list((tmp_path / "checkpoints").iterdir())
    if where == "another machine":
        assert "process 12 on n7 (job 17), which gave no sign for 0.5 s" in capsys.readouterr().err


def test_job_that_slurm_restarted_follows_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the first start may still be seen: SLURM has given its node up."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    old = Lease(tmp_path)
    old.acquire()
    with pytest.raises(ConfigError, match=r"\(job 17\) runs it"):  # another step of the same start
        Lease(tmp_path, 5).acquire()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    Lease(tmp_path, 5).acquire()
    with pytest.raises(Superseded):
        old.check()


def test_superseded_owner_notices_and_touches_nothing(tmp_path: Path) -> None:
    old = Lease(tmp_path)
    old.acquire()
    old._released.set()  # frozen: it touches no more
    new = Lease(tmp_path, 0.3)
    new.acquire()
    before = (tmp_path / OWNER).read_bytes()
    with pytest.raises(Superseded, match="another start has taken over"):
        old.check()
    old.release()
    new.check()
    assert (tmp_path / OWNER).read_bytes() == before


def test_two_that_take_over_at_once_leave_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one whose file is replaced is told so, and lets go of nothing that is the other's."""
    (tmp_path / OWNER).write_text("")
    first, second = Lease(tmp_path, 0.2), Lease(tmp_path, 0.2)
    take_over = first._take_over

    def beaten() -> None:
        take_over()
        second._take_over()

    monkeypatch.setattr(first, "_take_over", beaten)
    with pytest.raises(ConfigError, match="another start has become its owner at the same moment"):
        first.acquire()
    first.release()
    second.check()


def test_folder_that_is_gone_is_not_written_again(tmp_path: Path) -> None:
    owner = Lease(tmp_path / "run")
    owner.acquire()
    (tmp_path / "run" / OWNER).unlink()
    with pytest.raises(Superseded):
        owner.check()


# ---- whole runs ------------------------------------------------------------------------------------------------


def _start(path: Path, output: Path, *target: str) -> BaseProcess:
    output.touch()
    (process,) = start_forked([[*(target or ("-m", "rim_dist", "train")), str(path)]], environment(), [str(output)])
    return process


def _until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def long(recipe_file: Make) -> Path:
    stages = {"stage1": {"samples": 160_000, "learning_rate": 1e-3, "max_steps": 4}, "stage2": {"samples": 0}}
    return recipe_file(curriculum=stages, checkpoint={"every_steps": 5})


def test_second_start_is_refused_and_the_first_goes_on(long: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    first = _start(long, tmp_path / "first")
    try:
        _until(lambda: len(complete_checkpoints(folder / "checkpoints")) > 0)
        second = run("fork", 1, ["-m", "rim_dist", "train", str(long)], check=False)
        assert second.returncode == 2
        assert f"process {first.pid} on " in second.stdout
        assert "runs it; stop that one, or choose another run.name" in second.stdout
        assert "step" not in second.stdout.partition("runs it")[2]
        assert first.is_alive()
        os.kill(first.pid or 0, signal.SIGTERM)
        first.join(60)
        assert first.exitcode == 75
        assert not (folder / OWNER).exists()
    finally:
        first.kill()


def test_killed_owner_is_followed_at_once(long: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "tiny"
    first = _start(long, tmp_path / "first")
    _until(lambda: len(complete_checkpoints(folder / "checkpoints")) > 0)
    first.kill()
    first.join()
    assert (folder / OWNER).exists()
    second = _start(long, tmp_path / "second")
    try:
        _until(lambda: "resumed from" in (tmp_path / "second").read_text())
        assert "waiting for a sign" not in (tmp_path / "second").read_text()
    finally:
        second.kill()
        second.join()


@pytest.mark.thorough
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_frozen_owner_that_thaws_writes_nothing_more(long: Path, tmp_path: Path, seed: int, background: bool) -> None:
    """Stopped at a random moment of steps and saves, taken over, and let go on when the new owner has gone on and ended."""
    folder, target = tmp_path / "runs" / "tiny", "tests/workers/short_lease.py"
    long.write_text(long.read_text().replace("every_steps: 5", f"every_steps: 2\n  background: {str(background).lower()}"))
    first = _start(long, tmp_path / "first", target)
    second = None
    try:
        _until(lambda: len(complete_checkpoints(folder / "checkpoints")) > 0)
        time.sleep(random.Random(seed).random())
        os.kill(first.pid or 0, signal.SIGSTOP)
        second = _start(long, tmp_path / "second", target)
        _until(lambda: "resumed from" in (tmp_path / "second").read_text(), 120)
        assert "which gave no sign for 2 s" in (tmp_path / "second").read_text()
        os.kill(second.pid or 0, signal.SIGTERM)
        second.join(60)
        assert second.exitcode == 75
        before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
        os.kill(first.pid or 0, signal.SIGCONT)
        first.join(60)
        assert first.exitcode == 2
        assert "another start has taken over this run" in (tmp_path / "first").read_text()
        assert "Traceback" not in (tmp_path / "first").read_text()
        assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")} == before
    finally:
        for process in (first, second):
            if process is not None:
                process.kill()
