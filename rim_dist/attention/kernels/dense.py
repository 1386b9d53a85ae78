"""The declaration of `rim_dist.attention.dense`."""

from __future__ import annotations

from rim_dist.attention.kernels.base import Kernel
from rim_dist.planning.workload import Workload


class Dense(Kernel):
    """One mask over a whole micro-batch: the reference."""

    module = "rim_dist.attention.dense"
    devices = ("cpu", "cuda")
    dtypes = ("fp32", "bf16", "fp16")
    dropout = sliding_window = softcap = bidirectional = decoding = True
    sequence_modes = ("ulysses", "allgather_kv")
    precedence = 2
    # One call over everything beats a call for each sample where rows are so small.
    auto_tokens = 256
    auto_reason = f"micro-batches of at most {auto_tokens} tokens"

    def mask_bytes(self, load: Workload, entry: int, device: str, dropout: float, gathered: int) -> int:  # noqa: ARG002 - boolean
        return load.tokens**2


KERNEL = Dense()
