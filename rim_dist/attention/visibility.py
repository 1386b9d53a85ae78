"""Who may see whom in a RiM row: the one predicate that every mask is derived from."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

QUESTION, MEMORY, READOUT = 0, 1, 2
KIND_NAMES = ("question", "memory", "readout")
PADDING_SEGMENT = -1


@dataclass
class RowLayout:
    """Where every token of a batch of rows stands.

    All tensors are integer, `[rows, seq]`. `segment` tells samples in one row apart
    (`PADDING_SEGMENT` is padding), `kind` is QUESTION, MEMORY or READOUT, `block` is k of block k
    or readout k (0 for the question), `position` is the position id.
    """

    segment: torch.Tensor
    kind: torch.Tensor
    block: torch.Tensor
    position: torch.Tensor
    attended: set[int] = field(default_factory=set, repr=False)  # ids of the modules whose attention used this layout
    _masks: dict[int | None, torch.Tensor] = field(default_factory=dict, repr=False)

    def dense_mask(self, sliding_window: int | None = None) -> torch.Tensor:
        """Boolean mask `[rows, 1, seq, seq]` (True: visible), built once per batch and window.

        `sliding_window`: a query sees only keys less than so many positions back. Positions are those
        of the unrolled run, so the window is the one an unmodified model applies there.
        """
        if sliding_window not in self._masks:
            queries = [t.unsqueeze(2) for t in (self.segment, self.kind, self.block, self.position)]
            keys = [t.unsqueeze(1) for t in (self.segment, self.kind, self.block, self.position)]
            mask = visible(*queries, *keys)
            if sliding_window is not None:
                mask = mask & (queries[3] - keys[3] < sliding_window)
            self._masks[sliding_window] = mask.unsqueeze(1)
        return self._masks[sliding_window]


def visible(
    q_segment: torch.Tensor,
    q_kind: torch.Tensor,
    q_block: torch.Tensor,
    q_position: torch.Tensor,
    k_segment: torch.Tensor,
    k_kind: torch.Tensor,
    k_block: torch.Tensor,
    k_position: torch.Tensor,
) -> torch.Tensor:
    """True where a query may see a key; arguments broadcast (method.md, "Sequence").

    Question and memory are plain causal and never see a readout. Readout k sees the question, blocks
    1..k and its own causal prefix; never another readout, never a later block.
    """
    same_sample = q_segment == k_segment
    causal = k_position <= q_position
    key_is_prefix = k_kind != READOUT
    query_is_prefix = q_kind != READOUT
    prefix_key = key_is_prefix & (query_is_prefix | (k_block <= q_block))
    readout_key = ~key_is_prefix & ~query_is_prefix & (k_block == q_block)
    return same_sample & causal & (prefix_key | readout_key)
