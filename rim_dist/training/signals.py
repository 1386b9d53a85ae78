"""Signals that request a stop: the step is finished, the state saved, and the command ends with status 75."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)  # SIGHUP: the terminal has hung up


def handle_stop_signals(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Install a handler for STOP_SIGNALS; returns the earlier ones. Under `nohup` SIGHUP stays ignored."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return {n: signal.signal(n, handler) for n in STOP_SIGNALS if not (ignored and n == signal.SIGHUP)}


class StopRequest:
    """Set by a signal to this rank; the ranks agree on it at a step boundary. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before = handle_stop_signals(self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
