"""What a run left on disk: recipe, metrics, evaluations, block budgets, analyses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rim_dist.errors import DataError
from rim_dist.evaluation.comparison import ANSWERS, read_answers
from rim_dist.metrics import MetricLine, read_metrics
from rim_dist.recipe import flatten
from rim_dist.report.document import Picture


@dataclass(frozen=True)
class EvaluationFolder:
    """What `evaluate` or a run's end wrote. `label` tells it apart from others on the page."""

    label: str
    figures: dict[str, Any]
    answers: list[dict[str, Any]]

    @property
    def correct(self) -> list[bool]:
        """Of the final block, by question."""
        return [bool(answer["correct"][-1]) for answer in self.answers]

    @property
    def questions(self) -> tuple[tuple[str, str], ...]:
        """Questions and targets. Evaluations with the same ones can be compared."""
        return tuple((answer["question"], answer["target"]) for answer in self.answers)


@dataclass(frozen=True)
class ResultFolder:
    """What `blocks` or `analyse` wrote: figures, and the pictures beside them."""

    label: str
    figures: dict[str, Any]
    pictures: list[Picture]


@dataclass
class RunFolder:
    """What a run left on disk, or a folder that only holds evaluations."""

    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    metrics: list[MetricLine] = field(default_factory=list)
    evaluations: list[EvaluationFolder] = field(default_factory=list)
    block_budgets: list[ResultFolder] = field(default_factory=list)
    analyses: list[ResultFolder] = field(default_factory=list)


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON or YAML file with a mapping in it. Raises DataError."""
    language, parse = ("JSON", json.loads) if path.suffix == ".json" else ("YAML", yaml.safe_load)
    try:
        tree = parse(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: not valid {language} ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path}: not a {language} object")
    return tree


def _result(path: Path, label: str) -> ResultFolder:
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in label)
    pictures = [Picture(f"{stem}-{p.stem}", f"{label}: {p.stem}", p.read_bytes()) for p in sorted(path.parent.glob("*.png"))]
    return ResultFolder(label, _mapping(path), pictures)


def collect(path: str | Path, name: str) -> RunFolder:
    """Read a run's folder, or one that evaluate, blocks or analyse wrote: the folder, its `report/`, and the folders in both.

    Raises DataError if there is nothing, or naming the file that cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    run = RunFolder(name)
    if (folder / "recipe.yaml").is_file():
        run.recipe = _mapping(folder / "recipe.yaml")
        run.metrics = read_metrics(folder / "metrics.jsonl")
    looked_at = [folder, folder / "report"]
    looked_at += sorted(child for parent in looked_at if parent.is_dir() for child in parent.iterdir() if child.is_dir())
    for found in dict.fromkeys(looked_at):
        inside = found.relative_to(folder).as_posix().removeprefix("report").strip("/.")
        label = f"{name}: {inside}" if inside else name
        if (found / "evaluation.json").is_file() and (found / ANSWERS).is_file():
            run.evaluations.append(EvaluationFolder(label, _mapping(found / "evaluation.json"), read_answers(found)))
        for written in ("blocks.json", "sweep.json"):  # by `rim-dist blocks`, and under its earlier name
            if (found / written).is_file():
                run.block_budgets.append(_result(found / written, label))
                break
        if (found / "analysis.json").is_file():
            run.analyses.append(_result(found / "analysis.json", label))
    if not (run.recipe or run.evaluations or run.block_budgets or run.analyses):
        raise DataError(f"{folder}: neither a run (recipe.yaml) nor written by evaluate, blocks or analyse")
    return run


def collect_all(paths: Sequence[str]) -> list[RunFolder]:
    """All folders, under the shortest ends of their paths that tell them apart."""
    parts = [Path(path).resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise DataError("the same folder is given twice")
    length = 1
    while len({p[-length:] for p in parts}) < len(parts):
        length += 1
    return [collect(path, "/".join(p[-length:])) for path, p in zip(paths, parts, strict=True)]


def differences(runs: Sequence[RunFolder]) -> dict[str, list[Any]]:
    """Fields of the recipes that are not the same in all runs, with each run's value (None where it has no such field)."""
    flat = [flatten(run.recipe) for run in runs]
    names = dict.fromkeys(name for leaves in flat for name in leaves if name != "run.name")
    table = {name: [leaves.get(name) for leaves in flat] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}
