"""Sources, bad rows with file and line, encoding, the tokenised cache, order and batches."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy
import pytest
from conftest import FIXTURE_ROWS
from forked import PROCESSES
from tiny_tokenizers import byte_tokenizer
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import rim_dist.data.formats
import rim_dist.methods
from rim_dist.checkpoint.start import requirements_of
from rim_dist.cli import main
from rim_dist.config import ColumnsSection, Recipe, Section
from rim_dist.data.formats import recognise
from rim_dist.data.formats.base import answer_text
from rim_dist.data.loader import BatchLoader, plan_stages
from rim_dist.data.prepared import PreparedData, StreamedData, fingerprint, prepare
from rim_dist.data.samples import BadSample, Sample
from rim_dist.data.sources import read_file, read_source
from rim_dist.data.synthetic import SyntheticTask, house_map, synthetic_tokenizer, walk
from rim_dist.errors import ConfigError, DataError
from rim_dist.evaluation.evaluate import evaluation_samples, unknown_answers_note
from rim_dist.model.requirements import Requirements
from rim_dist.recipe import load_recipe
from rim_dist.tokens import add_memory_tokens, set_chat_template

Make = Callable[..., Path]


def open_prepared(path: Path, folder: Path) -> tuple[PreparedData, Requirements]:
    recipe = load_recipe(path)
    requirements = requirements_of(recipe)
    return prepare(recipe, requirements.tokenizer, requirements.tokens, requirements.positions, folder), requirements


def rows_of(tmp_path: Path, name: str, text: str | bytes, file_format: str) -> list[Sample | BadSample]:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return list(read_file(path, file_format, ColumnsSection()))


def test_gsm8k(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a.jsonl", "\n".join(FIXTURE_ROWS), "gsm8k")
    assert rows[0] == Sample("Tom has 3 bags of 4 nuts and eats 2. How many are left?", ("3*4=12", "12-2=10"), "10", 1)
    assert rows[3].steps == ()


def test_gsm8k_aug(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a.txt", "How many?||<<1+1=2>> <<2*3=6>> #### 1,006\n\nno bars\nq||<<1=1>>\n", "gsm8k_aug")
    assert rows[0] == Sample("How many?", ("1+1=2", "2*3=6"), "1006", 1)
    assert [(r.line, r.reason) for r in rows[1:]] == [(3, "no || between question and steps"), (4, "no answer")]


def test_bad_rows_carry_line_and_reason(tmp_path: Path) -> None:
    lines = [
        b'{"question": "q", "steps": ["a"], "answer": 3.0}',
        b'{"question": "", "answer": 1}',
        b'{"question": "q"}',
        b'{"question": "q", "answer": NaN}',
        b'{"question": "q", "answer": "inf"}',
        b'{"question": "q", "answer": null}',
        b'{"question": "q", "answer": "1"',
        b'{"question": "\xff", "answer": 1}',
        b"[1]",
        b'{"question": "q", "steps": 5, "answer": 1}',
        b'{"question": "q", "steps": "one\\n two", "answer": " 7 "}',
        b'{"question": "q", "answer": [1]}',
    ]
    rows = rows_of(tmp_path, "a.jsonl", b"\n".join(lines), "jsonl")
    assert rows[0] == Sample("q", ("a",), "3", 1)
    assert rows[10] == Sample("q", ("one", "two"), "7", 11)
    reasons = [(r.line, r.reason) for r in rows if isinstance(r, BadSample)]
    assert reasons == [
        (2, "no question"),
        (3, "missing column"),
        (4, "non-finite answer"),
        (5, "non-finite answer"),
        (6, "no answer"),
        (7, "not valid JSON"),
        (8, "not UTF-8"),
        (9, "not a JSON object"),
        (10, "steps are not a list of texts"),
        (12, "answer is list, not text or number"),
    ]


def test_only_groups_of_three_digits_lose_their_commas(tmp_path: Path) -> None:
    answers = {
        "1,072": "1072",
        "-12,345,678.50": "-12345678.50",
        "3,5": "3,5",
        "(1, 2)": "(1, 2)",
        "12,3": "12,3",
        "1,2,345": "1,2,345",
        "12,34": "12,34",
        "1,0000": "1,0000",
        "0,500": "0,500",
        "hall, 1,072 doors": "hall, 1072 doors",
    }
    texts = {
        "gsm8k": "\n".join(json.dumps({"question": "q", "answer": f"s\n#### {a}"}) for a in answers),
        "gsm8k_aug": "\n".join(f"q||<<1+1=2>> #### {a}" for a in answers),
    }
    for name, text in texts.items():
        rows = rows_of(tmp_path, "a", text, name)
        assert [row.answer for row in rows if isinstance(row, Sample)] == list(answers.values())


DEEP = "[" * 100_000 + "]" * 100_000
# What JSON lets through and no tokenizer, no float and no stack takes: as a line in the middle of a file, and its reason.
HOSTILE = [
    ('{"question": "a \\ud800 b", "answer": 1}', "half of a surrogate pair in the text (question)"),
    ('{"question": "q", "steps": ["a", "\\udfff"], "answer": 1}', "half of a surrogate pair in the text (steps)"),
    ('{"question": "q", "answer": "\\ud83d"}', "half of a surrogate pair in the text (answer)"),
    (f'{{"question": "q", "answer": {"9" * 400}}}', "non-finite answer"),
    (f'{{"question": "q", "answer": -{"9" * 5000}}}', "non-finite answer"),
    (f'{{"question": {"9" * 5000}, "answer": 1}}', "question is float, not text"),
    (f'{{"question": "q", "steps": [{"9" * 5000}], "answer": 1}}', "steps are not a list of texts"),
    (f'{{"question": "q", "answer": {DEEP}}}', "not valid JSON (nested too deeply)"),
    (DEEP, "not valid JSON (nested too deeply)"),
    ('{"question": [{"role": "user"}], "answer": 1}', "question is list, not text"),
    ('{"question": "q", "answer": true}', "answer is bool, not text or number"),
    ('{"question": "q", "answer": 1e400}', "non-finite answer"),
]
GOOD = '{"question": "red", "steps": ["hall"], "answer": "hall"}'


@pytest.mark.parametrize(("line", "reason"), HOSTILE, ids=[reason for _, reason in HOSTILE])
def test_hostile_rows_are_bad_samples(
    line: str, reason: str, recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    section = {"source": "jsonl", "path": str(data)}
    assert main(["data", str(recipe_file(data=section))]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"rim-dist: {data}:2: {reason}; correct it")
    assert len(error.splitlines()) == 1
    assert main(["data", str(recipe_file(data={**section, "on_bad_sample": "skip"}))]) == 0
    text = capsys.readouterr().out
    assert "3 rows, 2 used, 1 left out" in text
    assert f"left out: 1 x {reason.partition(' (')[0]}; first {data}:2" in text
    with pytest.raises(DataError, match=f"^{re.escape(f'{data}:2: {reason}')}$"):
        evaluation_samples(str(data), "auto", 9, ColumnsSection())


def test_hostile_rows_of_other_formats(tmp_path: Path) -> None:
    nines = "9" * 5000
    hard = f'{{"input": "q", "target": {nines}}}\n{{"input": "\\ud800", "target": 1}}\n{DEEP}'
    assert [r.reason for r in rows_of(tmp_path, "h.jsonl", hard, "gsm_hard") if isinstance(r, BadSample)] == [
        "non-finite answer",
        "half of a surrogate pair in the text",
        "not valid JSON",
    ]
    solved = f'{{"question": "q", "answer": "<<1>>\\ud800 #### 2"}}\n{{"question": "\\ud800", "answer": "#### 2"}}\n{DEEP}'
    rows = rows_of(tmp_path, "s.jsonl", solved, "gsm8k")
    assert rows[0] == Sample("q", ("1",), "2", 1)  # the half stands where nothing is read
    assert [r.line for r in rows if isinstance(r, BadSample)] == [2, 3]
    prosqa = f'[{{"question": "q", "answer": {nines}}}, {{"question": "\\ud800", "answer": "x"}}, {GOOD}]'
    rows = rows_of(tmp_path, "p.json", prosqa, "prosqa")
    assert rows == [
        BadSample(1, "non-finite answer"),
        BadSample(2, "half of a surrogate pair in the text", "question"),
        Sample("red", ("hall",), "hall", 3),
    ]
    with pytest.raises(DataError, match=r"not a JSON list of problems \(nested too deeply"):
        rows_of(tmp_path, "p.json", DEEP, "prosqa")
    (tmp_path / "r.jsonl").write_text(f'{{"a": {nines}}}')
    assert recognise(tmp_path / "r.jsonl") == "jsonl"
    (tmp_path / "r.jsonl").write_text(DEEP)
    with pytest.raises(DataError, match="format not recognised"):
        recognise(tmp_path / "r.jsonl")


def test_text_that_is_not_utf8_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    raw = pyarrow.array([b"a", b"\xff", b"c"], pyarrow.binary())
    questions = pyarrow.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2])  # unchecked, as writers leave it
    pyarrow.parquet.write_table(pyarrow.table({"question": questions, "answer": [1, 2, 3]}), tmp_path / "t.parquet")
    rows = list(read_file(tmp_path / "t.parquet", "parquet", ColumnsSection()))
    assert rows == [Sample("a", (), "1", 1), BadSample(2, "not UTF-8"), Sample("c", (), "3", 3)]


def test_byte_order_marks_are_read_away(tmp_path: Path, recipe_file: Make, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {
        "gsm8k": "\n".join(FIXTURE_ROWS),
        "gsm8k_aug": "q||<<1+1=2>> #### 2\nr||<<1+2=3>> #### 3",
        "gsm_hard": '{"input": "q", "target": 1}\n{"input": "r", "target": 2}',
        "jsonl": f"{GOOD}\n{GOOD}",
        "prosqa": f"[{GOOD}, {GOOD}]",
    }
    mark = "\ufeff"
    for name, text in texts.items():
        ending = ".json" if name == "prosqa" else ".jsonl"
        rows = rows_of(tmp_path, f"a{ending}", text, name)
        assert all(isinstance(row, Sample) for row in rows)
        assert rows_of(tmp_path, f"a{ending}", mark + text, name) == rows
        assert recognise(tmp_path / f"a{ending}") == name
        if name != "prosqa":  # two files joined
            assert len(rows_of(tmp_path, "a", f"{mark}{text}\n{mark}{text}", name)) == 2 * len(rows)
            assert not [r for r in rows_of(tmp_path, "a", f"{mark}{text}\n{mark}{text}", name) if isinstance(r, BadSample)]
    path = recipe_file()
    recipe = load_recipe(path)
    path.write_text(mark + path.read_text())
    assert load_recipe(path) == recipe
    (tmp_path / "w.jsonl").write_text(GOOD, encoding="utf-16")
    for command in (["data", str(recipe_file(data={"source": "jsonl", "path": str(tmp_path / "w.jsonl")}))],):
        assert main(command) == 2
        assert capsys.readouterr().err == f"rim-dist: {tmp_path / 'w.jsonl'}: the file is UTF-16; convert it to UTF-8\n"


def test_columns_that_no_row_has(tmp_path: Path, recipe_file: Make, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d.jsonl"
    row = {"Prompt": "red", "reasoning": ["hall"], "response": "hall", "\ud800": 1}
    data.write_text((json.dumps(row) + "\n") * 3)

    def says(on_bad_sample: str, **columns: str) -> str:
        section = {"source": "jsonl", "path": str(data), "columns": columns, "on_bad_sample": on_bad_sample}
        status = main(["data", str(recipe_file(data=section))])
        captured = capsys.readouterr()
        assert status == (2 if captured.err else 0)
        return captured.err or captured.out

    there = r"the columns are Prompt, reasoning, response, \ud800"
    right = {"question": "Prompt", "answer": "response", "steps": "reasoning"}
    message = f"rim-dist: {data}:1: missing column (prompt); {there}; did you mean Prompt?; correct it"
    assert says("refuse", **{**right, "question": "prompt"}).startswith(message)
    message = f"rim-dist: {data}: no usable sample in the data (3 rows: missing column, first {data}:1 (question); {there})\n"
    assert says("skip", answer="response") == message
    for mode in ("refuse", "skip"):
        message = (
            f"rim-dist: data.columns.steps: no row of {data} has the column resoning; {there}; did you mean reasoning?; null "
        )
        assert says(mode, **{**right, "steps": "resoning"}).startswith(message)
    assert "warning" not in says("refuse", **right)
    # Steps of the usual name may be missing, but a method that learns from them says so.
    message = (
        "warning: no sample has steps, and method rim learns from them: no row has the column steps (data.columns.steps); "
    )
    assert says("refuse", **{**right, "steps": "steps"}).splitlines()[0] == message + there
    stream = recipe_file(data={"source": "jsonl", "path": str(data), "columns": {**right, "steps": "x"}, "streaming": True})
    assert main(["data", str(stream)]) == 2
    assert "has the column x; " in capsys.readouterr().err
    # One row that has it is enough, wherever it stands.
    data.write_text(data.read_text() + json.dumps({"Prompt": "red", "step": [], "response": "hall"}) + "\n")
    assert "data.columns.steps" not in says("refuse", **{**right, "steps": "step"})


def test_columns_of_formats_with_names_of_their_own(tmp_path: Path) -> None:
    for name, text, missing, there in (
        ("gsm8k", '{"Question": "q", "answer": "#### 1"}', "question", "Question, answer; did you mean Question?"),
        ("gsm8k", '{"question": "q", "output": "#### 1"}', "answer", "question, output"),
        ("gsm_hard", '{"input": "q", "targets": 1}', "target", "input, targets; did you mean targets?"),
        ("prosqa", '[{"query": "q", "answer": "x"}]', "question", "query, answer"),
    ):
        (row,) = rows_of(tmp_path, "a.jsonl", text, name)
        assert isinstance(row, BadSample)
        assert f"{row.reason}{row.remark}" == f"missing column ({missing}); the columns are {there}"
    (row,) = rows_of(tmp_path, "a.jsonl", '{"question": "q", "answer": 3}', "gsm8k")
    assert row == BadSample(1, "answer is int, not text")


def test_methods_that_need_no_steps_do_not_ask_for_them(
    tmp_path: Path, recipe_file: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"question": "red", "answer": "hall"}\n')
    for method, stage1, asked in (
        ("direct", 64, 0),
        ("pause", 64, 0),
        ("cot", 64, 1),
        ("coconut", 64, 1),
        ("rim", 0, 0),
        ("rim", 64, 1),
    ):
        stages = {"stage1": {"samples": stage1, "max_steps": 4}, "stage2": {"samples": 64}}
        path = recipe_file(method=method, data={"source": "jsonl", "path": str(data)}, curriculum=stages)
        assert main(["data", str(path)]) == 0
        assert capsys.readouterr().out.count("warning: no sample has steps") == asked, method


def test_targets_of_unknown_text_are_counted(tmp_path: Path, recipe_file: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """The embedded task's tokenizer knows the words of the task and a few letters; no digit, no Greek."""
    data = tmp_path / "d.jsonl"
    rows = [("hall", "hall"), ("hall", "7"), ("\u03a9 9", "hall"), ("hall", "hall 7"), ("####", "####"), ("", "12")]
    data.write_text("".join(json.dumps({"question": "red", "steps": [s], "answer": a}) + "\n" for s, a in rows))
    path = recipe_file(data={"source": "jsonl", "path": str(data)}, evaluation={"data": str(data)})
    assert main(["data", str(path)]) == 0
    note = f"warning: 3 of 6 samples have a target of only unknown text to the tokenizer; first {data}:2"
    assert note in capsys.readouterr().out.splitlines()
    prepared, requirements = open_prepared(path, tmp_path / "c")
    assert prepared.report.notes(load_recipe(path)) == [note]
    assert open_prepared(path, tmp_path / "c")[0].report.notes(load_recipe(path)) == [note]  # from the cache
    samples = evaluation_samples(str(data), "auto", 9, ColumnsSection())
    note = "warning: 2 of 6 answers to evaluate are only unknown text to the tokenizer; first in line 2"
    assert unknown_answers_note(requirements.tokenizer, samples) == note
    assert unknown_answers_note(requirements.tokenizer, samples[2:5]) == ""


