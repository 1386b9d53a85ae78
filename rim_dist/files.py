"""Files that are whole or absent: atomic replacement, checksums while writing, manifests and what differs from them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from rim_dist.errors import CheckpointError

PARTIAL = ".partial"
MANIFEST = "manifest.json"
# Guards against damage, not against an attacker; as fast as memory, so it costs no time. A checksum a block: an export
# reads the weights of a shard, not the optimizer's moments beside them, and checks what it reads.
_CHECKSUM = "xxh3_64"
_BLOCK_BYTES = 1 << 24
_DIGITS = 16
ByteRange = tuple[int, int]  # first byte and the one after the last


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


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def room_for(needed: int, folder: Path) -> str:
    """How much of so many bytes the disk of a folder has: `it takes ..., ... are free`, and what is missing if it is."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"it takes {mib(needed)}, {mib(free)} are free" if needed else f"{mib(free)} are free"
    return f"{text}, {mib(needed - free)} are missing" if needed > free else text


def require_room(needed: int, folder: Path, what: Path) -> None:
    """Raise CheckpointError, naming what is to be written, if the disk of a folder has not so many bytes free."""
    if needed > shutil.disk_usage(folder).free:
        raise CheckpointError(f"{what}: cannot be written: {room_for(needed, folder)}")


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old or the new one, never a part."""
    partial = path.with_name(path.name + PARTIAL)
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


def _blocks_of(record: FileRecord, spans: Iterable[ByteRange] | None) -> list[int]:
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


def damage_of(
    folder: Path, checksums: bool, rank: int = 0, ranks: int = 1, only: Mapping[str, list[ByteRange]] | None = None
) -> str:
    """What is wrong with a folder that has a manifest; empty if nothing.

    Sizes are compared for every file. `checksums`: contents too, divided among `ranks`; of the files in `only` the spans given.
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
