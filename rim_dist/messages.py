"""What a command says on stderr."""

from __future__ import annotations

import sys


def say(text: str) -> None:
    """Write a line to stderr in one call. `print` writes an unbuffered line's end separately, so lines of ranks could mix."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
