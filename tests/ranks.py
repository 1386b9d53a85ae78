"""Start real ranks with the real launchers, with a time limit, and show what they said if they fail."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(launcher: str, ranks: int, target: Sequence[str]) -> list[str]:
    """The command line that starts `target` (`-m module` or a script, with arguments) on so many ranks."""
    if launcher == "python":
        return [sys.executable, *target]
    if launcher == "torchrun":
        return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), "--master_port", str(free_port()), *target]
    if launcher == "deepspeed":
        module = ["--module"] if target[0] == "-m" else []
        rest = list(target[1:]) if module else list(target)
        return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()), *module, *rest]
    if launcher == "mpirun":
        root = ["--allow-run-as-root"] if os.getuid() == 0 else []
        return [str(BIN / "mpirun"), *root, "--oversubscribe", "-n", str(ranks), sys.executable, *target]
    raise ValueError(launcher)


def environment(**extra: str) -> dict[str, str]:
    """This process's environment without another launcher's variables and without coverage, which makes ranks half as fast."""
    clean = {k: v for k, v in os.environ.items() if k not in LAUNCHER_VARIABLES and not k.startswith("COVERAGE_")}
    path = f"{BIN}{os.pathsep}{clean.get('PATH', '')}"
    return {**clean, "PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "DS_ACCELERATOR": "cpu", **extra}


def run(
    launcher: str, ranks: int, target: Sequence[str], timeout: float = 240, check: bool = True, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run to the end; all are killed at the time limit. `launcher`: one of `command`, or `fork` where none is tested."""
    if launcher == "fork":
        from forked import run_forked

        status, output = run_forked(ranks, target, timeout, environment(**extra))
    else:
        process = subprocess.Popen(
            command(launcher, ranks, target),
            cwd=ROOT,
            env=environment(**extra),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = process.communicate(timeout=timeout)
            status = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            status = None
    if status is None:
        raise AssertionError(f"{launcher} x {ranks} did not end in {timeout} s:\n{output[-4000:]}")
    if check and status:
        raise AssertionError(f"{launcher} x {ranks} ended with {status}:\n{output[-4000:]}")
    return subprocess.CompletedProcess(list(target), status, output)
