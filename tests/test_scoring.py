"""Scoring: answers out of tricky texts, other projects' rules, majority, pass@k, the harness' task files."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from rim_dist.config import ColumnsSection
from rim_dist.data.formats import recognise
from rim_dist.data.samples import Sample
from rim_dist.data.sources import read_file
from rim_dist.errors import DataError
from rim_dist.evaluation import harness, rules
from rim_dist.evaluation.harness import tasks
from rim_dist.evaluation.rules import RULES
from rim_dist.evaluation.scoring import extract_answer, is_right, majority_answer, number, pass_at_k, same_answer

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
    [
        *[("72", 72), ("-2.50", -2.5), (".5", 0.5), ("1,000", 1000), ("3/4", 0.75), ("+7.", 7), ("2e3", 2000), ("$ 5", 5)],
        *[("1,072", 1072), ("12,345,678.5", 12345678.5), ("5 %", 5), ("5\\%", 5), ("1e3", 1000), ("1.5E-2", 0.015)],
        # thousands in LaTeX and in other countries
        *[
            ("9{,}500", 9500),
            ("9\\,500", 9500),
            ("12\u202f345", 12345),
            ("12\u00a0345", 12345),
            ("1'072", 1072),
            ("1_072", 1072),
        ],
        # a minus may be an en dash, U+2212 or full-width
        *[("\u20135", -5), ("\u22125", -5), ("\uff0d5", -5), ("\u2212\u20ac2.50", -2.5)],
        # LaTeX
        *[
            ("\\boxed{72}", 72),
            ("$\\boxed{\\text{72}}$", 72),
            ("\\frac{1}{2}", 0.5),
            ("-\\dfrac{3}{4}", -0.75),
            ("\\frac12", 0.5),
        ],
        *[("\\boxed{\\frac{3}{4}}", 0.75), ("3.2 \\times 10^{4}", 32000), ("5\u00d710\u00b3", 5000), ("2 * 10^-2", 0.02)],
        # mixed numbers
        *[("3 1/2", 3.5), ("3 and 1/2", 3.5), ("-1 1/4", -1.25), ("1\\frac{1}{2}", 1.5), ("1\u00bd", 1.5), ("\u00be", 0.75)],
        # other digits: Arabic, Devanagari, full-width; Arabic separators
        *[("\u0667\u0662", 72), ("\u096d\u0968", 72), ("\uff17\uff12\u3002", 72), ("\u0663\u066b\u0665", 3.5)],
        *[("\u0661\u066c\u0660\u0667\u0662", 1072), ("\u200f\u0667\u0662", 72)],
    ],
)
def test_number(text: str, value: float) -> None:
    found = number(text)
    assert found is not None
    assert float(found) == value


@pytest.mark.parametrize(
    "text",
    [
        *["", "nan", "inf", "1/0", "12 a", "a12", "1 2", "--3", "1e9999", "5-3", "."],
        *["3,5", "12,3", "1,2,3", "(1, 2)", "0,500", "1,0000", "12,34,5", "9{,}5", "1.234.567"],
        *["3:30", "12/25/2024", "24 24/2", "2^10", "5\u00b2", "2^{10}", "C#", "#ff8800", "# = 42", "5\u20137"],
    ],
)
def test_not_a_number(text: str) -> None:
    assert number(text) is None


def test_numbers_of_many_digits() -> None:
    for digits in (400, 5000):
        nines = "9" * digits
        assert number(nines) == 10**digits - 1
        assert is_right(f"#### {nines}", nines)
        assert not is_right(f"#### {nines[:-1]}8", nines)
        assert not is_right(f"#### -{nines[:-1]}8", f"-{nines}")
        assert is_right(f"#### {nines}.5", f"{nines}.50")
        assert not is_right(f"#### {nines}", f"{nines[:-1]}8.5")


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
        ("35", "3,5", False),
        ("3.5", "3,5", False),
        ("1 2", "(1, 2)", False),
        ("(1,2)", "(1, 2)", True),
        ("12,3", "1,2,3", False),
        ("1, 2, 3", "1,2,3", True),
        ("12, 300", "12,300", False),  # a list is not a number
        ("330", "3:30", False),
        ("\u0663:\u0663\u0660", "3:30", True),
        ("1", "\u00bd", False),
        ("1/2", "\\frac{1}{2}", True),
        ("\\text{Garden}", "garden", True),
        ("x=5", "x = 5", True),
        ("C", "C#", False),
        ("caf\u00e9", "cafe\u0301", True),
        ("...", "?", False),
    ],
)
def test_same_answer(given: str, target: str, same: bool) -> None:
    assert same_answer(given, target) is same


CODE = "x = 6 * 7  # = 42\n#### 42"
LINES = "red\nblue\n\ngreen"


@pytest.mark.parametrize(
    ("text", "target", "right"),
    [
        ("#### 3,5", "3,5", True),
        ("#### 35", "3,5", False),
        ("#### 3,5", "35", False),
        ("#### 3,5", "3", False),
        ("so it is 3 or 4,5", "3", False),  # the last thing like a number is a list
        ("#### (1, 2)", "(1, 2)", True),
        ("#### 12,3", "1,2,3", False),
        ("#### 9{,}500 dollars", "9500", True),
        ("#### \u20135 degrees", "-5", True),
        ("it fell from 5\u20133", "-3", False),
        ("#### 1e3", "1000", True),
        ("#### $\\boxed{72}$", "72", True),
        ("so \\boxed{72} in 3 steps", "72", True),
        ("#### 60 + 12 = \\boxed{72}", "72", True),
        ("\\boxed{\\frac{1}{2}} of 3", "0.5", True),
        ("it is \\boxed{\\text{Tom}}, not Ann", "Tom", True),
        ("#### C#", "C#", True),
        ("#### C", "C#", False),
        ("#### #ff8800", "#ff8800", True),
        ("#### #ff8801", "#ff8800", False),
        (CODE, "42", True),
        ("#### 42\nprint(x)  # = 6", "42", True),
        ("#### 42\nprint(x)  # = 6", "6", False),
        ("#### # = 42", "# = 42", True),
        (f"#### {LINES}", LINES, True),
        (f"#### {LINES}\n\nQuestion: more?", LINES, True),
        ("#### red\nblue\n\nwhite", LINES, False),
        ("#### red", LINES, False),
        ("#### 3 1/2 hours", "3.5", True),
        ("#### 3", "3.5", False),
        ("#### 3:30", "3:30", True),
        ("#### 3:30", "3", False),
        ("#### 3:30", "330", False),
        ("#### \u0667\u0662", "72", True),
        ("#### 2^10", "2", False),
        ("#### 90^\\circ", "90", True),
    ],
)
def test_answers_as_they_are_written(text: str, target: str, right: bool) -> None:
    assert is_right(text, target) is right


# Targets that hold what formats are made of, and all that mean something else.
TARGETS = (
    *("72", "-5", "1,072", "3.5", "\\frac{2}{3}", "1e3", "3,5", "1,2,3", "12,3", "(1, 2)", "3:30", "C#", "#ff8800", "# = 42"),
    *("x = 5", "Tom is a lempus.", "St. Ives", "**bold** words", LINES, "\\boxed{8}", "{9}", "The answer is no.", "#### 6"),
)
FORMATS = (
    *("#### {answer}", "####{answer}", "# {answer}", "The answer is {answer}.", "Answer:\n{answer}\n", "= {answer}"),
    *("\\boxed{{{answer}}}", "$\\boxed{{{answer}}}$", "**{answer}**", "<answer>{answer}</answer>", "It is {answer} of 100"),
)


@pytest.mark.parametrize("answer_format", [*FORMATS, "{answer}", "{answer} of 100", "{answer}."])
def test_perfect_texts_are_right_in_every_format(answer_format: str) -> None:
    """What is trained is right, after steps and before more text too, and no other target's text is."""
    for target in TARGETS:
        text = answer_format.format(answer=target)
        wrong = [t for t in TARGETS if is_right(text, t, answer_format) != (t == target)]
        assert not wrong, (text, wrong)
        if answer_format in FORMATS:
            chain = f"4*3=12The room is 7. C# x = 8\n12-2=10{text}"
            assert is_right(chain, target, answer_format), chain
            assert is_right(f"{text}\nQuestion: how many?", target, answer_format)
            assert not is_right(chain, "10", answer_format)


