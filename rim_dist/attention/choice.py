"""Which attention kernel a run gets, and why: from the kernels' declarations alone, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from rim_dist.attention.kernels import kernel_names, kernel_of
from rim_dist.attention.kernels.base import Demands
from rim_dist.errors import ConfigError


@dataclass(frozen=True)
class KernelChoice:
    """The attention kernel of a run and why it is this one."""

    kernel: str
    reason: str


def choose_kernel(wanted: str, demands: Demands) -> KernelChoice:
    """Resolve `model.attention`. Raises ConfigError for a kernel that cannot do what the run demands."""
    if demands.bidirectional and demands.sliding_window is not None:
        raise ConfigError(
            f"memory.inside_block: bidirectional cannot be combined with the sliding window ({demands.sliding_window}) of "
            f"{demands.model_type}; allowed: causal"
        )
    kernels = sorted(map(kernel_of, kernel_names()), key=lambda kernel: -1 if kernel.precedence is None else kernel.precedence)
    refusals = {kernel.name: kernel.refusal(demands) for kernel in kernels}
    if wanted != "auto":
        if refusals[wanted] is not None:
            allowed = ", ".join(["auto", *(name for name, refusal in refusals.items() if refusal is None)])
            raise ConfigError(f"model.attention: {wanted} cannot be used: {refusals[wanted]}; allowed: {allowed}")
        return KernelChoice(wanted, "the recipe asks for it")
    out = []
    for kernel in reversed([kernel for kernel in kernels if kernel.precedence is not None]):
        if refusals[kernel.name] is not None:
            out.append(f"{kernel.name} is out: {refusals[kernel.name]}")
        elif kernel.auto_tokens is None or demands.micro_batch_tokens <= kernel.auto_tokens:
            return KernelChoice(kernel.name, kernel.auto_reason or "; ".join(out))
    raise ConfigError(f"model.attention: auto finds no kernel: {'; '.join(out)}")
