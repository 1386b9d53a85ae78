"""Check that a recipe may run in its folder. Imports no torch: it runs before anything is started or queued."""

from __future__ import annotations

import os
from typing import Any

from rim_dist.config import Recipe
from rim_dist.errors import ConfigError
from rim_dist.recipe import load_recipe
from rim_dist.training.lease import OWNER

# Fields that may change when a run is resumed: they do not change what is trained.
_FREE_FIELDS = (
    "logging",
    "checkpoint",
    "evaluation",
    "run.output_dir",
    "run.accept_changes",
    "parallel.timeout_seconds",
    "parallel.preflight",
    "parallel.preflight_seconds",
    "parallel.sequence_mode",
    "data.cache_dir",
)
_DEGREES = ("parallel.tensor", "parallel.sequence")


def _difference(old: Any, new: Any, path: str = "") -> list[str]:
    if any(path == free or path.startswith(free + ".") for free in _FREE_FIELDS):
        return []
    if path == "model.dtype" and "auto" in (old, new):  # written by `from-hf`, or seen where nothing is trained
        return []
    if isinstance(old, dict) and isinstance(new, dict) and path != "model.config":
        return [d for k in old.keys() | new.keys() for d in _difference(old.get(k), new.get(k), f"{path}.{k}".lstrip("."))]
    return [] if old == new else [f"{path}: {old!r} there, {new!r} here"]


def check_run_folder(recipe: Recipe) -> None:
    """Refuse a folder that cannot be written or that holds a run with another recipe. Writes nothing."""
    folder = recipe.folder
    ancestor = folder
    while not ancestor.exists():
        ancestor = ancestor.parent
    if not ancestor.is_dir() or not os.access(ancestor, os.W_OK):
        raise ConfigError(f"run.output_dir: {ancestor} is not a writable folder")
    if (folder / "recipe.yaml").is_file():
        there = load_recipe(folder / "recipe.yaml", written=True)
        differences = _difference(there.model_dump(mode="json"), recipe.model_dump(mode="json"))
        if differences and all(line.startswith(_DEGREES) for line in differences):
            degrees = f"--tensor {recipe.parallel.tensor} --sequence {recipe.parallel.sequence} --data N"
            raise ConfigError(
                f"{folder} holds a run of other degrees ({'; '.join(sorted(differences))}); make one for these: "
                f"rim-dist convert reshape {folder} OUT {degrees}"
            )
        if differences:
            raise ConfigError(
                f"{folder} holds a run with another recipe ({'; '.join(sorted(differences)[:5])}); "
                "choose another run.name, or remove the folder to start over"
            )
    elif folder.is_dir() and any(p.name not in ("data", "logs", OWNER) for p in folder.iterdir()):
        raise ConfigError(f"{folder}: not empty and not a run of rim_dist; choose another run.name")
