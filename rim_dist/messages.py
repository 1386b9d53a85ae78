"""What a command says on stderr."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """One whole line on stderr, in one write: ranks share it, and `print` writes an unbuffered line's end on its own."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
