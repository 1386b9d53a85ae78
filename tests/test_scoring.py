"""Scoring: answers out of tricky texts, other projects' rules, majority, pass@k, the harness' task files."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from rim_dist.errors import DataError
from rim_dist.evaluation import harness, rules
from rim_dist.evaluation.harness import tasks
from rim_dist.evaluation.rules import RULES
from rim_dist.evaluation.scoring import extract_answer, majority_answer, number, pass_at_k, same_answer

OURS = "ours"

# text, target, and who calls it right (of: ours, strict, flexible, coconut, codi)
TRICKY = [
    ("#### 72", "72", "ours strict flexible coconut codi"),
    ("####72", "72", "ours flexible coconut codi"),
    ("<<48/2=24>>\n<<48+24=72>>\n#### 72", "72", "ours strict flexible coconut codi"),
    ("48/2=24\n#### 1,072", "1072", "ours strict flexible coconut codi"),
    ("#### 1,450,000.", "1450000", "ours strict flexible codi"),
    ("#### $18 ", "18", "ours flexible codi"),
    ("#### -$5", "-5", "ours flexible"),
    ("#### $-5", "-5", "ours flexible codi"),
    ("#### \u22125", "-5", "ours"),
    ("#### -3", "-3", "ours strict flexible coconut codi"),
    ("#### 72.0", "72", "ours codi"),
    ("#### 72.", "72", "ours strict flexible codi"),
    ("#### 72 dollars", "72", "ours strict flexible codi"),
    ("#### 72\nand more", "72", "ours strict flexible codi"),
    ("#### 72 of 100", "72", "ours strict"),
    ("#### 50%", "50", "ours strict flexible codi"),
    ("#### 1/2", "0.5", "ours"),
    ("#### 1/2", "1", "strict"),
    ("#### 24 + 48 = 72", "72", "flexible codi"),
    ("# 1 ## 72", "72", "ours flexible coconut codi"),
    ("#### 5\n\nQuestion: another?\n#### 72", "72", "ours flexible coconut codi"),
    ("#### 72\n\nQuestion: another?\n#### 5", "72", "strict"),
    ("The answer is 72.", "72", "ours flexible codi"),
    ("The answer is: 72", "72", "ours flexible codi"),
    ("72", "72", "ours flexible coconut codi"),
    ("7", "7", "ours flexible coconut codi"),
    ("so 5-3", "3", "ours"),
    ("so 5-3", "-3", "flexible codi"),
    ("\\boxed{72}", "72", "ours flexible codi"),
    ("72 apples in 2 baskets", "72", ""),
    ("no number", "72", ""),
    ("", "0", ""),
    ("####", "72", ""),
    ("hall #", "72", ""),
    ("#### 73", "72", ""),
    ("#### 720", "72", ""),
    ("#### 7.2", "72", ""),
    ("#### 1e999999999999", "72", ""),
    # GSM-Hard: fractions, large and tiny targets
    ("#### 9280000000000", "9.28e12", "ours codi"),
    ("#### 3244047.1", "3244047.0999999996", "ours"),
    ("#### 14053029.666", "14053029.666666666", "ours"),
    ("#### 14053029.66", "14053029.666666666", ""),
    ("#### 14053029", "14053029.666666666", ""),
    ("#### 0", "3.509e-07", ""),
    ("#### 3.509e-7", "3.509e-07", "ours"),
    ("#### 0.0000003509", "3.509e-07", "ours codi"),
    # SVAMP writes its targets as floats
    ("#### 145", "145.0", "ours codi"),
    # ProsQA
    ("#### Tom is a lempus.", "Tom is a lempus.", "ours coconut"),
    ("#### tom is  a lempus", "Tom is a lempus.", "ours"),
    ("#### Tom is a lempus.\n#### Tom is a rempus.", "Tom is a lempus.", ""),
    ("#### Tom is a rempus.", "Tom is a lempus.", ""),
    ("Tom is a lempus.", "Tom is a lempus.", "ours coconut"),
    ("#### garden", "garden", "ours coconut"),
    ("#### garden 5", "garden", ""),
]


@pytest.mark.parametrize(("text", "target", "right"), TRICKY)
def test_tricky_answers(text: str, target: str, right: str) -> None:
    verdicts = {OURS: same_answer(extract_answer(text, target), target)}
    verdicts |= {name: rule(text, target) for name, rule in RULES.items()}
    assert [name for name, is_right in verdicts.items() if is_right] == right.split()


@pytest.mark.parametrize(
    ("text", "target", "answer"),
    [
        ("#### $1,072 left", "5", "1072"),
        ("#### garden and hall \nmore", "hall", "garden and hall"),
        ("no number", "5", "no number"),
        ("1 2 3", "5", "3"),
        ("", "5", ""),
        (" \n#### \n", "5", ""),
    ],
)
def test_extract_answer(text: str, target: str, answer: str) -> None:
    assert extract_answer(text, target) == answer


@pytest.mark.parametrize(
    ("text", "value"),
    [("72", 72), ("-2.50", -2.5), (".5", 0.5), ("1,000", 1000), ("3/4", 0.75), ("+7.", 7), ("2e3", 2000), ("$ 5", 5)],
)
def test_number(text: str, value: float) -> None:
    found = number(text)
    assert found is not None
    assert float(found) == value


@pytest.mark.parametrize("text", ["", "nan", "inf", "1/0", "12 a", "a12", "1 2", "--3", "1e9999", "5-3", "."])
def test_not_a_number(text: str) -> None:
    assert number(text) is None


@pytest.mark.parametrize(
    ("given", "target", "same"),
    [
        ("72", "72.0", True),
        ("0.3009", "0.3", False),
        ("0.3002", "0.3", True),
        ("5.0009", "5", False),
        ("-72", "72", False),
        ("Garden", "garden.", True),
        ("hall", "garden", False),
        ("", "0", False),
        ("nan", "nan", True),
    ],
)
def test_same_answer(given: str, target: str, same: bool) -> None:
    assert same_answer(given, target) is same


def test_majority() -> None:
    assert majority_answer(["5", "7", "5.0", "7"]) == "7"  # as often: the one given last
    assert majority_answer(["5", "7", "$5", "hall"]) == "$5"
    assert majority_answer(["hall", "Hall", "garden"]) == "Hall"
    assert majority_answer(["x"]) == "x"


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for n, c in ((5, 0), (5, 2), (6, 5), (4, 4)):
        for k in range(1, n + 1):
            drawn = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert math.isclose(pass_at_k(n, c, k), sum(map(any, drawn)) / len(drawn), abs_tol=1e-12)


# ---- lm-evaluation-harness task files -------------------------------------------------------------------------

HARNESS = Path(harness.__file__).parent


def harness_task(name: str) -> dict[str, Any]:
    """A task file with its `include`; `!function` stays the name it gives."""

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    task = yaml.load((HARNESS / f"{name}.yaml").read_text(), Loader)
    return {**(harness_task(task["include"].removesuffix(".yaml")) if "include" in task else {}), **task}


@pytest.mark.parametrize("name", ["rim_gsm8k", "rim_gsm_hard"])
def test_harness_tasks_score_as_the_rules_do(name: str) -> None:
    """The patterns of the task files are those of `rules`; what they call exists."""
    task = harness_task(name)
    assert task["task"] == name
    assert task["num_fewshot"] == 0
    patterns = {f["name"]: f["filter"][0].get("regex_pattern") for f in task["filter_list"]}
    assert patterns == {"strict-match": rules._STRICT.pattern, "flexible-extract": rules._FLEXIBLE.pattern, "whole": None}
    exact, decimal = task["metric_list"]
    assert tuple(exact["regexes_to_ignore"]) == rules._IGNORED
    for function in (task["custom_dataset"], decimal["metric"]):
        assert hasattr(tasks, function.removeprefix("tasks."))


def test_harness_questions_and_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gsm_hard").mkdir()
    hard = tmp_path / "gsm_hard" / "gsmhardv2.jsonl"
    hard.write_text('{"input": "q", "code": "", "target": 1446816.0}\n{"input": "r", "code": "", "target": 0.5}\n')
    monkeypatch.delenv("RIM_DIST_DATA", raising=False)
    with pytest.raises(DataError, match="RIM_DIST_DATA"):
        tasks.gsm_hard(version=1.0)
    monkeypatch.setenv("RIM_DIST_DATA", str(tmp_path))
    rows = tasks.gsm_hard(version=1.0)["test"].to_list()
    assert rows == [{"question": "q", "answer": "1446816"}, {"question": "r", "answer": "0.5"}]
    assert tasks.gsm8k(data=str(hard))["test"].to_list() == rows
    hard.write_text('{"input": "", "code": "", "target": 1}\n')
    with pytest.raises(DataError, match=r"gsmhardv2.jsonl:1: no question"):
        tasks.gsm_hard()
    assert tasks.decimal(["1446816"], ["#### 1,446,816.0"]) == 1.0
    assert tasks.decimal(references=["0.5"], predictions=["#### 0.502"]) == 0.0
