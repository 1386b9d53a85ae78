"""A console that is closed, knows few letters, or goes away: text is escaped, a training goes on or stops with its state."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ranks import ROOT, environment

from rim_dist.checkpoint.store import complete_checkpoints
from rim_dist.cli import main
from rim_dist.training.signals import handle_stop_signals

# Prints until long after the pipe's or the terminal's buffers are full, and then leaves a mark.
TALKS = """
    import pathlib, sys, time
    from rim_dist.messages import outlive_console, prepare_console, say
    prepare_console()
    outlive_console()
    for i in range(2000):
        print("x" * 100, "\\u0120")
        say("y" * 100)
        if i == 0:
            time.sleep(0.5)
    pathlib.Path(sys.argv[1]).write_text("went on")
"""


def _talk(mark: Path, **streams: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(TALKS), str(mark)], env=environment(), **streams)


@pytest.mark.parametrize("console", ["pipe", "terminal", "full disk"])
def test_what_nobody_reads_ends_nothing(console: str, tmp_path: Path) -> None:
    if console == "full disk":
        reader, writer = -1, os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe() if console == "pipe" else pty.openpty()
    process = _talk(tmp_path / "mark", stdout=writer, stderr=writer)
    os.close(writer)
    if reader >= 0:
        assert os.read(reader, 10) == b"x" * 10
        os.close(reader)
    assert process.wait(60) == 0
    assert (tmp_path / "mark").read_text() == "went on"


def test_closed_descriptors_are_not_taken_by_other_files(tmp_path: Path) -> None:
    """`>&- 2>&-`: what is printed must not come into the file that is opened next."""
    code = "from rim_dist.messages import *; prepare_console(); f = open({!r}, 'w'); print('out'); say('err'); f.write('own')"
    command = f'exec "$0" -c "$1" <&- >&- 2>&-; {sys.executable}'
    script = code.format(str(tmp_path / "file"))
    assert subprocess.run(["sh", "-c", command, sys.executable, script], env=environment(), check=False).returncode == 0
    assert (tmp_path / "file").read_text() == "own"


def test_letters_that_the_console_lacks_are_escaped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    print("\u0120und")
    out.flush()
    assert out.buffer.getvalue().endswith(b"\\u0120und\n")


def test_nohup_keeps_its_promise() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        earlier = handle_stop_signals(lambda *_: None)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        for number, handler in earlier.items():
            signal.signal(number, handler)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_training_outlives_its_reader_and_saves_on_a_hangup(recipe_file: Callable[..., Path], tmp_path: Path) -> None:
    """`train | head`, and then the terminal hangs up: nothing is saved before, all of it then."""
    stages = {"stage1": {"samples": 160_000, "learning_rate": 1e-3, "max_steps": 4}, "stage2": {"samples": 0}}
    path = recipe_file(curriculum=stages, checkpoint={"every_steps": 0})
    folder = tmp_path / "runs" / "tiny"
    process = subprocess.Popen(
        [sys.executable, "-m", "rim_dist", "train", str(path)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # noqa: PLW1509  # under nohup it is ignored
    )
    try:
        assert process.stdout is not None
        with process.stdout as reader:
            said = []
            while "step 1/" not in (said or [""])[-1]:
                said.append(next(reader, ""))
                assert said[-1], "".join(said)
        deadline = time.monotonic() + 60
        written = 0
        while written < 60:  # the next line of progress is that of step 10
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
            written = (folder / "metrics.jsonl").read_bytes().count(b"\n")
        assert not complete_checkpoints(folder / "checkpoints")
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 75
        assert complete_checkpoints(folder / "checkpoints")
    finally:
        process.kill()
        process.wait()
