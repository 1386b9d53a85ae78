"""A rank's heartbeats and stack traces for the process that supervises it; does nothing without a supervisor."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal

HEARTBEAT_VARIABLE = "RIM_DIST_HEARTBEAT"  # FD:PID: a pipe, and the supervisor whose child has it open
STACKS_VARIABLE = "RIM_DIST_STACKS"  # the file that takes stack traces
STACKS_SIGNAL = signal.SIGUSR2


def dump_stacks_on_signal() -> None:
    """Write the stacks of all threads on STACKS_SIGNAL, also while the rank waits in a collective."""
    if path := os.environ.get(STACKS_VARIABLE):
        try:
            file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # faulthandler keeps writing to it
        except OSError:
            return
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)
        faulthandler.enable(file=file)


def send_heartbeat(what: str) -> None:
    """Tell the supervisor that the run has reached `what`. Processes of the rank's own have no such pipe, and say nothing."""
    descriptor, _, supervisor = os.environ.get(HEARTBEAT_VARIABLE, "").partition(":")
    if supervisor == str(os.getppid()):
        with contextlib.suppress(OSError):  # a full pipe has enough heartbeats in it
            os.write(int(descriptor), f"{what}\n".encode())