@pytest.mark.parametrize(
    ("answer_format", "text", "target", "right"),
    [
        ("The answer is {answer}.", "The answer is 72.5.", "72", False),
        ("The answer is {answer}.", "So the answer is 72 apples. 3 are left", "72", True),
        ("The answer is {answer}.", "The answer is garden. I am sure.", "garden", True),
        ("The answer is {answer}.", "It is 72 of 100. I am sure", "100", True),  # without the mark: the last number
        ("\\boxed{{{answer}}}", "\\boxed{72} and {5}", "72", True),
        ("\\boxed{{{answer}}}", "\\boxed{\\text{garden}}", "garden", True),
        ("<answer>{answer}</answer>", "<answer>\ngarden\n</answer>", "garden", True),
        ("**{answer}**", "**3** of **72**, I think", "72", True),
        ("{answer} of 100", "72 of 100", "100", False),
    ],
)
def test_answers_near_a_format(answer_format: str, text: str, target: str, right: bool) -> None:
    assert is_right(text, target, answer_format) is right


@pytest.mark.parametrize("answer_format", ["#### {answer}", "The answer is {answer}.", "\\boxed{{{answer}}}", "{answer}"])
def test_reference_answers_of_real_data_are_right(answer_format: str, gsm8k: Path) -> None:
    folder = gsm8k.parent.parent
    names = (
        "gsm8k/train.jsonl",
        "gsm8k/test.jsonl",
        "gsm_hard/gsmhardv2.jsonl",
        "icot_gsm8k_aug/test.txt",
        "prosqa/prosqa_test.json",
    )
    files = [path for name in names[answer_format not in FORMATS[:1] :] if (path := folder / name).is_file()] or [gsm8k]
    for path in files:
        rows = list(read_file(path, recognise(path), ColumnsSection()))
        targets = [row.answer for row in rows if isinstance(row, Sample)]
        assert len(targets) == len(rows)
        assert [t for t in targets if not is_right(answer_format.format(answer=t), t, answer_format)] == []
        if answer_format in FORMATS[:1] and path.name != "prosqa_test.json":
            assert [t for t in targets if is_right(answer_format.format(answer=float(t) + 1), t, answer_format)] == []


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
    whole = task["filter_list"][-1]["filter"]
    for function in (task["custom_dataset"], decimal["metric"], whole[0]["filter_fn"]):
        assert hasattr(tasks, function.removeprefix("tasks."))
    assert [f["function"] for f in whole] == ["custom", "take_first"]


