"""Reading the final answer out of a generated text and comparing it with the target (docs/evaluation.md has the rules)."""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal, DecimalException

from rim_dist.config import DataSection, around_text
from rim_dist.data.formats.base import THOUSANDS

# The target text of an answer where a model's recipe is not known.
ANSWER_FORMAT: str = DataSection.model_fields["answer_format"].default

# PAL's rule for GSM-Hard (|answer - target| < 1e-3), which has targets with a fraction as small as 3.5e-7: below 1 the
# tolerance shrinks with the target, so that 0 does not count as an answer to them.
TOLERANCE = Decimal("1e-3")


# ---- numbers as people and LaTeX write them ------------------------------------------------------------------------

_PUNCTUATION = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-"),
    **dict.fromkeys("\u2044\u2215\uff0f", "/"),
    **dict.fromkeys("\u066b\u3002\uff0e", "."),
    **dict.fromkeys("\u066c\uff0c", ","),
    "\uff1a": ":",
}
_CURRENCY_OR_PERCENT = re.compile(r"\\?[$%\u00a2-\u00a5\u20a0-\u20cf\u066a\uff04\uff05]")
_THOUSANDS_GAP = re.compile(r"(?<=\d)(?:\\[,!:; ]|[\u00a0\u2007\u2009\u202f'\u2019_])(?=\d{3}(?!\d))")
_POWER_OF_TEN = re.compile(
    r"(?<=\d)\s?(?:\u00d7|\u00b7|\\times|\\cdot|[x*])\s?10\s?\^\s?(?:\{([-+]?\d{1,3})\}|([-+]?\d{1,3})(?!\d))", re.IGNORECASE
)
_FRACTION = re.compile(r"\\[dtc]?frac\s*(?:\{\s*([-+]?[\d.,]+)\s*\}\s*\{\s*([\d.,]+)\s*\}|(\d)(\d))")
# What a LaTeX command sets, braces two deep.
_SET = r"\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
_BOXED = re.compile(rf"\\f?box(?:ed)?{_SET}")
_WRAPPED = re.compile(rf"\\(?:f?box(?:ed)?|mbox|text\w*|math\w+){_SET}")

_DECIMAL = rf"(?:{THOUSANDS}(?:\.\d+)?|(?:\d+(?:\.\d+)?|\.\d+)(?:e[-+]?\d{{1,3}})?)"
# A minus after a digit, a letter or a bracket subtracts; elsewhere it is a sign. What goes on as a list, a time, a date or a
# power is no number.
_NUMBER = re.compile(
    rf"(?<!\^)(?<!\^\{{)(?P<sign>(?<![\w)\]])[-+]\s?)?(?:(?P<whole>\d+) (?:and )?(?=\d+\s?/\s?\d))?(?P<top>{_DECIMAL})"
    rf"(?:\s?/\s?(?P<bottom>{_DECIMAL}))?(?!\d|[.,:/]\d|e[-+]?\d|\s?\^(?!\s?\{{?\\circ))",
    re.IGNORECASE,
)
_NUMBER_OR_LIST = re.compile(rf"{_NUMBER.pattern}|\d+(?:[.,:/]\d+|e[-+]?\d+|\s?\^\s?\{{?-?\w+)+", re.IGNORECASE)


