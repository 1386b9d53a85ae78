"""Checkpoints for any number of ranks: whole tensors by name, in safetensors, with the optimizer's moments or without.

`checkpoint/reshape.py` makes them. A run that goes on from one writes ordinary checkpoints of its own ranks.

portable/portable.safetensors (or shards and their index)   weight/NAME, exp_avg/NAME, exp_avg_sq/NAME
portable/portable.json    whose names they are (`module`: the trained module's; `model`: the plain model's), step counts
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rim_dist.checkpoint import store
from rim_dist.checkpoint.assemble import Workers, index_text, plan_files, write_all
from rim_dist.checkpoint.shards import MOMENTS, ShardIndex
from rim_dist.checkpoint.store import MODEL, PORTABLE, TrainingState
from rim_dist.checkpoint.tensors import ModelTensor, forget_files, read_folder_index
from rim_dist.config import Recipe
from rim_dist.errors import CheckpointError
from rim_dist.files import require_room, write_atomically
from rim_dist.recipe import dump_recipe

Names = Literal["module", "model"]
_SHARD_BYTES = 2 * 10**9
_DESCRIPTION = "portable.json"


@dataclass(frozen=True)
class Portable:
    names: Names
    index: ShardIndex


def is_portable(checkpoint: Path) -> bool:
    return (checkpoint / PORTABLE).is_dir()


def starts_fresh(checkpoint: Path) -> bool:
    """Whether a checkpoint holds a plain model's weights and no optimizer: the start of a stage."""
    return is_portable(checkpoint) and read_portable(checkpoint / PORTABLE).names == "model"


def read_portable(folder: Path) -> Portable:
    """Index a `portable/` folder. Raises CheckpointError."""
    try:
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        names, steps = description["names"], {k: float(v) for k, v in description["steps"].items()}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / _DESCRIPTION}: cannot be read ({error})") from None
    index = ShardIndex(moments={kind: {} for kind in MOMENTS}, steps=steps)
    for name, stored in read_folder_index(folder, "portable").items():
        kind, _, parameter = name.partition("/")
        target = index.weights if kind == "weight" else index.moments.get(kind)
        if target is None:
            raise CheckpointError(f"{folder}: {name}: unknown kind of tensor")
        target[parameter] = stored
    return Portable(names, index)


def write_run(
    run: Path,
    recipe: Recipe,
    state: TrainingState,
    tensors: dict[str, ModelTensor],
    description: dict[str, Any],
    write_model: Callable[[Path], None],
    workers: Workers,
) -> Path:
    """A run folder with one portable checkpoint in it, ready for `rim-dist train RUN/recipe.yaml`."""
    checkpoints = run / "checkpoints"
    partial = store.partial_folder(checkpoints, state.step)
    files = plan_files(tensors, None, _SHARD_BYTES, "portable")
    begun = False

    def begin() -> None:
        nonlocal begun
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise CheckpointError(f"{run}: already holds something; choose another folder")
        begun = True
        checkpoints.mkdir(parents=True, exist_ok=True)
        require_room(sum(file.data_bytes for file in files), checkpoints, run)
        store.start_writing(checkpoints, state.step)
        (partial / PORTABLE).mkdir()

    try:
        workers.on_first(begin)
        records = write_all(partial / PORTABLE, files, workers)

        def finish() -> None:
            if len(files) > 1:
                index = partial / PORTABLE / "portable.safetensors.index.json"
                index.write_text(index_text(files), encoding="utf-8")
            (partial / PORTABLE / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
            write_model(partial / MODEL)
            named = {f"{PORTABLE}/{name}": record for name, record in records.items()}
            store.announce(partial, state, dump_recipe(recipe), named)
            write_atomically(run / "recipe.yaml", dump_recipe(recipe))

        workers.on_first(finish)
    except BaseException as error:
        if begun:  # on the first rank; what is left of it would stand in the way of another try
            shutil.rmtree(run, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{run}: cannot be written ({error.strerror or error})") from None
        raise
    finally:
        forget_files()
    return run
