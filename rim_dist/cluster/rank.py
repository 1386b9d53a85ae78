"""The supervisor of a rank: `python -m rim_dist.cluster.rank train RECIPE ...`, started by any launcher.

It runs `rim-dist` with the same arguments as a child process. Whatever state the rank is in, its supervisor writes the log with
UTC, host and rank, forwards signals, notices that no step ends any more, takes stack traces and records how the rank ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rim_dist.cluster.attempts import CURRENT, is_secret, record_end, utc_now
from rim_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_USAGE, RimError
from rim_dist.heartbeat import HEARTBEAT_VARIABLE, STACKS_SIGNAL, STACKS_VARIABLE
from rim_dist.messages import say
from rim_dist.parallel.environment import cores_of_rank, host_name, rank_environment, read_rank_info
from rim_dist.training.signals import STOP_SIGNALS, handle_stop_signals

_POLL_SECONDS = 1.0
_STACKS_SECONDS = 10.0  # between the request for stacks and the end of the rank: time for the other ranks' stacks
_OUTPUT_SECONDS = 5.0  # to read what the rank wrote before it ended


def _prepare_rank() -> None:
    """In the rank's process: it is killed when its supervisor ends, and USR1 is ignored until the rank sets a handler."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # 1: PR_SET_PDEATHSIG
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class RankSupervisor:
    """A rank's process and what is known about it."""

    def __init__(self, argv: Sequence[str]) -> None:
        environment = dict(os.environ)
        self.info = read_rank_info(environment)
        self.attempt = Path(environment["RIM_ATTEMPT"]) if environment.get("RIM_ATTEMPT") else None
        self._stacks = (self.attempt or Path()) / f"stacks-rank-{self.info.rank:05d}.txt"
        self._limit = 60 * float(environment.get("RIM_HANG_MINUTES") or 20)
        self._first_limit = 60 * float(environment.get("RIM_START_MINUTES") or 60)
        self._secrets = [v.encode() for k, v in environment.items() if is_secret(k) and len(v) >= 8]
        self._log = None
        if self.attempt is not None:
            with contextlib.suppress(OSError):
                self._log = (self.attempt / f"rank-{self.info.rank:05d}.log").open("ab", buffering=0)
        self._prefix = f"Z {host_name()} {self.info.rank}| ".encode()
        self._hung = self._dumped_stacks = self._stopping = self._superseded = False
        self._last_heartbeat, self._heartbeat_time, self._has_steps = "the start", time.monotonic(), False
        heartbeats, heartbeat_end = os.pipe()
        environment.update(rank_environment(self.info, environment))
        environment[HEARTBEAT_VARIABLE] = f"{heartbeat_end}:{os.getpid()}"
        if self.attempt is not None:
            environment[STACKS_VARIABLE] = str(self._stacks)
        os.set_blocking(heartbeat_end, False)
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setaffinity(0, cores_of_rank(self.info, os.sched_getaffinity(0)))
        inherited = [heartbeat_end]
        if environment.get("PMI_FD", "").isdigit():  # srun --mpi=pmi2 talks over an open descriptor
            inherited.append(int(environment["PMI_FD"]))
        self.child = subprocess.Popen(
            [sys.executable, "-m", "rim_dist", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            pass_fds=inherited,
            preexec_fn=_prepare_rank,  # noqa: PLW1509  # this process has no threads
        )
        os.close(heartbeat_end)
        assert self.child.stdout is not None
        self._output, self._rest = self.child.stdout.fileno(), b""
        self._selector = selectors.DefaultSelector()
        for descriptor in (self._output, heartbeats):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ)
        handle_stop_signals(self._forward)
        self.say(f"rank {self.info.rank} of {self.info.ranks} is process {self.child.pid}")  # many ranks print nothing else

    # ---- output --------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self._write(f"rim-dist: {text}".encode())

    def _write(self, line: bytes) -> None:
        for secret in self._secrets:
            line = line.replace(secret, b"***")
        time_stamp = utc_now().isoformat(timespec="milliseconds").removesuffix("+00:00")
        line = time_stamp.encode() + self._prefix + line + b"\n"
        # A log that cannot be written (a full disk, nobody reading) is no reason to end a run.
        with contextlib.suppress(OSError):
            if self._log is not None:
                self._log.write(line)
        with contextlib.suppress(OSError):
            os.write(1, line)

    def _read(self, seconds: float) -> None:
        """Wait for the rank's output and heartbeats, at most so long, and read what is there."""
        for key, _ in self._selector.select(seconds):
            try:
                data = os.read(key.fd, 65536)
            except BlockingIOError:
                continue
            if not data:
                self._selector.unregister(key.fd)
            elif key.fd == self._output:
                *lines, self._rest = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
                for line in lines:
                    self._write(line)
            else:
                self._last_heartbeat = data.decode(errors="replace").strip().rpartition("\n")[2]
                self._heartbeat_time, self._has_steps = time.monotonic(), True

    # ---- stop and hang -------------------------------------------------------------------------------

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(number)
        self._stopping = True

    def _check_stop_request(self) -> None:
        """Forward the job's stop request to the first rank, and end it if another attempt owns the run's folder.

        The ranks agree on a stop among themselves. The request is repeated until the rank ends: a loading rank has no handler.
        """
        if self.attempt is None or self.info.rank != 0:
            return
        if not self._stopping and (self.attempt / "stop").exists():
            self.say("the job asks to stop; the step is finished and saved first")
            self._stopping = True
        if self._stopping:
            self._forward(signal.SIGUSR1, None)
        try:
            owner = (self.attempt.parent / CURRENT).read_text(encoding="utf-8").strip()
        except OSError:
            return
        if owner and owner != self.attempt.name:
            # A node that SLURM gave up keeps running its processes; two attempts must not write the same folder.
            self.say(f"{owner} has taken over this run's folder; this start ends at once")
            self._superseded = True
            self.child.kill()

    def _check_hang(self) -> None:
        silent = time.monotonic() - self._heartbeat_time
        if self._hung or silent < (self._limit if self._has_steps else self._first_limit):
            return
        self._hung = True
        self.say(f"hang: no sign for {silent:.0f} s since {self._last_heartbeat}; writing stack traces, then ending the rank")
        before = self._stack_bytes()
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(STACKS_SIGNAL)
        end = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < end and self.child.poll() is None:
            self._read(0.5)
        self._dumped_stacks = self._stack_bytes() > before
        if not self._dumped_stacks:
            self.say(f"the rank does not answer; the kernel says: {_kernel_state(self.child.pid)}")
        self.child.kill()

    def _stack_bytes(self) -> int:
        try:
            return self._stacks.stat().st_size
        except OSError:
            return 0

    def run(self) -> int:
        """Supervise the rank until it has ended; returns its exit status as the command line defines it."""
        looked = time.monotonic()
        while self.child.poll() is None:
            self._read(_POLL_SECONDS)
            if time.monotonic() - looked >= _POLL_SECONDS:
                looked = time.monotonic()
                self._check_stop_request()
                self._check_hang()
        end = time.monotonic() + _OUTPUT_SECONDS
        while self._output in self._selector.get_map() and time.monotonic() < end:
            self._read(0.2)
        if self._rest:
            self._write(self._rest)
        if not self._stack_bytes() and self.attempt is not None:
            with contextlib.suppress(OSError):
                self._stacks.unlink()
        status, why, suspect = self._ending()
        if status != EXIT_DONE:
            self.say(f"rank {self.info.rank} on {host_name()} ended with {status}: {why}")
            if self.attempt is not None:
                record_end(self.attempt, self.info.rank, status, why, suspect)
        return status

    def _ending(self) -> tuple[int, str, bool]:
        """Exit status, reason, and whether the rank's node is suspect."""
        code = self.child.returncode
        if self._hung:
            return EXIT_TRY_AGAIN, f"hang since {self._last_heartbeat}", not self._dumped_stacks
        if self._superseded:
            return EXIT_USAGE, "another start has taken over", False
        if code < 0:
            name = signal.Signals(-code).name
            stopped = -code in STOP_SIGNALS
            return EXIT_TRY_AGAIN, "stopped before it had something to save" if stopped else f"killed by {name}", not stopped
        reasons = {
            EXIT_DONE: "done",
            EXIT_FAILED: "failed",
            EXIT_USAGE: "what was given is wrong",
            EXIT_TRY_AGAIN: "start again",
        }
        return (code, reasons[code], False) if code in reasons else (EXIT_FAILED, f"unknown exit status {code}", False)


def _kernel_state(pid: int) -> str:
    """State of a process that does not answer, and the kernel function in which it waits."""
    found = []
    for name in ("status", "wchan"):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8")
            found.append(next((line for line in text.splitlines() if line.startswith("State:")), text.strip() or "-"))
    return ", ".join(found)


def main(argv: Sequence[str]) -> int:
    try:
        return RankSupervisor(argv).run()
    except RimError as error:
        say(f"rim-dist: {error}")
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
