"""Checkpoints on disk: written beside, announced by a rename, found again, never half a one.

checkpoints/step-00000500/
    engine/        DeepSpeed's shards of parameters and optimizer
    model/         config, generation config and tokenizer: all an export needs besides the weights
    recipe.yaml    the fully resolved recipe
    state.json     stage, step, sample position, ranks
    manifest.json  every file with its size; written last
checkpoints/latest the name of the newest one
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from rim_dist.config import Recipe, StageName, load_recipe
from rim_dist.errors import CheckpointError

_PREFIX = "step-"
_PARTIAL = ".partial"
ENGINE = "engine"
MODEL = "model"


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands. The stage is explicit; dropout and data order follow from the seed and the step."""

    stage: StageName
    stage_step: int  # optimizer steps done in the stage
    step: int  # optimizer steps done in the run
    samples: int  # samples consumed in the run
    operations: float  # floating-point operations of all forward and backward passes so far
    ranks: int
    finished: bool = False


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"{_PREFIX}{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Complete checkpoints, oldest first: those whose files are all there with the sizes of their manifest."""
    if not checkpoints.is_dir():
        return []
    return [p for p in sorted(checkpoints.glob(f"{_PREFIX}*")) if not p.name.endswith(_PARTIAL) and not _damage(p)]


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint folder; empty if nothing."""
    try:
        files = json.loads((checkpoint / "manifest.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "it has no readable manifest.json"
    for name, size in files.items():
        file = checkpoint / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return ""


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by a path: a checkpoint folder, or the newest complete one of a run or `checkpoints/` folder.

    Raises CheckpointError, with what is wrong.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    if (path / "state.json").is_file() or path.name.startswith(_PREFIX):
        if damage := _damage(path):
            raise CheckpointError(f"{path}: not a complete checkpoint: {damage}")
        return path
    for folder in (path, path / "checkpoints"):
        if found := complete_checkpoints(folder):
            return found[-1]
    raise CheckpointError(f"{path}: no complete checkpoint in it")


def read_state(checkpoint: Path) -> TrainingState:
    """The training state of a checkpoint. Raises CheckpointError if it cannot be read."""
    try:
        return TrainingState(**json.loads((checkpoint / "state.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / 'state.json'}: not a training state ({error})") from None


def read_recipe(checkpoint: Path) -> Recipe:
    """The resolved recipe a checkpoint was trained with."""
    return load_recipe(checkpoint / "recipe.yaml")


def start_writing(checkpoints: Path, step: int) -> Path:
    """A fresh folder for a new checkpoint; what a killed run left half-written is removed. First rank only."""
    for left in checkpoints.glob(f"*{_PARTIAL}"):
        shutil.rmtree(left)
    partial = partial_folder(checkpoints, step)
    partial.mkdir(parents=True)
    return partial


def partial_folder(checkpoints: Path, step: int) -> Path:
    final = folder_of(checkpoints, step)
    return final.with_name(final.name + _PARTIAL)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old or the new one, never a part."""
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _sync(path.parent)


def announce(partial: Path, state: TrainingState, recipe_text: str) -> Path:
    """Finish a written checkpoint: state, manifest, sync, rename, `latest`. First rank only, after all have written."""
    (partial / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
    (partial / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")
    files = sorted(p for p in partial.rglob("*") if p.is_file())
    for file in files:
        _sync(file)
    sizes = {str(p.relative_to(partial)): p.stat().st_size for p in files}
    write_atomically(partial / "manifest.json", json.dumps({"files": sizes}, indent=1))
    for folder in [p for p in partial.rglob("*") if p.is_dir()]:
        _sync(folder)
    final = partial.with_name(partial.name.removesuffix(_PARTIAL))
    if final.exists():  # a damaged one of the same step: resume went past it
        shutil.rmtree(final)
    os.rename(partial, final)
    _sync(final.parent)
    write_atomically(final.parent / "latest", final.name + "\n")
    return final


def retain(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` complete checkpoints."""
    for old in complete_checkpoints(checkpoints)[:-keep]:
        # Renamed first: a crash in the middle of the removal leaves nothing that looks like a checkpoint.
        doomed = old.with_name(old.name + _PARTIAL)
        os.rename(old, doomed)
        shutil.rmtree(doomed)
