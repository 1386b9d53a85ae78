"""What a command says, and the console it says it on, which may be closed, know few letters, or go away."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any

_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)  # a pipe that nobody reads, a terminal that has hung up


def say(text: str) -> None:
    """Write a line to stderr in one call. `print` writes an unbuffered line's end separately, so lines of ranks could mix."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def prepare_console() -> None:
    """Make standard output and error take any text: letters that their encoding lacks are escaped.

    A closed one is opened on nothing: the next file that the process opens would be in its place.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            setattr(sys, name, open(descriptor, "r" if name == "stdin" else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):  # a descriptor that has become a pipe since
                stream.reconfigure(errors="backslashreplace")


class _Descriptor(io.FileIO):
    """Standard output or error of a command that goes on without it: what cannot be written is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno in _GONE:
                with open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), self.fileno())  # for libraries too that write by themselves
            return memoryview(data).nbytes


def outlive_console() -> None:
    """Let the command go on where nobody reads its output any more (`train | head`), or its terminal is gone."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is getattr(sys, f"__{name}__") and isinstance(stream, io.TextIOWrapper):  # not what a caller put there
            with contextlib.suppress(OSError):
                stream.flush()
            file = io.BufferedWriter(_Descriptor(stream.fileno(), "w", closefd=False))
            setattr(sys, name, io.TextIOWrapper(file, stream.encoding, "backslashreplace", line_buffering=True))