def test_a_stream_from_the_hub_that_breaks(recipe_file: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(f"{GOOD}\n" + "{" * 10)
    section = {"source": "hub", "id": str(tmp_path / "set"), "streaming": True}
    with pytest.raises(DataError, match=r"data\.id: .*cannot be loaded \("):
        list(read_source(load_recipe(recipe_file(data=section)).data, 0))


def test_gsm8k_without_marker(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "a.jsonl", '{"question": "q", "answer": "7"}\n{"question": "q"}', "gsm8k")
    assert [r.reason for r in rows] == ["no answer", "missing column"]


def test_prosqa_gsm_hard_and_parquet(tmp_path: Path) -> None:
    prosqa = rows_of(tmp_path, "p.json", json.dumps([{"question": "q", "steps": ["s"], "answer": "Tom is a x."}, 3]), "prosqa")
    assert prosqa[0] == Sample("q", ("s",), "Tom is a x.", 1)
    assert isinstance(prosqa[1], BadSample)
    hard = rows_of(tmp_path, "h.jsonl", '{"input": "q", "code": "c", "target": -2.5}', "gsm_hard")
    assert hard == [Sample("q", (), "-2.5", 1)]
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"question": ["a", None], "steps": [["x"], []], "answer": ["1", "2"]})
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    rows = list(read_file(tmp_path / "t.parquet", "parquet", ColumnsSection()))
    assert rows == [Sample("a", ("x",), "1", 1), BadSample(2, "no question")]
    (tmp_path / "bad.parquet").write_bytes(b"PAR1nothing")
    with pytest.raises(DataError, match="not a readable Parquet"):
        list(read_file(tmp_path / "bad.parquet", "parquet", ColumnsSection()))
    for text in ("{", '{"a": 1}'):
        with pytest.raises(DataError, match="not a JSON list"):
            rows_of(tmp_path, "b.json", text, "prosqa")


