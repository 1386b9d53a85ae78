"""Checkpoints on disk: written beside, announced by a rename, verified before use, never half a one.

checkpoints/step-00000500/
    engine/        DeepSpeed's shards of parameters and optimizer, or
    portable/      whole tensors by name, for any number of ranks (checkpoint/portable.py)
    model/         config, generation config and tokenizer: all an export needs besides the weights
    recipe.yaml    the fully resolved recipe
    state.json     format, stage, step, sample position, ranks
    manifest.json  every file with its size and checksum; written last
checkpoints/latest the name of the newest one
checkpoints/scores.json, saves.jsonl   metrics of checkpoints (retention.py), and how long each save took (saver.py)
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from rim_dist.config import Recipe, StageName
from rim_dist.errors import CheckpointError
from rim_dist.recipe import load_recipe

_PREFIX = "step-"
_PARTIAL = ".partial"
_PARTS = "parts"
FORMAT = 1  # of checkpoints; those that do not say are of the first
ENGINE = "engine"
MODEL = "model"
PORTABLE = "portable"
MANIFEST = "manifest.json"
# Guards against damage, not against an attacker; as fast as memory, so it costs no time. A checksum a block: an export
# reads the weights of a shard, not the optimizer's moments beside them, and checks what it reads.
_CHECKSUM = "xxh3_64"
_BLOCK_BYTES = 1 << 24
_DIGITS = 16
Span = tuple[int, int]  # first byte and the one after the last


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


# ---- files and their checksums -------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says of a file. `checksum`: 16 hexadecimal digits for every block of 16 MiB."""

    size: int
    checksum: str


class _Checksum:
    """The checksums of the blocks of what goes through."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()
        self._left = _BLOCK_BYTES
        self._done: list[str] = []

    def update(self, view: memoryview) -> None:
        while view.nbytes:
            part = view[: self._left]
            self._hash.update(part)
            self._left -= part.nbytes
            view = view[part.nbytes :]
            if not self._left:
                self._close_block()

    def _close_block(self) -> None:
        self._done.append(self._hash.hexdigest())
        self._hash = xxhash.xxh3_64()
        self._left = _BLOCK_BYTES

    def digits(self) -> str:
        if self._left < _BLOCK_BYTES:
            self._close_block()
        return "".join(self._done)


class ChecksumWriter:
    """A binary file that sums up what goes through it, so that no file is read again for its checksum."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._sum = _Checksum()
        self._size = 0
        self.error: OSError | None = None  # kept for callers behind a library that words it in its own way

    def write(self, data: Any) -> int:
        view = memoryview(data)
        rest = view.cast("B") if view.nbytes else view
        self._sum.update(rest)
        try:
            while rest.nbytes:  # a disk that fills up takes a part and refuses the next write
                rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            self.error = error
            raise
        self._size += view.nbytes
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def close(self, sync: bool = True) -> FileRecord:
        try:
            self._file.flush()
            if sync:
                os.fsync(self._file.fileno())
        finally:
            self._file.close()
        return FileRecord(self._size, self._sum.digits())


def record_of(file: Path) -> FileRecord:
    """Size and checksum of a file as it is on disk."""
    digest = _Checksum()
    size = 0
    buffer = bytearray(1 << 21)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
            size += count
    return FileRecord(size, digest.digits())


