"""The command line itself: help, versions, suggestions, and what is refused before anything slow is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from ranks import environment

from rim_dist.cli import build_parser, main
from rim_dist.recipe import _nearest


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


@pytest.mark.parametrize(("given", "shown"), [([], "usage: rim-dist [-h]"), (["convert"], "usage: rim-dist convert [-h]")])
def test_alone_it_prints_help(given: list[str], shown: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(given) == 0
    assert capsys.readouterr().out.startswith(shown)


def test_versions_for_a_report_of_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("torch", "transformers", "deepspeed", "peft"):
        assert f"{name} {metadata.version(name)}" in lines
    assert lines[-1].startswith("CUDA ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["trian", "r.yaml"], "'trian' is not known; did you mean train?"),
        (["convert", "reshpae"], "'reshpae' is not known; did you mean reshape?"),
        (["train", "r.yaml", "--untill", "stage1"], "unknown: --untill; did you mean --until?"),
        (["train", "r.yaml", "--until", "stage3"], "'stage3' is not known; did you mean stage1?"),
        (["export", "a", "b", "--dtyp=bf17"], "'bf17' is not known; did you mean bf16?"),
        (["evaluate", "a", "b", "c", "d"], "unknown: c d"),
        (["qqq"], "choose from train, init, prefetch, "),
    ],
)
def test_what_is_near_is_suggested(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_overrides_may_follow_options() -> None:
    arguments = build_parser().read(["train", "r.yaml", "run.seed=1", "--until", "stage1", "run.name=b", "method=cot"])
    assert arguments.overrides == ["run.seed=1", "run.name=b", "method=cot"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("optimizer.learning_rate", "curriculum.stage1.learning_rate or curriculum.stage2.learning_rate"),
        ("optimizr.beta1", "optimizer.beta1"),
        ("stage1.epochs", "curriculum.stage1.epochs"),
        ("curiculum.stage2.epochs", "curriculum.stage2.epochs"),
        ("zero_stage", "parallel.zero_stage"),
        ("checkpoint.kezep", "checkpoint.keep"),
        ("optimizer.lr", "curriculum.stage1.learning_rate or curriculum.stage2.learning_rate"),
        ("data.file", "data.path"),
        ("training.batch_size", "optimizer.global_batch"),
    ],
)
def test_fields_are_suggested_from_the_whole_recipe(given: str, meant: str) -> None:
    assert _nearest(given) == f"; did you mean {meant}?"


@pytest.mark.parametrize("command", ["train", "data", "prefetch"])
@pytest.mark.parametrize("where", ["override", "recipe"])
def test_a_typo_is_refused_before_torch_is_loaded(command: str, where: str, recipe_file: Callable[..., Path]) -> None:
    path, overrides = recipe_file(), ["memory.bloks=3"]
    if where == "recipe":
        tree = yaml.safe_load(path.read_text())
        tree["memory"]["bloks"] = 3
        path.write_text(yaml.safe_dump(tree))
        overrides = []
    code = (
        "import sys; from rim_dist.cli import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'numpy', 'transformers'} & {*sys.modules}, 'slow'; sys.exit(status)"
    )
    command_line = [sys.executable, "-c", code, command, str(path), *overrides]
    ended = subprocess.run(command_line, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "did you mean memory.blocks?" in ended.stderr


def test_an_unknown_family_gets_three_names(recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(recipe_file()), "model.config.model_type=lama"]) == 2
    said = capsys.readouterr().err
    assert "model.config.model_type: 'lama' is no family of transformers; near to it: llama" in said
    assert len(said) < 200


@pytest.mark.parametrize(
    ("typed", "offered"), [("rim-dist tra", "train"), ("rim-dist train r.yaml optimizer.be", "optimizer.beta1=")]
)
def test_the_shell_completes(typed: str, offered: str) -> None:
    pytest.importorskip("argcomplete")
    code = "import os, sys; os.dup2(1, 8); from rim_dist.cli import main; main([])"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": typed, "COMP_POINT": str(len(typed)), "_ARGCOMPLETE_IFS": "\n", "COMP_TYPE": "9"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment(**asked), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert offered in ended.stdout.split("\n")
