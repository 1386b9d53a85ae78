"""`rim-dist init`: what it finds in files of every kind, and that its recipes are read, and train, as they are written."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from malformed import rows, write_folder
from ranks import run

from rim_dist.cli import main
from rim_dist.data.sources import read_source
from rim_dist.recipe import load_recipe

ROWS = rows()
EXPECTED = [(row["question"], tuple(row["steps"]), str(row["answer"])) for row in ROWS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("whole") / "inputs") / "model"


def _lines(folder: Path, name: str, made: list[dict]) -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


def _jsonl(folder: Path) -> Path:
    made = [{"id": i, "Problem": r["question"], "rationale": r["steps"], "target": r["answer"]} for i, r in enumerate(ROWS)]
    return _lines(folder, "a.jsonl", made)


def _gz(folder: Path) -> Path:
    path = folder / "b.jsonl.gz"
    path.write_bytes(gzip.compress(_jsonl(folder).read_bytes()))
    return path


def _csv(folder: Path) -> Path:
    path = folder / "c.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["prompt", "reasoning", "answer"])
        writer.writerows([r["question"], "\n".join(r["steps"]), r["answer"]] for r in ROWS)
    return path


def _parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), folder / "d.parquet")
    return folder / "d.parquet"


def _messages(folder: Path) -> Path:
    made = []
    for i, r in enumerate(ROWS):
        steps, answer = "\n".join(r["steps"]), str(r["answer"])
        reply = f"<think>\n{steps}\n</think>\n\n{answer}" if i % 2 else f"{steps}\n#### {answer}"
        turns = [{"role": "user", "content": r["question"]}, {"role": "assistant", "content": reply}]
        made.append({"messages": [{"role": "system", "content": "Be short."}, *turns]})
    made.append({"messages": made[0]["messages"] * 2})
    return _lines(folder, "e.jsonl", made)


def _sharegpt(folder: Path) -> Path:
    replies = ["\n".join([*r["steps"], str(r["answer"])]) for r in ROWS]
    pairs = zip(ROWS, replies, strict=True)
    turns = [[{"from": "human", "value": r["question"]}, {"from": "gpt", "value": reply}] for r, reply in pairs]
    return _lines(folder, "f.jsonl", [{"conversations": own} for own in turns])


def _folder(folder: Path) -> Path:
    (folder / "set" / "data").mkdir(parents=True)
    for name, part in (("train-00000-of-00002", ROWS[:10]), ("train-00001-of-00002", ROWS[10:]), ("test", ROWS[:2])):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), folder / "set" / "data" / f"{name}.parquet")
    return folder / "set"


def _alpaca(folder: Path) -> Path:
    path = folder / "g.json"
    path.write_text(json.dumps([{"instruction": r["question"], "cot": r["steps"], "output": r["answer"]} for r in ROWS]))
    return path


def _hub_gsm8k(folder: Path) -> Path:
    """As the hub has it: the solution, with its equations, and the answer in one column."""
    solutions = ["\n".join([f"So <<{step}>>." for step in r["steps"]] + [f"#### {r['answer']}"]) for r in ROWS]
    made = [{"question": r["question"], "answer": text} for r, text in zip(ROWS, solutions, strict=True)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(made), folder / "h.parquet")
    return folder / "h.parquet"


@pytest.mark.parametrize("make", [_alpaca, _hub_gsm8k, _jsonl, _gz, _csv, _parquet, _messages, _sharegpt, _folder])
def test_every_kind_becomes_a_recipe_that_reads_it(
    make: Callable[[Path], Path], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "r.yaml"
    assert main(["init", str(make(tmp_path)), "--model", str(model), "--output", str(output)]) == 0, capsys.readouterr()
    assert f"rim-dist train {output}" in capsys.readouterr().out
    recipe = load_recipe(output)
    assert [(s.question, s.steps, s.answer) for s in read_source(recipe.data, 0)] == EXPECTED
    assert (recipe.memory.blocks, recipe.curriculum.stage1.max_steps) == (2, 2)
    assert "1 x not one question and its answer" in output.read_text() or make is not _messages
    if make in (_messages, _hub_gsm8k):  # the whole way is the same for all
        assert main(["data", str(output)]) == 0
        assert f"{len(ROWS)} used" in capsys.readouterr().out
    before = output.read_bytes()
    assert main(["init", str(tmp_path), "--output", str(output)]) == 2
    assert output.read_bytes() == before


def test_the_recipe_trains(model: Path, tmp_path: Path) -> None:
    data = _jsonl(tmp_path).rename(tmp_path / "my train.jsonl")
    shutil.copy(data, tmp_path / "my test.jsonl")
    output = tmp_path / "mine.yaml"
    assert main(["init", str(data), "--model", str(model), "--output", str(output)]) == 0
    recipe = load_recipe(output)
    assert recipe.evaluation.data == str(tmp_path / "my test.jsonl")
    short = ["curriculum.stage1.epochs=1", "curriculum.stage2.epochs=1", f"run.output_dir={tmp_path}"]
    said = run("fork", 1, ["-m", "rim_dist", "train", str(output), *short]).stdout
    hf = tmp_path / "mine" / "hf"
    assert f"  rim-dist generate {hf} \"QUESTION\"\n  rim-dist evaluate {hf} '{recipe.evaluation.data}'\n" in said
    assert main(["generate", str(hf), ROWS[0]["question"], "--max-new-tokens", "4"]) == 0


def test_real_data(gsm8k: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.yaml"
    assert main(["init", str(gsm8k), "--output", str(output)]) == 0
    recipe = load_recipe(output)
    assert (recipe.data.source, recipe.data.path, recipe.data.step_format) == ("gsm8k", str(gsm8k), "<<{step}>>")
    assert 2 <= recipe.memory.blocks <= 8
    assert recipe.data.max_tokens is None
    assert recipe.optimizer.micro_batch_tokens >= 2048


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"foo": "a", "answer": 1}', [], "which column is the question? It has foo, answer; say --column question=NAME"),
        ('{"question": "a", "bar": 1}', ["--column", "answer=baz"], "--column: answer=baz: no such column in"),
        ('{"question": "a", "answer": 1}', ["--column", "reply=baz"], "--column: 'reply=baz' is not allowed"),
        ('{"question": " ", "answer": 1}', [], "no question; no row can be used"),
        ("", [], "the file is empty"),
        ('{"question": "a", "answer": 1}', ["--model", "./nowhere"], "./nowhere"),
        ('{"question": "a", "answer": 1}', ["--ask"], "--ask: nobody answers"),
    ],
)
def test_what_is_refused(
    content: str,
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: (_ for _ in ()).throw(EOFError))
    (tmp_path / "d.jsonl").write_text(content)
    assert main(["init", str(tmp_path / "d.jsonl"), "--output", str(tmp_path / "r.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.yaml").exists()


def test_questions_are_asked(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([str(model), "5", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(answers))
    assert main(["init", str(_jsonl(tmp_path)), "--ask", "--output", str(tmp_path / "mine.yaml")]) == 0
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert (recipe.model.init_from, recipe.memory.blocks, recipe.run.name) == (str(model), 5, "mine")
