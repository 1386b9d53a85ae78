"""`rim-dist train` that is killed before a function of the trainer's module (RIM_TEST_FUNCTION) is called the n-th time."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import rim_dist.training.trainer as trainer
from rim_dist.cli import main

if __name__ == "__main__":
    name, calls = os.environ["RIM_TEST_FUNCTION"].split(":")
    real, left = getattr(trainer, name), [int(calls)]

    def count(*arguments: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)

    setattr(trainer, name, count)
    sys.exit(main(["train", *sys.argv[1:]]))
