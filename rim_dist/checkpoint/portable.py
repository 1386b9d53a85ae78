"""Checkpoints for any number of ranks: whole tensors by name, in safetensors, with the optimizer's moments or without.

`checkpoint/reshape.py` makes them. A run that goes on from one writes ordinary checkpoints of its own ranks.

portable/portable.safetensors (or shards and their index)   weight/NAME, exp_avg/NAME, exp_avg_sq/NAME
portable/portable.json    `names`: NAME is that of the trained `module` or of the plain `model`; `steps`: step counts
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from rim_dist.checkpoint import store
from rim_dist.checkpoint.safetensors_files import plan_files, read_folder_index, write_folder, write_index
from rim_dist.checkpoint.store import MODEL, PORTABLE, TrainingState
from rim_dist.checkpoint.stored_tensors import StoredTensor, as_model_tensors
from rim_dist.checkpoint.workers import Workers
from rim_dist.checkpoint.zero_shards import TensorIndex
from rim_dist.config import Recipe
from rim_dist.errors import CheckpointError
from rim_dist.files import FileRecord, write_atomically
from rim_dist.recipe import dump_recipe

Names = Literal["module", "model"]
_SHARD_BYTES = 2 * 10**9
_DESCRIPTION = "portable.json"


def is_portable(checkpoint: Path) -> bool:
    return (checkpoint / PORTABLE).is_dir()


def starts_fresh(checkpoint: Path) -> bool:
    """Whether a checkpoint holds a plain model's weights without an optimizer: the start of a stage."""
    return is_portable(checkpoint) and read_portable(checkpoint)[1] == "model"


def read_portable(checkpoint: Path) -> tuple[TensorIndex, Names]:
    """The tensors of a portable checkpoint, and the model whose names they have. Raises CheckpointError."""
    folder = checkpoint / PORTABLE
    try:
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        names, steps = description["names"], {k: float(v) for k, v in description["steps"].items()}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / _DESCRIPTION}: cannot be read ({error})") from None
    index = TensorIndex(steps=steps)
    for name, stored in read_folder_index(folder, "portable").items():
        kind, _, parameter = name.partition("/")
        target = index.weights if kind == "weight" else index.moments.get(kind)
        if target is None:
            raise CheckpointError(f"{folder}: {name}: unknown kind of tensor")
        target[parameter] = stored
    return index, names


def write_run(
    run: Path,
    recipe: Recipe,
    state: TrainingState,
    tensors: dict[str, StoredTensor],
    description: dict[str, Any],
    write_model: Callable[[Path], None],
    workers: Workers,
    metrics: Path | None = None,
) -> Path:
    """Write a run folder with one portable checkpoint in it, ready for `rim-dist train RUN/recipe.yaml`.

    `write_model`: writes the checkpoint's `model/`. `metrics`: a metrics.jsonl that the run goes on with.
    """
    checkpoint = store.partial_folder(Path("checkpoints"), state.step)
    stem = f"{checkpoint / PORTABLE}/portable"
    files = plan_files(as_model_tensors(tensors), None, _SHARD_BYTES, stem)

    def check_target() -> None:
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise CheckpointError(f"{run}: already holds something; choose another folder")

    def write_rest(folder: Path) -> None:
        write_index(folder, files, stem)
        (folder / checkpoint / PORTABLE / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
        write_model(folder / checkpoint / MODEL)
        if metrics is not None and metrics.is_file():
            shutil.copy(metrics, folder / "metrics.jsonl")

    def finish(folder: Path, records: dict[str, FileRecord]) -> None:
        own = {str(Path(name).relative_to(checkpoint)): record for name, record in records.items()}
        store.announce(folder / checkpoint, state, dump_recipe(recipe), own)
        write_atomically(folder / "recipe.yaml", dump_recipe(recipe))

    workers.on_first(check_target)
    write_folder(run, files, write_rest, workers, finish)
    return run
