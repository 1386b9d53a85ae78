"""Checkpoints on disk: written into a folder beside, announced by its rename, verified before use.

checkpoints/step-00000500/
    engine/        DeepSpeed's shards of parameters and optimizer, or
    portable/      whole tensors by name, for any number of ranks (checkpoint/portable.py)
    model/         config, generation config and tokenizer: all an export needs besides the weights
    recipe.yaml    the fully resolved recipe
    state.json     format, stage, step, sample position, ranks
    inputs.json    what the run is made from besides the recipe (training/inputs.py)
    manifest.json  every file with its size and checksum; written last
checkpoints/latest the name of the newest one
checkpoints/scores.json, saves.jsonl   metrics of checkpoints (retention.py), and how long each save took (saver.py)
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rim_dist.config import Recipe, StageName
from rim_dist.errors import CheckpointError
from rim_dist.files import PARTIAL, FileRecord, damage_of, sync_path, write_atomically, write_manifest
from rim_dist.recipe import load_recipe

_PREFIX = "step-"
_REPORTS = "parts"  # of ranks, while a checkpoint is written
FORMAT = 1  # of checkpoints; those that do not say are of the first
ENGINE = "engine"
MODEL = "model"
PORTABLE = "portable"
INPUTS = "inputs.json"


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


# ---- finding -------------------------------------------------------------------------------------------------


def all_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders that claim to be checkpoints, damaged or not, oldest first."""
    if not checkpoints.is_dir():
        return []
    return [p for p in sorted(checkpoints.glob(f"{_PREFIX}*")) if p.is_dir() and not p.name.endswith(PARTIAL)]


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoints whose files are all there with the sizes of their manifest, oldest first."""
    return [p for p in all_checkpoints(checkpoints) if not damage_of(p, checksums=False)]


def run_checkpoints(path: str | Path) -> list[Path]:
    """The complete checkpoints of a run or `checkpoints/` folder, oldest first; a checkpoint folder alone is itself.

    Raises CheckpointError, with what is wrong.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    if (path / "state.json").is_file() or path.name.startswith(_PREFIX):
        if wrong := damage_of(path, checksums=False):
            raise CheckpointError(f"{path}: not a complete checkpoint: {wrong}")
        return [path]
    for folder in (path, path / "checkpoints"):
        if found := complete_checkpoints(folder):
            return found
    raise CheckpointError(f"{path}: no complete checkpoint in it")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by a path: a checkpoint folder, or the newest complete one of a run or `checkpoints/` folder."""
    return run_checkpoints(path)[-1]


def read_state(checkpoint: Path) -> TrainingState:
    """The training state of a checkpoint. Raises CheckpointError if it cannot be read, or is of a newer format."""
    try:
        tree = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        if (version := tree.pop("format", 1)) > FORMAT:
            raise CheckpointError(
                f"{checkpoint}: format {version} is of a newer rim_dist; this one reads checkpoints up to format {FORMAT}; "
                "update it"
            )
        return TrainingState(**tree)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint / 'state.json'}: not a training state ({error})") from None


def read_recipe(checkpoint: Path) -> Recipe:
    """The resolved recipe a checkpoint was trained with."""
    return load_recipe(checkpoint / "recipe.yaml", written=True)


def read_inputs(checkpoint: Path) -> dict[str, Any]:
    """What the run is made from besides its recipe; empty for a checkpoint that does not say."""
    try:
        return dict(json.loads((checkpoint / INPUTS).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{checkpoint / INPUTS}: cannot be read ({error})") from None


# ---- writing -------------------------------------------------------------------------------------------------


def partial_folder(checkpoints: Path, step: int) -> Path:
    final = folder_of(checkpoints, step)
    return final.with_name(final.name + PARTIAL)


def start_writing(checkpoints: Path, step: int) -> Path:
    """A fresh folder for a new checkpoint; what a killed run left half-written is removed. First rank only."""
    for left in checkpoints.glob(f"*{PARTIAL}"):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left)
        else:
            left.unlink()
    partial = partial_folder(checkpoints, step)
    (partial / _REPORTS).mkdir(parents=True)
    return partial


@dataclass(frozen=True)
class RankReport:
    """The files that one rank has written, or what went wrong."""

    records: dict[str, FileRecord]
    error: str = ""


def _report_file(partial: Path, rank: int) -> Path:
    return partial / _REPORTS / f"rank-{rank:05d}.json"


def write_report(partial: Path, rank: int, report: RankReport) -> None:
    """Tell the first rank through the file system: a background thread must not enter a collective."""
    for folder in {(partial / name).parent for name in report.records}:
        sync_path(folder)
    write_atomically(_report_file(partial, rank), json.dumps(asdict(report)))


def read_report(partial: Path, rank: int) -> RankReport | None:
    """The report of a rank; None as long as there is none."""
    try:
        tree = json.loads(_report_file(partial, rank).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return RankReport({name: FileRecord(**record) for name, record in tree["records"].items()}, tree["error"])


def announce(
    partial: Path,
    state: TrainingState,
    recipe_text: str,
    records: Mapping[str, FileRecord],
    check_owner: Callable[[], None] = lambda: None,
) -> Path:
    """Finish a written checkpoint: recipe, state, manifest, rename, `latest`. First rank only, after all have written.

    `records`: the files that are synced already. `check_owner`: called before what another owner would see. Raises OSError.
    """
    shutil.rmtree(partial / _REPORTS, ignore_errors=True)
    (partial / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
    (partial / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1), encoding="utf-8")
    write_manifest(partial, records)
    if wrong := damage_of(partial, checksums=False):
        raise OSError(f"{partial}: {wrong} right after it was written")
    final = partial.with_name(partial.name.removesuffix(PARTIAL))
    check_owner()
    if final.exists():  # a damaged one of the same step: resume went past it
        remove(final)
    os.rename(partial, final)
    sync_path(final.parent)
    check_owner()
    write_atomically(final.parent / "latest", final.name + "\n")
    return final


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint, or the link to one. Renamed first: a crash in the middle leaves nothing that looks like one."""
    if checkpoint.is_symlink():
        checkpoint.unlink()
        return
    renamed = checkpoint.with_name(f"{checkpoint.name}.removed{PARTIAL}")
    shutil.rmtree(renamed, ignore_errors=True)
    os.rename(checkpoint, renamed)
    shutil.rmtree(renamed)
