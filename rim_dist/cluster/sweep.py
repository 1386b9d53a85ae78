"""A search over learning rates: one run for each rate, and the best of them."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rim_dist.checkpoint.store import complete_checkpoints, read_state
from rim_dist.config import STAGE_NAMES, Recipe
from rim_dist.errors import ConfigError
from rim_dist.metrics import read_metrics


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ConfigError(f"learning rate {text!r} is not allowed; allowed: a number above 0")
    return value


def sweep_overrides(recipe: Recipe, rate: str) -> list[str]:
    """Overrides of the run with this rate: the first stage trains with it, the other keeps the recipe's ratio to the first."""
    rates = {n: recipe.curriculum.stage(n).learning_rate for n in STAGE_NAMES if recipe.curriculum.stage(n).enabled}
    factor = _rate(rate) / next(iter(rates.values()))
    changed = [f"curriculum.{name}.learning_rate={value * factor!r}" for name, value in rates.items()]
    return [f"run.name={recipe.run.name}-lr{rate}", *changed]


def _result(folder: Path) -> dict[str, Any] | None:
    """Accuracy and loss at the end of a finished run; None before that."""
    found = complete_checkpoints(folder / "checkpoints")
    if not found or not read_state(found[-1]).finished:
        return None
    lines = read_metrics(folder / "metrics.jsonl")
    last = {line["kind"]: line for line in lines}
    return {"accuracy": last.get("evaluation", {}).get("accuracy"), "loss": last["train"]["loss"]} if "train" in last else None


def best_run(recipe: Recipe, rates: Sequence[str]) -> dict[str, Any]:
    """The best finished run: highest final accuracy, then lowest final loss. Writes OUTPUT_DIR/NAME-sweep.json.

    Every task of the array calls it at its end; the last one to end writes the complete answer.
    """
    runs = {}
    for rate in rates:
        folder = Path(recipe.run.output_dir) / f"{recipe.run.name}-lr{rate}"
        runs[rate] = {"run": str(folder), **(_result(folder) or {"accuracy": None, "loss": None})}
    done = {rate: run for rate, run in runs.items() if run["loss"] is not None and math.isfinite(run["loss"])}
    best = max(done, key=lambda rate: (done[rate]["accuracy"] or 0.0, -done[rate]["loss"]), default=None)
    answer = {"best": best, "finished": len(done), "runs": runs}
    path = Path(recipe.run.output_dir) / f"{recipe.run.name}-sweep.json"
    own = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}")  # several tasks may end in the same moment
    own.write_text(json.dumps(answer, indent=1) + "\n", encoding="utf-8")
    os.replace(own, path)
    return answer
