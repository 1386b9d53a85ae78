"""What the device can do and what it has used, for the log."""

from __future__ import annotations

import contextlib
import os
import resource
from dataclasses import dataclass
from pathlib import Path

import torch

# Dense bf16/fp16 tensor-core peaks in operations a second, from NVIDIA's data sheets.
_PEAKS = {"A100": 312e12, "H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12, "V100": 125e12}


def peak_operations(dtype: str) -> float | None:
    """The device's peak for 16-bit training, None where it is not known (CPU, fp32, other devices)."""
    if dtype == "fp32" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAKS.items() if part in name), None)


def peak_memory_bytes() -> int:
    """Most memory used so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Device:
    """What a rank computes on. `identity`: the same for two processes on one GPU; empty for a CPU, which ranks share."""

    name: str
    identity: str
    memory_bytes: int
    free_bytes: int


def this_device() -> Device:
    """The current device; of a CPU, the cores this process may use."""
    if not torch.cuda.is_available():
        return Device(f"CPU ({len(os.sched_getaffinity(0))} cores)", "", 0, 0)
    free, total = torch.cuda.mem_get_info()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return Device(properties.name, str(properties.uuid), total, free)


def free_memory_bytes() -> int:
    """Memory that this process's host, or the control group a scheduler put it in, has left."""
    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        if line.startswith("MemAvailable")
    )
    with contextlib.suppress(OSError, ValueError, StopIteration):
        entries = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        own = Path("/sys/fs/cgroup") / next(line[3:].lstrip("/") for line in entries if line.startswith("0::"))
        for folder in (own, *own.parents):
            limit = folder / "memory.max"
            if limit.is_file() and (text := limit.read_text(encoding="ascii").strip()) != "max":
                used = int((folder / "memory.current").read_text(encoding="ascii"))
                available = min(available, max(0, int(text) - used))
    return available
