"""Two methods on the same questions: is the difference more than chance?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy


@dataclass(frozen=True)
class PairedComparison:
    """Method `a` against `b`, accuracies as shares. `low`, `high`: 95 % interval of the difference a - b (paired bootstrap).

    `only_a`, `only_b`: questions that one of them alone answers right. `p_value`: exact McNemar test, two-sided.
    """

    questions: int
    accuracy_a: float
    accuracy_b: float
    only_a: int
    only_b: int
    low: float
    high: float
    p_value: float

    @property
    def difference(self) -> float:
        return self.accuracy_a - self.accuracy_b


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact p: under chance a question that one alone answers right is as likely to be either's."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2**n)


def compare_paired(a: Sequence[bool], b: Sequence[bool], draws: int = 10_000, seed: int = 0) -> PairedComparison:
    """Compare right and wrong on the same questions, in the same order.

    A bootstrap sample of questions is, for the difference, a multinomial draw of its three outcomes: +1, -1, 0.
    """
    n = len(a)
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    outcomes = numpy.random.default_rng(seed).multinomial(n, [only_a / n, only_b / n, (n - only_a - only_b) / n], draws)
    low, high = numpy.quantile((outcomes[:, 0] - outcomes[:, 1]) / n, [0.025, 0.975])
    return PairedComparison(n, sum(a) / n, sum(b) / n, only_a, only_b, float(low), float(high), mcnemar(only_a, only_b))
