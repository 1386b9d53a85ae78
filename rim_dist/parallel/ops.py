"""DeepSpeed's compiled ops, loaded so that a process killed while it built one cannot block every later run."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock


def skip_shared_memory_op() -> None:
    """Keep DeepSpeed from building and loading `deepspeed_shm_comm` when it opens a process group on a CPU.

    It serves inference_all_reduce alone, which training does not call; building it takes a minute, and a process killed
    meanwhile leaves a lock for which every later run waits without end.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load_cpu_adam() -> None:
    """Build (or find) the optimizer of ZeRO-3 offload.

    PyTorch waits without end for the lock file of a build that was killed; a lock that the system releases with its process
    tells such a leftover from a build in progress.
    """
    from deepspeed.ops.op_builder import CPUAdamBuilder
    from torch.utils import cpp_extension

    op = CPUAdamBuilder()
    folder = Path(cpp_extension._get_build_directory(op.name, verbose=False))
    with FileLock(folder / "rim_dist.lock"):
        (folder / "lock").unlink(missing_ok=True)
        op.load(verbose=False)
