"""The declaration of `rim_dist.attention.flex`."""

from __future__ import annotations

from rim_dist.attention.kernels.base import Kernel


class Flex(Kernel):
    """FlexAttention: one kernel over the blocks of a packed row that the mask leaves."""

    module = "rim_dist.attention.flex"
    # On a CPU it has a forward pass only, which tests compare. Its block mask is integers for every 128 x 128 entries.
    devices = ("cuda",)
    # In fp32 its kernels on a GPU need more registers than there are: what they spill costs more than `split` does.
    dtypes = ("bf16", "fp16")
    head_dims = (16, None)
    sliding_window = softcap = bidirectional = True
    sequence_modes = ("ulysses", "allgather_kv")
    packages = ("triton",)
    precedence = 1
    auto_reason = "one kernel for the whole row on cuda"


KERNEL = Flex()
