"""The scoring rules of others, so that figures can be put beside theirs. `scoring` is the project's own rule.

Each takes a generated text and a target (`Sample.answer`: a number has no thousands commas) and says whether the text is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
_CODI_NUMBER = re.compile(r"-?\d+\.?\d*")


def _exact_match(given: str, target: str) -> bool:
    """The harness' exact_match with the gsm8k task's `regexes_to_ignore` and `ignore_case`."""
    for pattern in _IGNORED:
        given, target = re.sub(pattern, "", given), re.sub(pattern, "", target)
    return given.lower() == target.lower()


def strict(text: str, target: str) -> bool:
    """lm-evaluation-harness gsm8k (version 3), `strict-match`: the first number after `#### `, compared as text."""
    found = _STRICT.search(text)
    return _exact_match(found.group(1).strip() if found else "[invalid]", target)


def flexible(text: str, target: str) -> bool:
    """lm-evaluation-harness gsm8k (version 3), `flexible-extract`: the last number, compared as text."""
    found = list(_FLEXIBLE.finditer(text))
    return _exact_match((found[-1].group(1) or found[-1].group(2)).strip() if found else "[invalid]", target)


def coconut(text: str, target: str) -> bool:
    """Coconut (facebookresearch/coconut, run.py): the text after the last `#` without commas, compared as text."""
    return text.split("#")[-1].replace(",", "").strip() == target.replace(",", "").strip()


def codi(text: str, target: str) -> bool:
    """CODI (zhenyi4/codi, test.py, number tasks): the last number, compared as floating point; words are never right."""
    numbers = _CODI_NUMBER.findall(text.replace(",", ""))
    try:
        return bool(numbers) and float(numbers[-1]) == float(target.replace(",", ""))
    except ValueError:
        return False


RULES: dict[str, Callable[[str, str], bool]] = {"strict": strict, "flexible": flexible, "coconut": coconut, "codi": codi}
