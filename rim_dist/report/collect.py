"""What a run left on disk: recipe, metrics, evaluations, sweeps, analyses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rim_dist.errors import DataError
from rim_dist.evaluation.comparison import ANSWERS, read_answers
from rim_dist.training.metrics import Metrics, read_metrics


@dataclass(frozen=True)
class Evaluated:
    """An evaluation folder. `label` tells it apart from others on the page."""

    label: str
    figures: dict[str, Any]
    answers: list[dict[str, Any]]

    @property
    def correct(self) -> list[bool]:
        """Of the final block, by question."""
        return [bool(answer["correct"][-1]) for answer in self.answers]

    @property
    def asked(self) -> tuple[tuple[str, str], ...]:
        """The questions and targets: evaluations that asked the same can be compared."""
        return tuple((answer["question"], answer["target"]) for answer in self.answers)


@dataclass(frozen=True)
class Pictured:
    """Figures of a sweep or an analysis, and the pictures beside them by name."""

    label: str
    figures: dict[str, Any]
    pictures: dict[str, bytes]


@dataclass
class RunFacts:
    """One run, or a folder that only holds evaluations."""

    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: list[Metrics] = field(default_factory=list)
    evaluations: list[Evaluated] = field(default_factory=list)
    sweeps: list[Pictured] = field(default_factory=list)
    analyses: list[Pictured] = field(default_factory=list)

    def lines(self, kind: str) -> list[Metrics]:
        """Lines of metrics.jsonl of one kind: `train` or `evaluation`."""
        return [line for line in self.metrics if line.get("kind") == kind]


def _json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: not a JSON object")
    return tree


def _recipe(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    return tree if isinstance(tree, dict) else {}


def _pictured(path: Path, label: str) -> Pictured:
    return Pictured(label, _json(path), {p.stem: p.read_bytes() for p in sorted(path.parent.glob("*.png"))})


def collect(path: str | Path, name: str) -> RunFacts:
    """Read a run's folder, or one that evaluate, blocks or analyse wrote.

    Looked at: the folder itself, its `report/`, and the folders in both. Raises DataError if there is nothing, or naming the
    file that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    run = RunFacts(name)
    if (folder / "recipe.yaml").is_file():
        run.recipe = _recipe(folder / "recipe.yaml")
        run.metrics = read_metrics(folder / "metrics.jsonl")
    places = [folder, folder / "report"]
    places += sorted(child for place in places if place.is_dir() for child in place.iterdir() if child.is_dir())
    for place in dict.fromkeys(places):
        inside = place.relative_to(folder).as_posix().removeprefix("report").strip("/.")
        label = f"{name}: {inside}" if inside else name
        if (place / "evaluation.json").is_file() and (place / ANSWERS).is_file():
            run.evaluations.append(Evaluated(label, _json(place / "evaluation.json"), read_answers(place)))
        for written in ("blocks.json", "sweep.json"):  # by `rim-dist blocks`, and under its earlier name
            if (place / written).is_file():
                run.sweeps.append(_pictured(place / written, label))
                break
        if (place / "analysis.json").is_file():
            run.analyses.append(_pictured(place / "analysis.json", label))
    if not (run.recipe or run.evaluations or run.sweeps or run.analyses):
        raise DataError(f"{folder}: neither a run (recipe.yaml) nor written by evaluate, blocks or analyse")
    return run


def collect_all(paths: Sequence[str]) -> list[RunFacts]:
    """All of them, under the shortest names that tell them apart (the last parts of their paths)."""
    parts = [Path(path).resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise DataError("the same folder is given twice")
    length = 1
    while len({p[-length:] for p in parts}) < len(parts):
        length += 1
    return [collect(path, "/".join(p[-length:])) for path, p in zip(paths, parts, strict=True)]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names of all leaves."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def differences(runs: Sequence[RunFacts]) -> dict[str, list[Any]]:
    """Fields of the recipes that are not the same in all runs, with each run's value (None where it has no such field)."""
    flat = [flatten(run.recipe) for run in runs]
    names = dict.fromkeys(name for leaves in flat for name in leaves if name != "run.name")
    table = {name: [leaves.get(name) for leaves in flat] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}
