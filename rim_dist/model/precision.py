"""What this machine computes in: the precision of a run, and PyTorch's switches for CUDA, which are those of the process."""

from __future__ import annotations

import torch

from rim_dist.config import Recipe


def with_precision(recipe: Recipe) -> Recipe:
    """The recipe with what `model.dtype: auto` is here: bf16 on GPUs that have it, fp32 elsewhere."""
    # Older GPUs emulate bf16, which is slower than fp32.
    has_bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return recipe.with_dtype("bf16" if has_bf16 else "fp32")


def switch_kernels(cudnn_attention: bool = False, tf32: bool = False) -> None:
    """Let PyTorch take cuDNN's attention, and TF32 for products of fp32 matrices, or not. No effect without CUDA.

    cuDNN builds a plan for every new shape, and packed rows have a new shape in almost every call.
    """
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
