"""Files that are whole or absent: atomic replacement, checksums while writing, manifests and the damage they show."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from rim_dist.errors import CheckpointError
from rim_dist.heartbeat import send_heartbeat

PARTIAL = ".partial"
MANIFEST = "manifest.json"
# Guards against damage, not against an attacker; as fast as memory, so it costs no time. One checksum for each block: an
# export reads the weights of a shard without the optimizer's moments, which are twice as large, and checks what it reads.
_CHECKSUM = "xxh3_64"
_BLOCK_BYTES = 1 << 24
_DIGITS = 16
_CHUNK_BYTES = 1 << 21
_SAMPLE_BYTES = 1 << 14


@dataclass(frozen=True)
class FileRecord:
    """A file's entry in a manifest. `checksum`: 16 hexadecimal digits for every block of 16 MiB."""

    size: int
    checksum: str


class _Recorder:
    """Makes the record of a file from its bytes, given in order."""

    def __init__(self) -> None:
        self._hash = xxhash.xxh3_64()
        self._size = 0
        self._full_blocks = ""

    def update(self, data: memoryview) -> None:
        while data.nbytes:
            chunk = data[: _BLOCK_BYTES - self._size % _BLOCK_BYTES]
            self._hash.update(chunk)
            self._size += chunk.nbytes
            data = data[chunk.nbytes :]
            if self._size % _BLOCK_BYTES == 0:
                self._full_blocks += self._hash.hexdigest()
                self._hash.reset()

    def record(self) -> FileRecord:
        last = self._hash.hexdigest() if self._size % _BLOCK_BYTES else ""
        return FileRecord(self._size, self._full_blocks + last)


