"""The declaration of `rim_dist.attention.flex`."""

from __future__ import annotations

from rim_dist.attention.kernels.base import Kernel


class Flex(Kernel):
    """FlexAttention: one kernel over the blocks of a packed row that the mask leaves."""

    module = "rim_dist.attention.flex"
    # On a CPU it has a forward pass only, which tests compare. Its block mask is integers for every 128 x 128 entries.
    devices = ("cuda",)
    dtypes = ("fp32", "bf16", "fp16")
    head_dims = (16, None)
    sliding_window = softcap = bidirectional = True
    sequence_modes = ("ulysses", "allgather_kv")
    packages = ("triton",)
    precedence = 1
    auto_reason = "one kernel for the whole row on cuda"


KERNEL = Flex()
