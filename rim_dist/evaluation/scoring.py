"""Reading the final answer out of a generated text and comparing it with the target (docs/evaluation.md has the rules)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal, DivisionByZero, InvalidOperation

# PAL's rule for GSM-Hard (|answer - target| < 1e-3), which has targets with a fraction as small as 3.5e-7: below 1 the
# tolerance shrinks with the target, so that 0 does not count as an answer to them.
TOLERANCE = Decimal("1e-3")

_SIGNS: dict[str, str | int | None] = {"$": None, "€": None, "£": None, "%": None, "\u2212": "-"}
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d)")
_PLAIN = r"(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d{1,3}(?!\d))?"
# A minus after a digit, a letter or a bracket subtracts; elsewhere it is a sign.
_NUMBER = re.compile(rf"(?:(?<![\w)\]])[-+]\s?)?{_PLAIN}(?:\s?/\s?{_PLAIN})?", re.IGNORECASE)


def _plain(text: str) -> str:
    """A text with its numbers written plainly: no thousands commas, no currency or per cent signs, an ASCII minus."""
    return _COMMA_IN_NUMBER.sub("", text.translate(str.maketrans(_SIGNS)))


def number(text: str) -> Decimal | None:
    """The value of a text that is one number (`1,072`, `-$2.50`, `9.28e12`, `3/4`, `72.`), else None."""
    plain = _plain(text).strip().removesuffix(".")
    if not _NUMBER.fullmatch(plain):
        return None
    top, _, bottom = plain.replace(" ", "").partition("/")
    try:
        return Decimal(top) / Decimal(bottom) if bottom else Decimal(top)
    except (InvalidOperation, DivisionByZero):
        return None


def extract_answer(text: str, target: str) -> str:
    """The answer in a text, as the kind of thing the target is: a number or words.

    What stands after the last `#` is the answer, as `#### 72` is what is trained. Of its first line a number is the first
    one in it, words are the whole line. A text without `#` answers with its last number, or with its first line.
    """
    _, marker, after = text.rpartition("#")
    line = next(iter(after.strip().splitlines()), "").strip()
    if number(target) is None:
        return line
    numbers = _NUMBER.findall(_plain(line if marker else text))
    if not numbers:
        return line
    return (numbers[0] if marker else numbers[-1]).strip()


def same_answer(given: str, target: str) -> bool:
    """Whether two answers are equal: as decimals if both are numbers (72 = 72.0), else as words.

    A target with a fraction is met to within `TOLERANCE`, a whole one exactly. Words: case, spaces and a last stop do not
    count.
    """
    a, b = number(given), number(target)
    if a is None or b is None:
        return _words(given) == _words(target)
    if b == b.to_integral_value():
        return a == b
    return abs(a - b) < TOLERANCE * min(Decimal(1), abs(b))


def _words(text: str) -> str:
    return " ".join(text.split()).rstrip(".").rstrip().casefold()


def majority_answer(answers: Sequence[str]) -> str:
    """The answer given most often (equal as `same_answer` has it); of several, the one given last."""

    def rank(i: int) -> tuple[int, int]:
        return sum(same_answer(answer, answers[i]) for answer in answers), i

    return answers[max(range(len(answers)), key=rank)]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Chance that one of k answers, drawn from `samples` of which `correct` are right, is right.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374, section 2.1).
    """
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)