class ChecksumWriter:
    """A binary file that computes its checksums while it is written, so that it is not read again for them."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("wb", buffering=0)
        self._recorder = _Recorder()
        self.error: OSError | None = None  # torch.save raises an error of its own instead of this one

    def write(self, data: Any) -> int:
        view = memoryview(data)
        rest = view.cast("B") if view.nbytes else view
        self._recorder.update(rest)
        send_heartbeat(f"writing {self._path.name}")
        try:
            with os_errors(self._path):
                while rest.nbytes:  # a disk that fills up takes some bytes and refuses the next write
                    rest = rest[self._file.write(rest) or 0 :]
        except OSError as error:
            self.error = error
            raise
        return view.nbytes

    def flush(self) -> None:
        self._file.flush()

    def close(self, sync: bool = True) -> FileRecord:
        with os_errors(self._path), self._file:
            if sync:
                os.fsync(self._file.fileno())
        return self._recorder.record()


def _read_chunks(file: Path, start: int = 0, length: int = sys.maxsize) -> Iterator[memoryview]:
    """The bytes of a file from `start` on, at most `length` of them. A chunk is valid until the next one."""
    view = memoryview(bytearray(_CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        while count := stream.readinto(view[:length]):
            yield view[:count]
            length -= count


def record_of(file: Path) -> FileRecord:
    """Size and checksums of a file as it is on disk."""
    recorder = _Recorder()
    for chunk in _read_chunks(file):
        recorder.update(chunk)
    return recorder.record()


def sampled_hash(files: Iterable[Path], samples: int = 64) -> str:
    """A hash of files' names, sizes and so many evenly spaced samples of 16 KiB each, or of all that is in smaller files."""
    digest = xxhash.xxh3_64()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        for start in range(0, size, max(_SAMPLE_BYTES, size // samples)):
            for chunk in _read_chunks(path, start, _SAMPLE_BYTES):
                digest.update(chunk)
    return digest.hexdigest()


def sync_path(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def os_errors(path: Path) -> Iterator[None]:
    """Name the file in an OSError that does not: writing, flushing and fsync do not say of which file they speak.

    The plain Exception that the Rust writers of tokenizers and safetensors raise for a full disk becomes an OSError.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno and error.filename is None:
            error.filename = str(path)
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def describe_os_error(error: OSError) -> str:
    """What went wrong, and with which file if it is known."""
    text = error.strerror or str(error)
    return f"{text}: {error.filename}" if error.filename is not None else text


def mib(size: float) -> str:
    return f"{size / 2**20:,.1f} MiB"


def room_for(needed: int, folder: Path) -> str:
    """Free space on the disk of a folder in words: what `needed` bytes take, what is free, and what is missing if it is."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"it takes {mib(needed)}, {mib(free)} are free" if needed else f"{mib(free)} are free"
    return f"{text}, {mib(needed - free)} are missing" if needed > free else text


def require_room(needed: int, folder: Path, what: Path) -> None:
    """Raise CheckpointError, naming what is to be written, if the disk of a folder has not so many bytes free."""
    if needed > shutil.disk_usage(folder).free:
        raise CheckpointError(f"{what}: cannot be written: {room_for(needed, folder)}")


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file so that a crash leaves the old one or the new one."""
    partial = path.with_name(path.name + PARTIAL)
    with os_errors(path):
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_path(path.parent)


def write_manifest(folder: Path, records: Mapping[str, FileRecord]) -> None:
    """Bring a folder to the disk and write its manifest. `records`: files that are synced already; the others are read."""
    complete = dict(records)
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_dir():
            sync_path(path)
        elif name not in complete and name != MANIFEST:
            sync_path(path)
            complete[name] = record_of(path)
    files = {name: {"size": r.size, "checksum": r.checksum} for name, r in sorted(complete.items())}
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


def _blocks_of(record: FileRecord, ranges: Iterable[tuple[int, int]] | None) -> list[int]:
    """Numbers of the blocks to compare: all, or the first, the last (a shard's structure) and those with bytes of `ranges`."""
    count = len(record.checksum) // _DIGITS
    if ranges is None:
        return list(range(count))
    wanted = {0, count - 1} if count else set()
    for start, stop in ranges:
        wanted.update(range(start // _BLOCK_BYTES, -(-stop // _BLOCK_BYTES)))
    return sorted(wanted)


def _block_damage(file: Path, name: str, record: FileRecord, block: int) -> str:
    send_heartbeat(f"checking {name}")
    digest = xxhash.xxh3_64()
    start = block * _BLOCK_BYTES
    try:
        for chunk in _read_chunks(file, start, _BLOCK_BYTES):
            digest.update(chunk)
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    if digest.hexdigest() != record.checksum[block * _DIGITS : (block + 1) * _DIGITS]:
        where = f" (in its {_BLOCK_BYTES >> 20} MiB from byte {start:,})" if block else ""
        return f"{name} has other contents than its manifest says{where}"
    return ""


def damage_of(
    folder: Path,
    checksums: bool,
    rank: int = 0,
    ranks: int = 1,
    only: Mapping[str, list[tuple[int, int]]] | None = None,
    free: Collection[str] = (),
) -> str:
    """What is wrong with a folder that has a manifest; empty if nothing.

    Compares the size of every file; with `checksums` also the contents, block by block, divided among `ranks`. Of the files
    in `only` it compares the blocks that hold the given ranges of bytes (first, one after the last), of others all. Files in
    `free` may be changed or missing.
    """
    try:
        records = {name: record for name, record in read_manifest(folder).items() if name not in free}
    except CheckpointError:
        return f"it has no readable {MANIFEST}"
    for name, record in records.items():
        try:
            size = (folder / name).stat().st_size
        except OSError:  # also one that is just being removed by a run that goes on
            return f"{name} is missing"
        if size != record.size:
            return f"{name} has {size} bytes instead of {record.size}"
    if not checksums:
        return ""
    blocks = [(n, i) for n, r in sorted(records.items()) for i in _blocks_of(r, (only or {}).get(n))]
    # Hashing and reading leave Python's lock: a few blocks at a time.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda b: _block_damage(folder / b[0], b[0], records[b[0]], b[1]), blocks[rank::ranks])
        return next((wrong for wrong in found if wrong), "")
