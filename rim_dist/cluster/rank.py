"""The process around a rank: `python -m rim_dist.cluster.rank train RECIPE ...`, started by any launcher.

It starts `rim-dist` with the same arguments and stays outside of it: whatever state the rank is in, somebody still writes
its log with UTC, host and rank, hands signals on, notices that no step is done any more, takes stack traces and says how
the rank ended.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
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
from rim_dist.errors import EXIT_DONE, EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_USAGE
from rim_dist.parallel.environment import cores_of_rank, host_name, rank_environment, read_rank_info
from rim_dist.training.heartbeat import HEARTBEAT_VARIABLE, STACKS_SIGNAL, STACKS_VARIABLE

_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_POLL_SECONDS = 1.0
_STACKS_SECONDS = 10.0  # between asking for stacks and ending the rank: the others ask theirs in this time
_LAST_WORDS_SECONDS = 5.0


def _prepare_rank() -> None:
    """In the rank's process: it goes when this one does, and USR1 does nothing to it as long as it has no handler for it."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


class RankSupervisor:
    """A rank and what is known about it."""

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
        self._prefix = f" {host_name()} {self.info.rank}| ".encode()
        self._hung = self._answered = self._stopping = self._superseded = False
        self._beat_time, self._last_beat, self._steps = time.monotonic(), "the start", False
        beats, beat_end = os.pipe()
        environment.update(rank_environment(self.info, environment))
        environment[HEARTBEAT_VARIABLE] = str(beat_end)
        if self.attempt is not None:
            environment[STACKS_VARIABLE] = str(self._stacks)
        fcntl.fcntl(beat_end, fcntl.F_SETFL, os.O_NONBLOCK)
        with contextlib.suppress(OSError, AttributeError):
            os.sched_setaffinity(0, cores_of_rank(self.info, os.sched_getaffinity(0)))
        inherited = [beat_end]
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
        os.close(beat_end)
        assert self.child.stdout is not None
        self._output, self._beats = self.child.stdout.fileno(), beats
        self._selector = selectors.DefaultSelector()
        for descriptor in (self._output, self._beats):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ)
        self._rest = b""
        for number in _FORWARDED:
            signal.signal(number, self._forward)
        self.say(f"rank {self.info.rank} of {self.info.ranks} is process {self.child.pid}")  # many ranks say nothing else

    # ---- what it says --------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        self._write(f"rim-dist: {text}".encode())

    def _write(self, line: bytes) -> None:
        for secret in self._secrets:
            line = line.replace(secret, b"***")
        now = utc_now()
        line = f"{now:%Y-%m-%dT%H:%M:%S}.{now.microsecond // 1000:03d}Z".encode() + self._prefix + line + b"\n"
        # A log that cannot be written (a full disk, nobody reading) is no reason to end a run.
        with contextlib.suppress(OSError):
            if self._log is not None:
                self._log.write(line)
        with contextlib.suppress(OSError):
            os.write(1, line)

    def _take(self, seconds: float) -> None:
        """Read what the rank says and its signs of life, for at most so long."""
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
                self._beat_time = time.monotonic()
                self._last_beat = data.decode(errors="replace").strip().rpartition("\n")[2]
                self._steps = True

    # ---- what it does --------------------------------------------------------------------------------

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(number)
        self._stopping = True

    def _asked_to_stop(self) -> None:
        """The first rank looks for the job's wish to stop; the ranks agree on it among themselves.

        It is repeated until the rank ends: one that is still loading has nothing that would hear it.
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
            # A node that SLURM gave up goes on running what it has; two starts must not write the same folder.
            self.say(f"{owner} has taken over this run's folder; this start ends at once")
            self._superseded = True
            self.child.kill()

    def _look(self) -> None:
        silent = time.monotonic() - self._beat_time
        if self._hung or silent < (self._limit if self._steps else self._first_limit):
            return
        self._hung = True
        self.say(f"hang: no sign for {silent:.0f} s since {self._last_beat}; writing stack traces, then ending the rank")
        before = self._stack_bytes()
        with contextlib.suppress(ProcessLookupError):
            self.child.send_signal(STACKS_SIGNAL)
        end = time.monotonic() + _STACKS_SECONDS
        while time.monotonic() < end and self.child.poll() is None:
            self._take(0.5)
        self._answered = self._stack_bytes() > before
        if not self._answered:
            self.say(f"the rank does not answer; the kernel says: {_kernel_state(self.child.pid)}")
        self.child.kill()

    def _stack_bytes(self) -> int:
        try:
            return self._stacks.stat().st_size
        except OSError:
            return 0

    def run(self) -> int:
        """Until the rank has ended; returns its exit status as the command line defines it."""
        looked = time.monotonic()
        while self.child.poll() is None:
            self._take(_POLL_SECONDS)
            if time.monotonic() - looked >= _POLL_SECONDS:
                looked = time.monotonic()
                self._asked_to_stop()
                self._look()
        end = time.monotonic() + _LAST_WORDS_SECONDS
        while self._output in self._selector.get_map() and time.monotonic() < end:
            self._take(0.2)
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
        """Exit status, why, and whether the node is to be suspected."""
        code = self.child.returncode
        if self._hung:
            return EXIT_TRY_AGAIN, f"hang since {self._last_beat}", not self._answered
        if self._superseded:
            return EXIT_TRY_AGAIN, "another start has taken over", False
        if code < 0:
            name = signal.Signals(-code).name
            asked = -code in _FORWARDED
            return EXIT_TRY_AGAIN, "stopped before it had something to save" if asked else f"killed by {name}", not asked
        reasons = {
            EXIT_DONE: "done",
            EXIT_FAILED: "failed",
            EXIT_USAGE: "what was given is wrong",
            EXIT_TRY_AGAIN: "start again",
        }
        return (code, reasons[code], False) if code in reasons else (EXIT_FAILED, f"unknown exit status {code}", False)


def _kernel_state(pid: int) -> str:
    """State and waiting place of a process that does not answer."""
    parts = []
    for name in ("status", "wchan"):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8")
            parts.append(next((line for line in text.splitlines() if line.startswith("State:")), text.strip() or "-"))
    return ", ".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if argv is None else list(argv)
    return RankSupervisor([a for a in arguments if not a.startswith("--local_rank=")]).run()


if __name__ == "__main__":
    sys.exit(main())
