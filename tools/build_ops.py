"""Build the DeepSpeed ops that training needs, so that the first run does not wait for a compiler.

Without a GPU: `deepspeed_shm_comm` (communication between the ranks of a machine) and `cpu_adam` (ZeRO-3 offload). With one:
`cpu_adam`. DeepSpeed keeps what is built in PyTorch's extension cache (`TORCH_EXTENSIONS_DIR`). An op that cannot be built
is named on one line and does not end the command: DeepSpeed tries again when it needs it.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def load(op: Any) -> None:
    """Build (or find) an op. PyTorch waits without end for the lock file of a process that was killed; a lock that the
    system releases tells such a leftover from a build in progress.
    """
    from filelock import FileLock
    from torch.utils import cpp_extension

    folder = Path(cpp_extension._get_build_directory(op.name, verbose=False))
    with FileLock(folder / "rim_dist.lock"):
        (folder / "lock").unlink(missing_ok=True)
        op.load()


def reason(error: Exception) -> str:
    """The line of a failed build that says why, without the compiler's command line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if "error: " in line), lines[0])[:200]


def build(builder: str) -> None:
    """Build (or find) one op, given by its builder's name in deepspeed.ops.op_builder, and print one line."""
    started = time.monotonic()
    try:
        with output_to(LOG):
            import deepspeed.ops.op_builder as builders

            op = getattr(builders, builder)()
            load(op)
        print(f"{op.name}: ready after {time.monotonic() - started:.0f} s", flush=True)
    except Exception as error:
        with LOG.open("a") as file:
            file.write(f"{error}\n")
        print(f"{builder.removesuffix('Builder')}: not built ({reason(error)}); all of it in {LOG}", flush=True)


def main() -> None:
    # PyTorch calls the ninja it finds on PATH; the environment's own need not be there.
    os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
    import torch

    cuda = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")
    LOG.unlink(missing_ok=True)
    print("building DeepSpeed's ops (a minute or two the first time)", flush=True)
    for builder in ["CPUAdamBuilder"] if cuda else ["ShareMemCommBuilder", "CPUAdamBuilder"]:
        build(builder)


if __name__ == "__main__":
    main()
