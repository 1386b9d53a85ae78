"""Shared pieces: a small recipe, a real tiny base model, real data where there is any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parent))

# One thread a process: several multi-rank tests share two cores, and equal threads mean equal rounding.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)  # this process read OMP_NUM_THREADS when it imported torch

TINY_MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
}

FIXTURE_ROWS = [
    json.dumps({"question": question, "answer": answer})
    for question, answer in (
        ("Tom has 3 bags of 4 nuts and eats 2. How many are left?", "3*4=<<3*4=12>>12\n12-2=<<12-2=10>>10\n#### 10"),
        ("A pen costs 2 and a book 5. What do 2 pens and a book cost?", "<<2*2=4>>4\n<<4+5=9>>9\n#### 9"),
        ("What is left of 1,000 after paying 250?", "<<1000-250=750>>750\n#### 750"),
        ("How many days are in a week?", "Seven.\n#### 7"),
    )
]


def tiny_recipe(folder: Path, **sections: object) -> dict:
    """A recipe of seconds: from scratch, the embedded task, a few steps a stage. Sections given replace fields."""
    recipe: dict = {
        "method": "rim",
        "run": {"name": "tiny", "output_dir": str(folder), "seed": 0},
        "model": {"config": dict(TINY_MODEL), "tokenizer": "synthetic", "dtype": "fp32"},
        "memory": {"blocks": 3, "tokens_per_block": 2},
        "data": {"source": "synthetic", "synthetic": {"samples": 200, "min_steps": 1, "max_steps": 4}},
        "curriculum": {
            "stage1": {"samples": 64, "learning_rate": 1e-3, "max_steps": 4},
            "stage2": {"samples": 64, "learning_rate": 5e-4},
        },
        "optimizer": {"global_batch": 16, "micro_batch_tokens": 300},
        "parallel": {"zero_stage": 1, "timeout_seconds": 120},
        "checkpoint": {"every_steps": 3},
        "evaluation": {"samples": 8, "max_new_tokens": 3},
    }
    for name, value in sections.items():
        if isinstance(value, dict):
            recipe[name] = {**recipe.get(name, {}), **value}
        else:
            recipe[name] = value
    return recipe


def partitioned(folder: Path) -> str:
    """A ZeRO-3 configuration in which even the tiny model's parameters are really partitioned."""
    path = folder / "zero3.json"
    tree = json.loads((Path(__file__).parents[1] / "ds_configs" / "zero3.json").read_text())
    tree["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path.write_text(json.dumps(tree))
    return str(path)


def write_recipe(path: Path, recipe: dict) -> Path:
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


# Files of the longest tests, which start first where several files run at once.
LONGEST = ("parallel", "parity", "parallel_families", "reshape", "slurm_jobs", "run", "export", "resume", "preflight")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: files.index(item.path.name) if item.path.name in files else len(files))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Coverage pauses during tests marked `untraced`, with what their fixtures do."""
    tracer = sys.gettrace()
    if item.get_closest_marker("untraced"):
        sys.settrace(None)
    try:
        return (yield)
    finally:
        sys.settrace(tracer)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a tiny recipe with the given sections and return its path; runs go to the test's folder."""

    def make(**sections: object) -> Path:
        return write_recipe(tmp_path / "recipe.yaml", tiny_recipe(tmp_path / "runs", **sections))

    return make


@pytest.fixture
def plain_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own `F.linear`: DeepSpeed replaces it in the whole process once an engine has partitioned a model itself."""
    monkeypatch.setattr(torch.nn.functional, "linear", torch._C._nn.linear)


@pytest.fixture(scope="session")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GSM8K's train.jsonl from RIM_DIST_DATA, or a small file of the project's own in its format."""
    if folder := os.environ.get("RIM_DIST_DATA"):
        return Path(folder) / "gsm8k" / "train.jsonl"
    print("no data: RIM_DIST_DATA is not set; using the project's own fixture")
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    path.write_text("\n".join(FIXTURE_ROWS * 5) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def plain_logits_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What verification asks of a new process is computed in this one; `--verify` elsewhere starts the new one."""
    from rim_dist.evaluation import plain_logits, verify

    def run_here(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        plain_logits.main(*command[-3:])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(plain_logits, "sys", SimpleNamespace(modules={}))
    monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run_here))
