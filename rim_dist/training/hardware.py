"""Speed and memory of the device and its host."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

import torch

# Dense bf16/fp16 tensor-core peaks in operations a second, from NVIDIA's data sheets.
_PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "V100": 125e12}


def peak_operations(dtype: str) -> float | None:
    """The device's peak for 16-bit training in operations a second; None if it is not known (CPU, fp32, other devices)."""
    if dtype == "fp32" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for model, peak in _PEAKS.items() if model in name), None)


def peak_memory_bytes() -> int:
    """Most memory used so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def this_device() -> dict[str, str | int]:
    """Name and memory in bytes of the current device, and a GPU's `identity`, which two processes on one GPU have in common.

    Ranks share a CPU: it has the number of cores that this process may use, and no more.
    """
    if not torch.cuda.is_available():
        return {"name": f"CPU ({len(os.sched_getaffinity(0))} cores)"}
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {"name": properties.name, "identity": str(properties.uuid), "memory_bytes": total, "free_bytes": free}


def free_memory_bytes() -> int:
    """Memory that is available on this process's host and in its control group, which a scheduler may limit."""
    import psutil

    available = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError, StopIteration):
        entries = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = Path("/sys/fs/cgroup") / next(line[3:].lstrip("/") for line in entries if line.startswith("0::"))
        for folder in (own, *own.parents):
            limit = folder / "memory.max"
            if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
                used = int((folder / "memory.current").read_text(encoding="ascii"))
                available = min(available, max(0, int(text) - used))
    return available