def test_formats_are_recognised(tmp_path: Path) -> None:
    texts = {
        "gsm8k": ("a.jsonl", FIXTURE_ROWS[0]),
        "gsm8k_aug": ("a.txt", "q||<<1+1=2>> #### 2"),
        "gsm_hard": ("h.jsonl", '{"input": "q", "target": 1}'),
        "jsonl": ("j.jsonl", '{"question": "q", "answer": "1"}'),
        "prosqa": ("p.json", "[{}]"),
    }
    for name, (file, text) in texts.items():
        (tmp_path / file).write_text(text)
        assert recognise(tmp_path / file) == name
    (tmp_path / "x.parquet").touch()
    assert recognise(tmp_path / "x.parquet") == "parquet"
    (tmp_path / "e.txt").write_text("\n")
    (tmp_path / "u.txt").write_text("hello")
    for file, message in (("e.txt", "empty"), ("u.txt", "not recognised"), ("none", "no such file")):
        with pytest.raises(DataError, match=message):
            recognise(tmp_path / file)


NEW_FORMAT = '''
from rim_dist.data.formats.base import Format, sample_of, text_lines
from rim_dist.data.samples import BadSample


class Tabs(Format):
    """Lines of question, steps and answer between tabs."""

    precedence = 9

    def recognises(self, path, line):
        return line is not None and line.count("\\t") > 1

    def read(self, path, columns):
        for number, text in text_lines(path):
            question, *steps, answer = text.split("\\t")
            yield sample_of(number, question, steps, answer) if answer else BadSample(number, "no answer")


FORMAT = Tabs()
'''