def sync_path(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Raise what the Rust writers of tokenizers and safetensors word as a plain Exception as the OSError it is."""
    try:
        yield
    except Exception as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old or the new one, never a part."""
    partial = path.with_name(path.name + _PARTIAL)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_path(path.parent)


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """The manifest of a folder of finished, synced files. Everything below the folder must be in `records`."""
    files = {name: {"size": r.size, "checksum": r.checksum} for name, r in sorted(records.items())}
    write_atomically(folder / MANIFEST, json.dumps({"checksum": _CHECKSUM, "files": files}, indent=1) + "\n")


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """Raises CheckpointError if there is none that can be read."""
    try:
        tree = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if tree["checksum"] != _CHECKSUM:
            raise ValueError(f"unknown checksum {tree['checksum']!r}")
        return {name: FileRecord(int(f["size"]), str(f["checksum"])) for name, f in tree["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder}: it has no readable {MANIFEST}") from None


def _blocks_of(record: FileRecord, spans: Iterable[Span] | None) -> list[int]:
    """Numbers of the blocks to compare: all, or those of the spans with the first and the last (a shard's structure)."""
    count = len(record.checksum) // _DIGITS
    if spans is None:
        return list(range(count))
    wanted = {0, count - 1} if count else set()
    for start, stop in spans:
        wanted.update(range(start // _BLOCK_BYTES, -(-stop // _BLOCK_BYTES)))
    return sorted(wanted)


def _contents_damage(file: Path, name: str, record: FileRecord, number: int) -> str:
    digest = xxhash.xxh3_64()
    buffer = bytearray(1 << 21)
    left = min(_BLOCK_BYTES, record.size - number * _BLOCK_BYTES)
    try:
        with file.open("rb", buffering=0) as stream:
            stream.seek(number * _BLOCK_BYTES)
            while left and (count := stream.readinto(memoryview(buffer)[: min(left, len(buffer))])):
                digest.update(memoryview(buffer)[:count])
                left -= count
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    if digest.hexdigest() != record.checksum[number * _DIGITS : (number + 1) * _DIGITS]:
        where = f" (in its {_BLOCK_BYTES >> 20} MiB from byte {number * _BLOCK_BYTES:,})" if number else ""
        return f"{name} has other contents than its manifest says{where}"
    return ""


def damage(folder: Path, checksums: bool, rank: int = 0, ranks: int = 1, only: Mapping[str, list[Span]] | None = None) -> str:
    """What is wrong with a folder that has a manifest; empty if nothing.

    Sizes are compared for every file. `checksums`: contents too, dealt over `ranks`; of the files in `only` the spans given.
    """
    try:
        records = read_manifest(folder)
    except CheckpointError:
        return f"it has no readable {MANIFEST}"
    for name, record in records.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:  # also one that is just being removed by a run that goes on
            return f"{name} is missing"
        if size != record.size:
            return f"{name} has {size} bytes instead of {record.size}"
    if checksums:
        blocks = [(n, i) for n, r in sorted(records.items()) for i in _blocks_of(r, only.get(n) if only is not None else None)]
        # Hashing and reading leave Python's lock: a few blocks at a time.
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            for wrong in pool.map(lambda b: _contents_damage(folder / b[0], b[0], records[b[0]], b[1]), blocks[rank::ranks]):
                if wrong:
                    return wrong
    return ""


# ---- finding -------------------------------------------------------------------------------------------------


def all_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders that claim to be checkpoints, damaged or not, oldest first."""
    if not checkpoints.is_dir():
        return []
    return [p for p in sorted(checkpoints.glob(f"{_PREFIX}*")) if p.is_dir() and not p.name.endswith(_PARTIAL)]


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoints whose files are all there with the sizes of their manifest, oldest first."""
    return [p for p in all_checkpoints(checkpoints) if not damage(p, checksums=False)]


def run_checkpoints(path: str | Path) -> list[Path]:
    """The complete checkpoints of a run or `checkpoints/` folder, oldest first; a checkpoint folder alone is itself.

    Raises CheckpointError, with what is wrong.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    if (path / "state.json").is_file() or path.name.startswith(_PREFIX):
        if wrong := damage(path, checksums=False):
            raise CheckpointError(f"{path}: not a complete checkpoint: {wrong}")
        return [path]
    for folder in (path, path / "checkpoints"):
        if found := complete_checkpoints(folder):
            return found
    raise CheckpointError(f"{path}: no complete checkpoint in it")


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint meant by a path: a checkpoint folder, or the newest complete one of a run or `checkpoints/` folder."""
    return run_checkpoints(path)[-1]


def require_intact(checkpoint: Path) -> None:
    """Raises CheckpointError unless every file has the contents of the manifest."""
    if wrong := damage(checkpoint, checksums=True):
        raise CheckpointError(f"{checkpoint}: damaged: {wrong}")


def read_state(checkpoint: Path) -> TrainingState:
    """The training state of a checkpoint. Raises CheckpointError if it cannot be read, or is of a newer format."""
    try:
        tree = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        version = tree.pop("format", 1)
        if version > FORMAT:
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


# ---- writing -------------------------------------------------------------------------------------------------


def partial_folder(checkpoints: Path, step: int) -> Path:
    final = folder_of(checkpoints, step)
    return final.with_name(final.name + _PARTIAL)


def start_writing(checkpoints: Path, step: int) -> Path:
    """A fresh folder for a new checkpoint; what a killed run left half-written is removed. First rank only."""
    for left in checkpoints.glob(f"*{_PARTIAL}"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
    partial = partial_folder(checkpoints, step)
    (partial / _PARTS).mkdir(parents=True)
    return partial


def discard(checkpoints: Path, step: int) -> None:
    """Remove what was written of a checkpoint that failed."""
    shutil.rmtree(partial_folder(checkpoints, step), ignore_errors=True)


@dataclass(frozen=True)
class Part:
    """What one rank has to say when its share of a checkpoint is written, or could not be."""

    records: dict[str, FileRecord]
    error: str = ""


def _part_file(partial: Path, rank: int) -> Path:
    return partial / _PARTS / f"rank-{rank:05d}.json"


def write_part(partial: Path, rank: int, part: Part) -> None:
    """Tell the first rank, through the file system: a background writer has no collective to say it with."""
    for folder in {(partial / name).parent for name in part.records}:
        sync_path(folder)
    write_atomically(_part_file(partial, rank), json.dumps(asdict(part)))


def read_part(partial: Path, rank: int) -> Part | None:
    """What a rank wrote; None as long as it has not."""
    try:
        tree = json.loads(_part_file(partial, rank).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Part({name: FileRecord(**record) for name, record in tree["records"].items()}, tree["error"])


def announce(partial: Path, state: TrainingState, recipe_text: str, records: Mapping[str, FileRecord]) -> Path:
    """Finish a written checkpoint: state, manifest, sync, rename, `latest`. First rank only, after all have written.

    `records`: the files that are synced already; the first rank's small ones are recorded here.
    """
    shutil.rmtree(partial / _PARTS, ignore_errors=True)
    (partial / "recipe.yaml").write_text(recipe_text, encoding="utf-8")
    (partial / "state.json").write_text(json.dumps({"format": FORMAT, **asdict(state)}, indent=1), encoding="utf-8")
    complete = dict(records)
    for file in (p for p in partial.rglob("*") if p.is_file()):
        name = str(file.relative_to(partial))
        if name not in complete:
            sync_path(file)
            complete[name] = record_of(file)
    for folder in [p for p in partial.rglob("*") if p.is_dir()]:
        sync_path(folder)
    write_manifest(partial, complete)
    if wrong := damage(partial, checksums=False):
        raise OSError(f"{partial}: {wrong} right after it was written")
    final = partial.with_name(partial.name.removesuffix(_PARTIAL))
    if final.exists():  # a damaged one of the same step: resume went past it
        remove(final)
    os.rename(partial, final)
    sync_path(final.parent)
    write_atomically(final.parent / "latest", final.name + "\n")
    return final


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint. Renamed first: a crash in the middle leaves nothing that looks like one."""
    doomed = checkpoint.with_name(f"{checkpoint.name}.removed{_PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(checkpoint, doomed)
    shutil.rmtree(doomed)
