"""Reading the final answer out of a generated text and comparing it with the target."""

from __future__ import annotations

from decimal import Decimal, InvalidOperation


def extract_answer(text: str) -> str:
    """The text after the last `#` (the whole text without one), without commas and currency signs.

    Answers are trained as `#### 72`; this is Coconut's rule, and equals the strict filter of lm-evaluation-harness'
    gsm8k on such texts.
    """
    answer = text.rpartition("#")[2].strip()
    first_line = answer.splitlines()[0] if answer else ""
    return first_line.replace(",", "").replace("$", "").strip()


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text.rstrip("."))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


def same_answer(given: str, target: str) -> bool:
    """Whether two answers are equal: as decimals if both are numbers (72 = 72.0), else as text without case."""
    a, b = _number(given.replace(",", "")), _number(target.replace(",", ""))
    if a is not None and b is not None:
        return a == b
    return given.strip().rstrip(".").casefold() == target.strip().rstrip(".").casefold()
