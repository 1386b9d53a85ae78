"""Signs of life to whoever watches a rank from outside, and its stack traces when asked. Nothing where nobody watches."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal

HEARTBEAT_VARIABLE = "RIM_DIST_HEARTBEAT_FD"  # a pipe of the process that watches
STACKS_VARIABLE = "RIM_DIST_STACKS"  # the file that takes stack traces
STACKS_SIGNAL = signal.SIGUSR2


def dump_stacks_on_signal() -> None:
    """Write the stacks of all threads when STACKS_SIGNAL comes, also from a rank that waits in a collective."""
    if path := os.environ.get(STACKS_VARIABLE):
        try:
            file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # faulthandler keeps writing to it
        except OSError:
            return
        faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)
        faulthandler.enable(file=file)


def send_heartbeat(what: str) -> None:
    """Say that the run has come to `what`."""
    if descriptor := os.environ.get(HEARTBEAT_VARIABLE):
        with contextlib.suppress(OSError):  # a full pipe has enough signs in it
            os.write(int(descriptor), f"{what}\n".encode())
