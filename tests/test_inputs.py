"""A run goes on with the inputs it was started with, or is refused before a step; a change that is accepted is recorded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from malformed import rows, write_folder, write_rows
from ranks import run
from safetensors.torch import load_file, save_file

from rim_dist.checkpoint.store import find_checkpoint, read_inputs, read_state
from rim_dist.metrics import read_metrics


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of inputs with a run that has ended stage 1: 2 epochs of 24 rows, 6 steps."""
    folder = write_folder(tmp_path_factory.mktemp("half") / "inputs")
    recipe = folder / "recipe.yaml"
    text = recipe.read_text().replace("samples: 16", "epochs: 2", 1)
    _deepspeed(folder, 10_000)
    recipe.write_text(text.replace("zero_stage: 1", f"zero_stage: 1\n  deepspeed_config: {folder}/zero1.json"))
    run("fork", 1, ["-m", "rim_dist", "train", str(recipe), "--until", "stage1"])
    return Path(shutil.copytree(folder, folder.with_name("kept")))


@pytest.fixture
def half_done(kept: Path) -> Path:
    """The same where it was made: the recipe and its checkpoints name their files there."""
    folder = kept.with_name("inputs")
    shutil.rmtree(folder)
    return Path(shutil.copytree(kept, folder))


def _rows(changed: Callable[[list], list]) -> Callable[[Path], None]:
    return lambda folder: write_rows(folder, changed(rows()))


def _template(folder: Path) -> None:
    path = folder / "model" / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|end|>", "<|end|> "))


def _tokenizer(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    tree = json.loads(path.read_text())
    tree["model"]["merges"].pop()
    path.write_text(json.dumps(tree))


def _weights(folder: Path) -> None:
    path = folder / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def _deepspeed(folder: Path, bucket: int = 20_000) -> None:
    (folder / "zero1.json").write_text(json.dumps({"zero_optimization": {"stage": 1, "reduce_bucket_size": bucket}}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("data", _rows(lambda old: [*old, old[0]]), "data.rows: 24 there, 25 here"),
        ("data", _rows(lambda old: old[:-7]), "data.rows: 24 there, 17 here"),
        ("data", _rows(lambda old: old[::-1]), "data.content: "),
        ("template", _template, "template.content: "),
        ("tokenizer", _tokenizer, "tokenizer.tokenizer.json: "),
        ("weights", _weights, "weights.content: "),
        ("deepspeed", _deepspeed, "deepspeed.zero_optimization.reduce_bucket_size: 10000 there, 20000 here"),
    ],
)
def test_other_inputs_are_refused(half_done: Path, name: str, change: Callable[[Path], None], message: str) -> None:
    before = find_checkpoint(half_done / "runs" / "tiny")
    change(half_done)
    refused = run("fork", 1, ["-m", "rim_dist", "train", str(half_done / "recipe.yaml")], check=False)
    assert refused.returncode == 2, refused.stdout
    assert "was started with other inputs" in refused.stdout
    assert message in refused.stdout
    assert re.search(rf"run.accept_changes=\[[a-z,]*{name}", refused.stdout)
    assert find_checkpoint(half_done / "runs" / "tiny") == before


def test_accepted_change_keeps_the_plan_and_is_recorded(half_done: Path) -> None:
    """With other rows the stages keep their lengths; the start after that accepts nothing and is not asked again."""
    folder, train = half_done / "runs" / "tiny", ["-m", "rim_dist", "train", str(half_done / "recipe.yaml")]
    write_rows(half_done, rows()[:-7])
    run("fork", 1, [*train, "run.accept_changes=[data]"])
    done = find_checkpoint(folder)
    assert (read_state(done).step, read_state(done).finished) == (8, True)
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 9))
    (change,) = read_inputs(done)["changes"]
    assert change["after_step"] == 6
    assert "data.rows: 24 there, 17 here" in change["changes"]
    shutil.rmtree(folder / "hf")
    run("fork", 1, train)  # exports again
    assert (folder / "hf" / "config.json").is_file()


def test_unchanged_inputs_go_on_bit_for_bit(half_done: Path) -> None:
    train = ["-m", "rim_dist", "train", str(half_done / "recipe.yaml")]
    run("fork", 1, [*train, "run.name=whole"])
    run("fork", 1, train)
    left, right = (load_file(half_done / "runs" / name / "hf" / "model.safetensors") for name in ("whole", "tiny"))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
