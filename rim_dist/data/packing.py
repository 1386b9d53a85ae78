"""Packing a global batch into micro-batches: within a token budget, equally many on every rank, of nearly equal cost.

The samples of an optimizer step are already chosen. Where they run changes only rounding.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rim_dist.data.rows import Batch
from rim_dist.data.samples import Row


@dataclass(frozen=True)
class RowCost:
    """Floating-point operations of forward and backward: per token, per supervised position, per attended (query, key) pair."""

    token: float = 1.0
    target: float = 0.0
    pair: float = 0.0

    def __call__(self, row: Row) -> float:
        return len(row) * self.token + row.targets * self.target + (row.span().pairs * self.pair if self.pair else 0.0)

    def of_batch(self, batch: Batch) -> float:
        return batch.tokens * self.token + len(batch.targets.label) * self.target + batch.pairs * self.pair


@dataclass(frozen=True)
class Packing:
    """`bins[i][rank]`: indices of the rows in a rank's i-th micro-batch (may be empty)."""

    bins: list[list[list[int]]]
    efficiency: float  # real tokens / (micro-batches x token budget)
    balance: float  # mean cost / largest cost of the micro-batches that ranks run at the same time, over the step


def pack_step(rows: Sequence[Row], ranks: int, budget: int, cost: Callable[[Row], float]) -> Packing:
    """Distribute the rows of an optimizer step over as few rounds of micro-batches as the budget (in tokens) allows.

    Worst-fit decreasing bin packing by cost. The micro-batches of a round run at the same time and have similar costs.
    Deterministic. Raises ValueError for a row above the budget.
    """
    lengths, costs = [len(row) for row in rows], [cost(row) for row in rows]
    if max(lengths) > budget:
        raise ValueError(f"a row of {max(lengths)} tokens is above the budget of {budget}")
    order = sorted(range(len(rows)), key=lambda i: (-costs[i], i))
    rounds = -(-sum(lengths) // (ranks * budget))
    while (packed := _worst_fit(order, lengths, costs, ranks * rounds, budget)) is None:
        rounds += 1
    packed.sort(key=lambda loaded: -loaded[0])
    bins, longest = [], 0.0
    for i in range(rounds):
        concurrent = packed[i * ranks : (i + 1) * ranks]
        longest += concurrent[0][0]
        # The order alternates between rounds: otherwise the first rank would always have the most to do.
        bins.append([indices for _, indices in (concurrent if i % 2 == 0 else concurrent[::-1])])
    return Packing(bins, sum(lengths) / (ranks * rounds * budget), sum(costs) / (ranks * longest))


def _worst_fit(
    order: Sequence[int], lengths: Sequence[int], costs: Sequence[float], bins: int, budget: int
) -> list[tuple[float, list[int]]] | None:
    """(cost, row indices) of each bin, each row going to the cheapest bin with room for it. None if a row fits in no bin."""
    heap = [(0.0, number) for number in range(bins)]  # (cost so far, bin)
    room = [budget] * bins  # tokens
    content: list[list[int]] = [[] for _ in range(bins)]
    for i in order:
        full = []
        while heap and room[heap[0][1]] < lengths[i]:
            full.append(heapq.heappop(heap))
        if not heap:
            return None
        load, number = heap[0]
        room[number] -= lengths[i]
        content[number].append(i)
        heapq.heapreplace(heap, (load + costs[i], number))
        for entry in full:
            heapq.heappush(heap, entry)
    loads = {number: load for load, number in heap}
    return [(loads[number], numbers) for number, numbers in enumerate(content)]