def test_a_new_format_is_one_file(
    tmp_path: Path, recipe_file: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in `rim_dist/data/formats` is enough: for recipes, their check, data, evaluation, commands and the reference."""
    from tiny_export import write_model

    import config_reference

    (tmp_path / "tabs.py").write_text(NEW_FORMAT)
    monkeypatch.setattr(rim_dist.data.formats, "__path__", [*rim_dist.data.formats.__path__, str(tmp_path)])
    file = tmp_path / "walks.txt"
    walks = list(SyntheticTask(2, 3).training(20, 0))
    file.write_text("".join("\t".join((p.question, *p.steps, p.answer)) + "\n" for p in walks) + "q\ts\t\n")
    assert recognise(file) == "tabs"
    path = recipe_file(data={"source": "tabs", "path": str(file), "on_bad_sample": "skip"}, evaluation={"data": str(file)})
    rows = list(read_source(load_recipe(path).data, 0))
    assert rows[:20] == [Sample(p.question, p.steps, p.answer, i) for i, p in enumerate(walks, 1)]
    assert rows[20] == BadSample(21, "no answer")
    assert main(["data", str(path)]) == 0
    assert "21 rows, 20 used, 1 left out" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"data\.source: 'tab' is not allowed; allowed: synthetic, hub, .*prosqa, tabs"):
        load_recipe(path, ["data.source=tab"])
    with pytest.raises(ConfigError, match="streaming is for hub, jsonl, parquet, not tabs"):
        load_recipe(path, ["data.streaming=true"])
    with pytest.raises(ConfigError, match=r"evaluation\.format: 'tab' is not allowed; allowed: auto, "):
        load_recipe(path, ["evaluation.format=tab"])
    model = write_model(tmp_path / "hf")
    command = ["evaluate", str(model), str(file), "--samples", "5", "--timed", "1", "--max-new-tokens", "4"]
    assert main([*command, "--format", "tabs"]) == main(command) == 0
    assert "- `tabs`: Lines of question, steps and answer between tabs." in config_reference.reference()


def test_answers_as_text() -> None:
    assert [answer_text(v) for v in (3, 3.0, -2.5, 9.28e12, " 7 ")] == ["3", "3", "-2.5", "9280000000000", "7"]
    assert [answer_text(Decimal(v)) for v in ("3.00", "-2.50", "9" * 76)] == ["3", "-2.50", "9" * 76]  # of Parquet
    assert [answer_text(v) for v in (1e-07, 0.1, 3.509e-07)] == ["1e-07", "0.1", "3.509e-07"]
    for value in (True, None, "", float("nan"), float("inf"), "-inf", [], 10**400, Decimal("nan")):
        with pytest.raises(ValueError, match="answer"):
            answer_text(value)


def test_synthetic_walks_are_right_and_sets_do_not_mix() -> None:
    assert all(sorted(m) == list(range(5)) for m in house_map())
    training = list(SyntheticTask(1, 5).training(3000, 0))
    held = list(SyntheticTask(1, 5).held_out(200, 0))
    assert not {p.question for p in training} & {p.question for p in held}
    assert {len(p.steps) for p in training} == {1, 2, 3, 4, 5}
    assert {len(p.steps) for p in held} == {5}
    assert list(SyntheticTask(1, 5).training(50, 0)) == training[:50]
    assert list(SyntheticTask(1, 5).training(50, 1)) != training[:50]
    problem = walk(0, [1, 2])
    from rim_dist.data.synthetic import DOORS, ROOMS

    start, between = ROOMS[0], ROOMS[house_map()[1][0]]
    end = ROOMS[house_map()[2][house_map()[1][0]]]
    assert problem.question == f"From the {start} take {DOORS[1]} {DOORS[2]}."
    assert problem.steps == (f"{start} {DOORS[1]} {between}", f"{between} {DOORS[2]} {end}")
    assert problem.answer == end
    assert walk(0, [1, 2], "room").steps == (between, end)


def test_refuse_and_skip(recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text('{"question": "a b", "steps": [], "answer": 1}\n{"question": "x"}\n')
    section = {"source": "jsonl", "path": str(data)}
    assert main(["data", str(recipe_file(data=section))]) == 2
    assert f"{data}:2: missing column (answer)" in capsys.readouterr().err
    assert main(["data", str(recipe_file(data={**section, "on_bad_sample": "skip"})), "--show", "1"]) == 0
    text = capsys.readouterr().out
    assert "2 rows, 1 used, 1 left out" in text
    assert f"1 x missing column; first {data}:2" in text


def test_show_says_what_template_and_formats_make_of_the_first_sample(
    recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text and token ids are those of plain transformers, line ends and special tokens visible."""
    byte_tokenizer("{{ bos_token }}user:\n{{ messages[0]['content'] }}\n\n").save_pretrained(tmp_path / "tokenizer")
    data = tmp_path / "d.jsonl"
    data.write_text('\n{"question": "3 ÷ 4?", "steps": ["3*4=12"], "answer": 12}\n{"question": "q", "answer": 1}\n')
    path = recipe_file(
        model={"tokenizer": str(tmp_path / "tokenizer")},
        memory={"blocks": 2},
        data={"source": "jsonl", "path": str(data), "step_format": "[{step}]"},
    )
    plain = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    plain.add_special_tokens({"additional_special_tokens": ["<|mem_begin|>", "<|mem|>", "<|mem_end|>"]})
    question = plain.apply_chat_template([{"role": "user", "content": "3 ÷ 4?"}], tokenize=False)
    texts = {
        "prompt": question + "<|mem_begin|><|mem|><|mem|><|mem_end|>" * 2,
        "step 1": "[3*4=12]</s>",
        "answer": "#### 12</s>",
    }
    expected = [f"{data}:2 as text:"]
    with_ids = expected[:]
    for name, text in texts.items():
        ids = plain(text, add_special_tokens=False)["input_ids"]
        expected.append(f"  {name} ({len(ids)} tokens): {text!r}")
        with_ids += [expected[-1], f"    {' '.join(map(str, ids))}"]
    assert main(["data", str(path), "--show"]) == 0
    text = capsys.readouterr().out
    assert "\n".join(expected) + "\n" in text
    assert "d.jsonl:3 as text" not in text
    one_step = "  after block 1 (1.000): '#### 12</s>'\n"
    assert (
        f"stage1, sample 1 ({data}:2): question, 1 blocks of 2 memory tokens, 1 readouts (weight of each token)\n{one_step}"
        in text
    )
    assert "  after block 1 (0.333): '#### 12</s>'\n  after block 2 (0.667): '#### 12</s>'\n" in text
    assert main(["data", str(path), "data.streaming=true", "--show", "2", "--ids"]) == 0
    text = capsys.readouterr().out
    assert "\n".join(with_ids) + "\n" in text
    assert "d.jsonl:3 as text" in text
    assert main(["data", str(path), "--ids"]) == 2
    assert "--ids: needs --show" in capsys.readouterr().err
    assert main(["data", str(path), "--tokens"]) == 2
    assert "--tokens: needs --show" in capsys.readouterr().err
    monkeypatch.setattr("rim_dist.training.show.sys", SimpleNamespace(stdout=SimpleNamespace(isatty=lambda: True)))
    monkeypatch.setenv("COLUMNS", "50")
    assert main(["data", str(path), "--show"]) == 0
    shown = capsys.readouterr().out.partition("as text:")[2].splitlines()
    broken = [line for line in shown if line.startswith("    ")]
    assert len(broken) >= 2
    assert max(map(len, broken)) <= 50


def test_empty_and_unusable_data(recipe_file: Make, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("")
    with pytest.raises(DataError, match=r"no usable sample in the data \(it has no rows"):
        open_prepared(recipe_file(data={"source": "jsonl", "path": str(data)}), tmp_path / "c")
    with pytest.raises(DataError, match="no such file"):
        open_prepared(recipe_file(data={"source": "jsonl", "path": str(tmp_path / "none")}), tmp_path / "c")


def test_too_long_too_many_steps_and_memory_text(recipe_file: Make, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    rows = [
        {"question": "From the hall take red.", "steps": ["hall"], "answer": "hall"},
        {"question": "red " * 200, "steps": [], "answer": "hall"},
        {"question": "From the hall take red.", "steps": ["hall"] * 5, "answer": "hall"},
        {"question": "From the <|mem|> take red.", "steps": [], "answer": "hall"},
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    section = {"source": "jsonl", "path": str(data), "on_bad_sample": "skip"}
    prepared, _ = open_prepared(recipe_file(data=section), tmp_path / "c")
    report = prepared.report
    assert (report.rows, report.used) == (4, 1)
    assert dict(report.skipped) == {
        "longer than 128 tokens": 1,
        "more than curriculum.stage1.max_steps=4 steps": 1,
        "the text contains a memory token": 1,
    }
    # A row holds all readouts, so it can be longer than any plain sequence that it stands for.
    prepared, _ = open_prepared(
        recipe_file(data=section, optimizer={"micro_batch_tokens": 20}, memory={"blocks": 2}), tmp_path / "c"
    )
    assert prepared.report.skipped["its row is above optimizer.micro_batch_tokens=20"] == 0
    with pytest.raises(DataError, match=r"no usable sample .*1 rows: its row is above optimizer.micro_batch_tokens=12"):
        open_prepared(recipe_file(data=section, optimizer={"micro_batch_tokens": 12}, memory={"blocks": 2}), tmp_path / "c")
    cut = {"stage1": {"samples": 64, "max_steps": 4, "longer": "truncate"}, "stage2": {"samples": 64}}
    prepared, _ = open_prepared(recipe_file(data=section, curriculum=cut), tmp_path / "c")
    assert (prepared.report.used, prepared.report.truncated) == (2, 1)
    assert len(prepared[1].steps) == 4


def test_a_target_that_ends_before_its_end_is_a_bad_sample(
    recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A server stops at the first end-of-text, so nothing after it could be learned; in a question it is text like any."""
    data = tmp_path / "d.jsonl"
    rows = [
        {"question": "What is </s> in red?", "steps": ["red"], "answer": "hall"},
        {"question": "red", "steps": ["red"], "answer": "hall</s>hall"},
        {"question": "red", "steps": ["red</s>", "blue"], "answer": "hall"},
        {"question": "red", "steps": [], "answer": "hall</s>"},
    ]
    data.write_text("\n".join(map(json.dumps, rows)))
    section = {"source": "jsonl", "path": str(data), "on_bad_sample": "skip"}
    prepared, requirements = open_prepared(recipe_file(data=section), tmp_path / "c")
    assert dict(prepared.report.skipped) == {"a step or the answer contains a token that ends answers": 3}
    plain = synthetic_tokenizer()
    assert prepared[0].answer.tolist() == [*plain("#### hall", add_special_tokens=False)["input_ids"], plain.eos_token_id]
    arguments = (load_recipe(recipe_file(data=section)), requirements.tokenizer, requirements.tokens, requirements.positions)
    red = plain.convert_tokens_to_ids("▁red")
    with pytest.raises(DataError, match="4 rows: a step or the answer contains"):  # another end: a turn's
        prepare(*arguments, tmp_path / "c", ends=[plain.eos_token_id, red])
    assert main(["data", str(recipe_file(data={**section, "on_bad_sample": "refuse"}))]) == 2
    assert f"{data}:2: a step or the answer contains a token that ends answers" in capsys.readouterr().err


def test_prepared_data_is_what_was_encoded(recipe_file: Make, tmp_path: Path) -> None:
    prepared, requirements = open_prepared(recipe_file(), tmp_path / "c")
    problems = list(SyntheticTask(1, 4).training(200, 0))
    assert len(prepared) == 200
    for i in (0, 7, 199):
        sample = prepared[i]
        decoded = requirements.tokenizer.decode(sample.question, skip_special_tokens=True)
        assert decoded == problems[i].question
        steps = [requirements.tokenizer.decode(s, skip_special_tokens=True) for s in sample.steps]
        assert tuple(steps) == problems[i].steps
        assert sample.answer[-1] == requirements.tokenizer.eos_token_id
        assert sample.line == i + 1


def test_every_sample_once_an_epoch_in_a_new_order(recipe_file: Make, tmp_path: Path) -> None:
    prepared, _ = open_prepared(recipe_file(), tmp_path / "c")
    epochs = [[prepared.index_at(e * 200 + i) for i in range(200)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(200))
    assert epochs[0] != epochs[1]


def _build(path: str, folder: str, out: object) -> None:
    prepared, _ = open_prepared(Path(path), Path(folder))
    out.put(len(prepared))  # type: ignore[attr-defined]


def test_cache_is_built_once_by_many_processes(recipe_file: Make, tmp_path: Path) -> None:
    queue = PROCESSES.Queue()
    processes = [PROCESSES.Process(target=_build, args=(str(recipe_file()), str(tmp_path / "c"), queue)) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=120) for _ in processes] == [200] * 3
    for process in processes:
        process.join()
    assert len([p for p in (tmp_path / "c").iterdir() if p.is_dir()]) == 1


def test_cache_in_a_place_that_cannot_be_written(recipe_file: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        open_prepared(recipe_file(), tmp_path / "file")


@pytest.mark.parametrize("damage", ["meta.json", "tokens.npy", "lines.npy"])
def test_tokenised_data_that_lost_a_file_is_encoded_again(recipe_file: Make, tmp_path: Path, damage: str) -> None:
    """As clusters clear shared disks: by the age of each file. A file that is cut short counts as lost."""
    for length in (None, 10):
        prepared, _ = open_prepared(recipe_file(), tmp_path / "c")
        questions = [prepared[i].question.tolist() for i in range(len(prepared))]
        (folder,) = (path for path in (tmp_path / "c").iterdir() if path.is_dir())
        if length is None:
            (folder / damage).unlink()
        else:
            os.truncate(folder / damage, length)
        again, _ = open_prepared(recipe_file(), tmp_path / "c")
        assert [again[i].question.tolist() for i in range(len(again))] == questions


def test_changed_data_is_encoded_again(recipe_file: Make, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    section = {"source": "jsonl", "path": str(data)}
    for count in (3, 4):
        data.write_text('{"question": "red", "answer": "hall"}\n' * count)
        prepared, _ = open_prepared(recipe_file(data=section), tmp_path / "c")
        assert len(prepared) == count


def _lower_case(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer._tokenizer.normalizer = normalizers.Lowercase()


# What may differ between two tokenizers.
OTHER_TOKENIZERS: dict[str, Callable[[PreTrainedTokenizerFast], Any]] = {
    "eos": lambda t: setattr(t, "eos_token", "!"),
    "bos": lambda t: setattr(t, "bos_token", "!"),
    "template": lambda t: setattr(t, "chat_template", t.chat_template + " now"),
    "normaliser": _lower_case,
    "added tokens": lambda t: t.add_tokens(["How"]),
    "special tokens": lambda t: t.add_special_tokens({"additional_special_tokens": ["##"]}),
}


@pytest.mark.parametrize("name", OTHER_TOKENIZERS)
def test_another_tokenizer_does_not_get_the_tokens_of_the_first(recipe_file: Make, tmp_path: Path, name: str) -> None:
    """In a shared folder: question and answer are what plain transformers makes of them with the tokenizer given."""
    data = tmp_path / "d.jsonl"
    data.write_text('{"question": "How many ARE 3 and 4?", "answer": "SEVEN"}')
    recipe = load_recipe(recipe_file(data={"source": "jsonl", "path": str(data)}))
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    seen = set()
    for change in (lambda _: None, OTHER_TOKENIZERS[name]):
        tokenizer, plain = byte_tokenizer(template), byte_tokenizer(template)
        for one in (tokenizer, plain):
            change(one)
        tokens = add_memory_tokens(tokenizer, recipe.memory)
        set_chat_template(tokenizer, recipe.memory, recipe.memory.blocks)
        sample = prepare(recipe, tokenizer, tokens, 128, tmp_path / "c")[0]
        asked = [{"role": "user", "content": "How many ARE 3 and 4?"}]
        assert sample.question.tolist() == plain.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert sample.answer.tolist() == [*plain("#### SEVEN", add_special_tokens=False)["input_ids"], plain.eos_token_id]
        seen.add((*sample.question, -1, *sample.answer))
    assert len(seen) == 2  # the two tokenizers do differ here


def test_a_local_hub_folder_that_changed_is_read_again(
    recipe_file: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    path = recipe_file(data={"source": "hub", "id": str(folder)})
    for number, answer in enumerate(("hall", "cold")):  # of one length
        (folder / "train.jsonl").write_text(f'{{"question": "red", "answer": "{answer}"}}\n')
        os.utime(folder / "train.jsonl", (1e9 + number, 1e9 + number))  # the cache of datasets goes by it
        prepared, requirements = open_prepared(path, tmp_path / "c")
        expected = requirements.tokenizer(f"#### {answer}", add_special_tokens=False)["input_ids"]
        assert prepared[0].answer.tolist() == [*expected, requirements.tokenizer.eos_token_id]


KEY = {
    True: "method=cot method=pause data.limit=9 data.max_tokens=99 data.answer_format=<{answer}> data.step_format=<{step}> "
    "data.on_bad_sample=skip data.columns.answer=a memory.blocks=2 memory.tokens_per_block=1 memory.end_token=<e> "
    "curriculum.stage1.max_steps=3 curriculum.stage1.longer=truncate curriculum.stage1.targets=same_step "
    "curriculum.stage2.samples=0 optimizer.micro_batch_tokens=99 run.seed=1 coconut.c_thought=1 coconut.max_latent_stage=1",
    False: "run.name=b run.output_dir=b memory.initialise=mean curriculum.stage1.samples=8 curriculum.stage1.learning_rate=1 "
    "curriculum.stage1.attention_dropout=0.1 curriculum.stage2.weight_power=0 curriculum.normalisation=sample "
    "optimizer.global_batch=8 "
    "optimizer.beta1=0 parallel.zero_stage=0 checkpoint.keep=1 evaluation.samples=4 logging.every_steps=1 model.dtype=bf16 "
    "data.cache_dir=b",
}


def test_the_key_of_tokenised_data_has_every_field_that_decides_a_token(recipe_file: Make) -> None:
    path = recipe_file()
    tokenizer = synthetic_tokenizer()

    def key(*overrides: str) -> str:
        return fingerprint(load_recipe(path, list(overrides)), tokenizer, 128)

    assert key() == key()
    for decides, overrides in KEY.items():
        for override in overrides.split():
            assert (key(override) != key()) is decides, override
    assert fingerprint(load_recipe(path), tokenizer, 127) != key()


NEW_METHOD = '''
from rim_dist.methods.cot import ChainOfThought


class Mine(ChainOfThought):
    """A chain of thought."""


METHOD = Mine
'''


def test_a_methods_own_settings_and_source_are_in_the_key(
    recipe_file: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class MineSection(Section):
        longest: int = 3

    class WithMine(Recipe):
        mine: MineSection = MineSection()

    (tmp_path / "mine.py").write_text(NEW_METHOD)
    monkeypatch.setattr(rim_dist.methods, "__path__", [*rim_dist.methods.__path__, str(tmp_path)])
    tree = load_recipe(recipe_file(method="mine")).model_dump()
    keys = []
    for mine, source in ({}, NEW_METHOD), ({"longest": 4}, NEW_METHOD), ({}, NEW_METHOD + "Mine.answer_factor = 2\n"):
        (tmp_path / "mine.py").write_text(source)
        keys.append(fingerprint(WithMine.model_validate({**tree, "mine": mine}), synthetic_tokenizer(), 128))
    assert len(set(keys)) == 3


def test_batches_cover_the_global_batch_on_any_number_of_ranks(recipe_file: Make, tmp_path: Path) -> None:
    path = recipe_file(
        optimizer={"global_batch": 10, "micro_batch_tokens": 90},
        curriculum={"stage1": {"samples": 23, "max_steps": 4}, "stage2": {"samples": 9}},
    )
    recipe = load_recipe(path)
    prepared, requirements = open_prepared(path, tmp_path / "c")
    plans = plan_stages(recipe, len(prepared))
    assert [(p.name, p.steps, p.first_sample, p.first_step) for p in plans] == [("stage1", 3, 0, 0), ("stage2", 1, 23, 3)]
    for plan in plans:
        for step in range(plan.steps):
            whole = BatchLoader(recipe, prepared, requirements.tokens, 0, 1).rank_batch(plan, step)
            for ranks in (2, 3, 4):
                rank_batches = [
                    BatchLoader(recipe, prepared, requirements.tokens, r, ranks).rank_batch(plan, step) for r in range(ranks)
                ]
                assert len({len(s.micro_batches) for s in rank_batches}) == 1  # ZeRO-3 hangs otherwise
                assert sum(s.weight for s in rank_batches) == pytest.approx(whole.weight)
                assert max(b.tokens for s in rank_batches for b in s.micro_batches) <= 90
                lines = sorted(x.line for s in rank_batches for part in s.samples for x in part)
                assert lines == sorted(x.line for part in whole.samples for x in part)
                total = sum(float(b.targets.weight.sum()) for s in rank_batches for b in s.micro_batches)
                assert total == pytest.approx(whole.weight, rel=1e-6)


def test_stream_is_resumable_by_position(recipe_file: Make, tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(json.dumps({"question": f"red {'blue ' * (i % 7)}", "answer": str(i)}) for i in range(40)))
    path = recipe_file(data={"source": "jsonl", "path": str(data), "streaming": True, "shuffle_buffer": 8})
    recipe = load_recipe(path)
    requirements = requirements_of(recipe)

    def stream() -> StreamedData:
        return StreamedData(recipe, requirements.tokenizer, requirements.tokens, requirements.positions)

    first = stream()
    straight = [s.line for s in first.samples(0, 60)]
    assert sorted(straight[:40]) == list(range(1, 41))
    assert straight[:40] != list(range(1, 41))
    assert [s.line for s in stream().samples(25, 60)] == straight[25:]
    assert [s.line for s in first.samples(5, 10)] == straight[5:10]  # going back starts the stream again
    assert len(first) == 0
    data.write_text("")
    with pytest.raises(DataError, match="no usable sample"):
        stream().samples(0, 1)


def test_hub_source_reads_through_datasets(recipe_file: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(
        '{"question": "red", "steps": ["hall"], "answer": "hall <<1>> #### hall"}\n{"text": "q||<<1>> #### 2"}\n'
    )
    for layout, expected in (("columns", "hall <<1>> #### hall"), ("gsm8k", "hall")):
        recipe = load_recipe(recipe_file(data={"source": "hub", "id": str(folder), "layout": layout, "streaming": True}))
        rows = list(read_source(recipe.data, 0))
        assert rows[0].answer == expected
    recipe = load_recipe(recipe_file(data={"source": "hub", "id": str(folder), "layout": "gsm8k_aug", "streaming": True}))
    rows = list(read_source(recipe.data, 0))
    assert [r.reason if isinstance(r, BadSample) else r.answer for r in rows] == ["missing column", "2"]
    with pytest.raises(DataError, match="cannot be loaded"):
        list(read_source(load_recipe(recipe_file(data={"source": "hub", "id": "nobody/nothing"})).data, 0))


def test_all_gsm8k_rows_are_accounted_for(gsm8k: Path, recipe_file: Make, tmp_path: Path) -> None:
    lines = sum(1 for line in gsm8k.open() if line.strip())
    rows = list(read_file(gsm8k, "gsm8k", ColumnsSection()))
    assert len(rows) == lines
    assert not [r for r in rows if isinstance(r, BadSample)]
    if lines == 7473:
        assert sum(not r.steps for r in rows) == 95
    path = recipe_file(data={"source": "gsm8k", "path": str(gsm8k), "on_bad_sample": "skip"})
    prepared, _ = open_prepared(path, tmp_path / "c")
    report = prepared.report
    assert report.rows == lines == report.used + sum(report.skipped.values())
    assert sum(report.steps.values()) == report.used == len(prepared)
    assert numpy.all(numpy.diff([prepared[i].line for i in range(len(prepared))]) > 0)
