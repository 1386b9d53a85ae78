"""Benchmarks are run by hand; that their recipes still are recipes is checked here."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
from ranks import ROOT

from rim_dist.recipe import validate_recipe


def test_recipes_of_benchmarks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    save, pipeline = importlib.import_module("save"), importlib.import_module("data_pipeline")
    for model in save.MODELS:
        assert validate_recipe(save.recipe_of(tmp_path, model, 6, True), model).checkpoint.background
    assert validate_recipe(pipeline.demo_recipe(str(tmp_path), 20), "pipeline").run.name == "pipeline"
