"""What the device can do and what it has used, for the log."""

from __future__ import annotations

import resource

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