def test_harness_questions_and_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gsm_hard").mkdir()
    hard = tmp_path / "gsm_hard" / "gsmhardv2.jsonl"
    hard.write_text('{"input": "q", "code": "", "target": 1446816.0}\n{"input": "r", "code": "", "target": 0.5}\n')
    monkeypatch.delenv("RIM_DIST_DATA", raising=False)
    with pytest.raises(DataError, match="RIM_DIST_DATA"):
        tasks.gsm_hard(version=1.0)
    monkeypatch.setenv("RIM_DIST_DATA", str(tmp_path))
    rows = tasks.gsm_hard(version=1.0)["test"].to_list()
    usual = {"answer_format": "#### {answer}"}
    assert rows == [{"question": "q", "answer": "1446816", **usual}, {"question": "r", "answer": "0.5", **usual}]
    assert tasks.gsm8k(data=str(hard), pretrained="of/the-hub")["test"].to_list() == rows
    hard.write_text('{"input": "", "code": "", "target": 1}\n')
    with pytest.raises(DataError, match=r"gsmhardv2.jsonl:1: no question"):
        tasks.gsm_hard()
    assert tasks.decimal(["1446816"], ["#### 1,446,816.0"]) == 1.0
    assert tasks.decimal(references=["0.5"], predictions=["#### 0.502"]) == 0.0


def test_harness_reads_answers_as_the_model_was_trained(tmp_path: Path) -> None:
    """The harness gives the model's arguments (`pretrained`) to the data and the questions to the filter."""
    data = tmp_path / "q.jsonl"
    data.write_text('{"question": "q", "answer": "garden"}\n{"question": "r", "answer": "C#"}\n')
    about = {"recipe": {"data": {"answer_format": "It is {answer}, I say"}}}
    (tmp_path / "rim_dist.json").write_text(json.dumps(about))
    docs = tasks.gsm8k(data=str(data), pretrained=str(tmp_path), dtype="float32")["test"].to_list()
    responses = [["It is garden, I say", "It is hall, I say"], ["So it is C#, I say"]]
    assert tasks.answers(responses, docs) == [["garden", "hall"], ["C#"]]
    assert [tasks.decimal([doc["answer"]], [r[0]]) for doc, r in zip(docs, tasks.answers(responses, docs), strict=True)] == [
        1,
        1,
    ]
    docs = tasks.gsm8k(data=str(data), pretrained=str(tmp_path), answer_format="I say {answer}")["test"].to_list()
    assert tasks.answers([["I say hall"], ["I say C#"]], docs) == [["hall"], ["C#"]]
