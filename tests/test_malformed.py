"""Malformed recipes, rows, templates, tokenizers and model folders: each one message, exit status 2, nothing written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from malformed import Case, cases, copy_of, page, write_folder
from ranks import run

from rim_dist.cli import main

CASES = [case for found in cases().values() for case in found]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("whole") / "inputs")


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_there_are_enough() -> None:
    assert len(CASES) >= 100
    assert len({case.name for case in CASES}) == len(CASES)


def test_page_is_current() -> None:
    text = (Path(__file__).parents[1] / "docs" / "checks.md").read_text(encoding="utf-8")
    assert text == page(), "run python tests/malformed.py"


def test_the_inputs_train_as_they_are(whole: Path, tmp_path: Path) -> None:
    folder = copy_of(whole, tmp_path / "inputs")
    run("fork", 1, ["-m", "rim_dist", "train", str(folder / "recipe.yaml")])
    assert (folder / "runs" / "tiny" / "hf" / "model.safetensors").is_file()


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_is_refused(case: Case, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = copy_of(whole, tmp_path / "inputs")
    case.change(folder)
    before = _files(folder)
    status = main(["train", str(folder / "recipe.yaml")])
    said = capfd.readouterr()
    assert (status, said.out) == (2, ""), said
    assert "Traceback" not in said.err
    assert said.err.startswith("rim-dist: ")
    assert len(said.err.splitlines()) <= 3, said.err
    for pattern in case.names:
        assert re.search(pattern, said.err), (pattern, said.err)
    assert _files(folder) == before
