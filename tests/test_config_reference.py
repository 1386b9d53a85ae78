"""docs/configuration.md says what the configuration classes say, docs/metrics.md what the list of metrics says."""

from __future__ import annotations

from pathlib import Path

import pytest

import config_reference
from rim_dist.recipe import field_names


def test_pages_are_current() -> None:
    assert config_reference.main(["--check"]) == 0, "run python tools/config_reference.py"


@pytest.mark.parametrize(
    ("name", "old", "new"), [("configuration.md", "| `128` |", "| `64` |"), ("metrics.md", " in nats", " in bits")]
)
def test_check_finds_an_outdated_page(
    name: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(config_reference, "DOCS", tmp_path / "docs")
    assert config_reference.main([]) == 0
    page = tmp_path / "docs" / name
    text = page.read_text(encoding="utf-8")
    assert text == config_reference.PAGES[name]()
    assert old in text
    assert config_reference.main(["--check"]) == 0
    page.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert config_reference.main(["--check"]) == 1
    assert f"docs/{name} is out of date" in capsys.readouterr().err


def test_every_field_has_one_row() -> None:
    rows = []
    section = head = ""
    for line in config_reference.reference().splitlines():
        if line.startswith("## "):
            section = "" if line == "## The recipe" else line[3:] + "."
        elif line.startswith("| ") and not line.startswith("| `"):
            head = line
        elif line.startswith("| `") and head.startswith("| field |"):
            rows.append(section + line.split("`")[1])
            assert len(line.replace(r"\|", "").strip("|").split("|")) == 4, line
    assert sorted(rows) == sorted(field_names())
