"""The declaration of `rim_dist.attention.split`."""

from __future__ import annotations

import math

from rim_dist.attention.kernels.base import Kernel
from rim_dist.limits import CHUNK, MASK_ENTRIES
from rim_dist.planning.workload import Workload


class Split(Kernel):
    """Sample by sample, without a mask over a whole micro-batch."""

    module = "rim_dist.attention.split"
    devices = ("cpu", "cuda")
    dtypes = ("fp32", "bf16", "fp16")
    dropout = sliding_window = softcap = bidirectional = True
    sequence_modes = ("ulysses", "allgather_kv")
    precedence = 0
    joins_outputs = True

    def mask_bytes(self, load: Workload, entry: int, device: str, dropout: float, gathered: int) -> int:
        """One mask for all samples of one shape."""
        whole = device != "cpu" or dropout > 0
        entries = load.readout_tokens * load.row
        if not whole and entries > MASK_ENTRIES:
            # Readouts in groups that see the blocks before them without a mask.
            own, readouts = max(1, load.target - 1), load.readouts
            together = max(1.0, (MASK_ENTRIES / (own * max(own, load.block))) ** 0.5)
            entries = int(readouts * own * (together * (load.block + own)))
        entries *= 1 if load.alike else math.ceil(load.samples)
        if gathered > 1:
            # A rank masks its own readouts, and its causal queries against the keys before them, chunk by chunk.
            own = -(-load.tokens // gathered)
            entries = entries // gathered + own * (load.prefix // 2 if whole else CHUNK)
        return entry * entries


KERNEL = Split()
