"""SIGTERM, SIGINT and SIGUSR1 request a stop: the step is finished, the state saved, and the command ends with status 75."""

from __future__ import annotations

import signal
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Set by a signal to this rank; the ranks agree on it at a step boundary. A second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
