"""`rim-dist train` with a rank that raises, or is killed, in the middle of a backward pass: RIM_TEST_FAIL=RANK:STEP:how."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rim_dist.cli import main
from rim_dist.training.engine import Engine

_forward_backward, _step = Engine.forward_backward, Engine.step
_steps = 0


def forward_backward(self: Engine, *arguments: Any, **keywords: Any) -> Any:
    rank, step, how = os.environ["RIM_TEST_FAIL"].split(":")
    if os.environ["RANK"] == rank and _steps == int(step):

        def fail(_gradient: Any) -> None:
            Path(os.environ["RIM_TEST_FAILED_AT"]).write_text(str(time.time()))
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("boom")

        first_layer = self.module.get_submodule("model.layers.0")
        first_layer.register_forward_hook(lambda _module, _inputs, output: output.register_hook(fail) and None)
    return _forward_backward(self, *arguments, **keywords)


def step(self: Engine, *arguments: Any) -> float:
    global _steps  # noqa: PLW0603
    _steps += 1
    return _step(self, *arguments)


if __name__ == "__main__":
    if os.environ.get("RIM_TEST_FAIL"):
        Engine.forward_backward, Engine.step = forward_backward, step  # type: ignore[method-assign]
    sys.exit(main())
