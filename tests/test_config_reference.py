"""docs/configuration.md says what the configuration classes say."""

from __future__ import annotations

from pathlib import Path

import pytest

import config_reference
from rim_dist.recipe import field_names


def test_page_is_current() -> None:
    assert config_reference.main(["--check"]) == 0, "run python tools/config_reference.py"


def test_check_finds_an_outdated_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "docs" / "configuration.md"
    monkeypatch.setattr(config_reference, "PAGE", page)
    assert config_reference.main([]) == 0
    text = page.read_text(encoding="utf-8")
    assert text == config_reference.reference()
    page.write_text(text.replace("| `128` |", "| `64` |", 1), encoding="utf-8")
    assert not config_reference.is_current(page)
    assert config_reference.main(["--check"]) == 1
    assert "docs/configuration.md is out of date" in capsys.readouterr().err


def test_every_field_has_one_row() -> None:
    rows = []
    section = ""
    for line in config_reference.reference().splitlines():
        if line.startswith("## "):
            section = "" if line == "## The recipe" else line[3:] + "."
        elif line.startswith("| `"):
            rows.append(section + line.split("`")[1])
            assert len(line.replace(r"\|", "").strip("|").split("|")) == 4, line
    assert sorted(rows) == sorted(field_names())
