"""Build the DeepSpeed op that ZeRO-3 offload needs (`cpu_adam`), so that the first run does not wait for a compiler.

DeepSpeed keeps what is built in PyTorch's extension cache (`TORCH_EXTENSIONS_DIR`). An op that cannot be built is named on
one line and does not end the command: DeepSpeed tries again when it needs it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

LOG = Path(sys.prefix) / "build_ops.log"


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send what this process and the compilers it starts print to a file."""
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)


def reason(error: Exception) -> str:
    """The line of a failed build that says why, without the compiler's command line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])[:200]


def main() -> None:
    # PyTorch calls the ninja it finds on PATH; the environment's own need not be there.
    os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
    LOG.unlink(missing_ok=True)
    print("building DeepSpeed's cpu_adam (a minute or two the first time)", flush=True)
    started = time.monotonic()
    try:
        with output_to(LOG):
            import torch

            os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
            from rim_dist.parallel.ops import load_cpu_adam

            load_cpu_adam()
        print(f"cpu_adam: ready after {time.monotonic() - started:.0f} s", flush=True)
    except Exception as error:
        with LOG.open("a") as file:
            file.write(f"{error}\n")
        print(f"cpu_adam: not built ({reason(error)}); all of it in {LOG}", flush=True)


if __name__ == "__main__":
    main()
