"""The command line itself: help, versions, suggestions, and what is refused before anything slow is imported."""

from __future__ import annotations

import sys
from importlib import metadata

import pytest

from rim_dist.cli import main


def test_another_version_is_refused_with_the_line_that_installs_the_right_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    versions, real = {"transformers": "4.57.1", "torch": "2.13.0+cpu"}, metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: versions.get(name) or real(name))
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch>=2.13", "transformers>=5.23", 'nothing>=1; extra == "x"'])
    assert main(["train", "nowhere.yaml"]) == 2
    said = capsys.readouterr().err
    assert "transformers 4.57.1 (needs >=5.23)" in said
    assert said.rstrip().endswith("-m pip install 'transformers>=5.23'")
    assert len(said.splitlines()) == 2
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch>=2.13", "nothing>=1"])  # missing: refused by who needs it
    assert main(["train", "nowhere.yaml"]) == 2
    assert "nowhere.yaml: no such recipe" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)

    def needs_it(_: object) -> int:
        import deepspeed  # noqa: F401

        return 0

    monkeypatch.setattr("rim_dist.cli._prefetch", needs_it)
    assert main(["prefetch", "nowhere.yaml"]) == 2
    assert "rim-dist: deepspeed is not installed; `rim-dist version` lists what is needed" in capsys.readouterr().err