def _ascii(character: str) -> str:
    """A digit, sign or fraction of any script as ASCII text; nothing for what is invisible."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    kind, _, parts = unicodedata.decomposition(character).partition(" ")
    if kind == "<fraction>":  # apart from a digit before it: a mixed number
        return " " + unicodedata.normalize("NFKC", character).replace("\u2044", "/")
    if kind == "<super>" and character.isdigit():
        return "^" + chr(int(parts, 16))
    return "" if unicodedata.category(character) == "Cf" else _PUNCTUATION.get(character, character)


def _in_ascii(text: str) -> str:
    return text if text.isascii() else "".join(map(_ascii, text))


def _unwrapped(text: str) -> str:
    """A text without the LaTeX commands that only set their content."""
    while (inner := _WRAPPED.sub(r"\1", text)) != text:
        text = inner
    return text


def _plain(text: str) -> str:
    """A text with its numbers written plainly: ASCII, thousands by commas, fractions by `/`, no currency or per cent signs."""
    text = _THOUSANDS_GAP.sub(",", _in_ascii(text).replace("{,}", ","))
    text = _POWER_OF_TEN.sub(r"e\1\2", _CURRENCY_OR_PERCENT.sub("", text))
    text = _FRACTION.sub(lambda m: f" {m[1] or m[3]}/{m[2] or m[4]}", text)
    return re.sub(r"[^\S\n]+", " ", _unwrapped(text))


@functools.lru_cache(maxsize=4096)
def number(text: str) -> Decimal | None:
    """The value of a text that is one number (`1,072`, `-$2.50`, `9.28e12`, `1 3/4`, `72.`), else None."""
    found = _NUMBER.fullmatch(_plain(text).strip().removesuffix("."))
    if found is None:
        return None
    sign, whole, *parts = found.group("sign", "whole", "top", "bottom")
    try:
        top, bottom = (Decimal((part or "1").replace(",", "")) for part in parts)
        value = top / bottom if parts[1] else top
    except DecimalException:
        return None
    if whole:
        if value >= 1 or "." in "".join(parts):  # 24 24/2 are two numbers
            return None
        value += Decimal(whole)
    return value.copy_negate() if sign and sign[0] == "-" else value  # `-value` would round to 28 digits


# ---- the answer in a text ------------------------------------------------------------------------------------------


def _pattern(text: str, follows: str = "") -> re.Pattern[str] | None:
    """Finds a part of a format, in any case and with any spaces; None for a blank one."""
    return re.compile(r"\s+".join(map(re.escape, text.split())) + follows, re.IGNORECASE) if text.strip() else None


@functools.cache
def answer_marks(answer_format: str) -> tuple[re.Pattern[str] | None, re.Pattern[str] | None]:
    """Patterns of the texts before and after the answer (`data.answer_format`); None where there is none."""
    before, after = around_text(answer_format, "answer")
    return _pattern(before), _pattern(after, r"(?!\d)")


def answer_start(text: str, answer_format: str, target: str = "") -> re.Match[str] | None:
    """Where a text says that the answer follows: the last place of the format's text before it.

    That text may also stand in the target, or behind the answer (`**{answer}**`): there it does not count.
    """
    mark = answer_marks(answer_format)[0]
    found = list(mark.finditer(text)) if mark else []
    if not mark or not found:
        return None
    behind = len(mark.findall(target + around_text(answer_format, "answer")[1]))
    return found[max(0, len(found) - 1 - behind)]


def _outside_braces(pattern: re.Pattern[str], text: str) -> list[int]:
    """Where a pattern begins in a text, but for braces opened in it."""
    starts = (found.start() for found in pattern.finditer(text))
    return [i for i in starts if text.count("{", 0, i) <= text.count("}", 0, i)]


def extract_answer(text: str, target: str, answer_format: str = ANSWER_FORMAT) -> str:
    """The answer in a text, as the kind of thing the target is: a number or words. `answer_format`: as it was trained.

    The answer stands behind the format's text before it (`####`), the last one if there are several, or in the last
    `\\boxed{}`; it has as many lines as the target. A number is the first one there, words are the whole. A text with neither
    answers with its last number, or with its first lines.
    """
    mark, end = answer_marks(answer_format)
    start = answer_start(text, answer_format, target)
    answer, marked = text[start.end() :] if start else text, start is not None
    if "\\box" not in target and (boxed := _BOXED.findall(answer)):
        answer, marked = boxed[0 if marked else -1], True
    elif end and marked == (mark is not None):
        # The answer ends where the format goes on; what the target has of that text itself does not count.
        ends = _outside_braces(end, answer)
        answer = answer[: ends[min(len(_outside_braces(end, target)), len(ends) - 1)]] if ends else answer
    lines = answer.strip().splitlines()
    words = "\n".join(lines[: max(1, len(target.splitlines()))]).strip()
    if number(target) is None:
        return words
    numbers = [found.group() for found in _NUMBER_OR_LIST.finditer(_plain(words if marked else answer))]
    if not numbers:
        return words
    found = numbers[0 if marked else -1]
    return found.replace(",", "") if number(found) is not None else found


def same_answer(given: str, target: str) -> bool:
    """Whether two answers are equal: as decimals if the target is a number (72 = 72.0), else as words.

    A target with a fraction is met to within `TOLERANCE`, a whole one exactly. Words: case, spaces and a last stop do not
    count.
    """
    a, b = number(given), number(target)
    if b is None:
        return _words(given) == _words(target)
    if a is None or b == b.to_integral_value():
        return a == b
    return abs(a - b) < TOLERANCE * min(Decimal(1), abs(b))


def is_right(text: str, target: str, answer_format: str = ANSWER_FORMAT) -> bool:
    """Whether the answer in a text is the target."""
    return same_answer(extract_answer(text, target, answer_format), target)


def _words(text: str) -> str:
    text = unicodedata.normalize("NFC", _unwrapped(_in_ascii(text)))
    text = re.sub(r"\s*([,;:=()\[\]{}])\s*", r"\1", " ".join(text.split())).casefold()
    return text.rstrip(". ") or text


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
