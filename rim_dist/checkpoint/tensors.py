"""Tensors as they lie in files: where their bytes are, read without mapping or loading the files around them."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rim_dist.errors import CheckpointError

# The names of the safetensors format.
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_SAFETENSORS_DTYPES = {name: dtype for dtype, name in _SAFETENSORS_NAMES.items()}
_CHUNK_BYTES = 1 << 21  # stays in the cache between reading, summing up and writing


def safetensors_name(dtype: torch.dtype) -> str:
    return _SAFETENSORS_NAMES[dtype]


@dataclass(frozen=True)
class Extent:
    """A run of bytes in a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor whose contiguous bytes are the extents, one after the other (for slices of columns, made as they are read)."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    extents: Iterable[Extent]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def regions(self) -> Iterator[Extent]:
        """The bytes it is read from, in any order: fewer and longer runs than `extents` for columns of tensor ranks."""
        if isinstance(self.extents, _SideBySide):
            for part in self.extents.parts:
                yield from part.regions
        else:
            yield from self.extents


@dataclass(frozen=True)
class LowRank:
    """An adapter on a matrix: weight + scaling x B A (transposed where the layer keeps its matrix the other way round)."""

    a: StoredTensor
    b: StoredTensor
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the plain model: whole ones one after the other (all but one usually), plus an adapter."""

    parts: tuple[StoredTensor, ...]
    shape: tuple[int, ...]
    low_rank: LowRank | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype


_OPEN_FILES = 64  # far below the usual limit of 1,024


class _OpenFiles(threading.local):
    """Files this thread keeps open: a conversion reads hundreds of tensors from some dozens of shards."""

    def __init__(self) -> None:
        self.descriptors: OrderedDict[str, int] = OrderedDict()


_open_files = _OpenFiles()


def _descriptor(file: str) -> int:
    descriptors = _open_files.descriptors
    if file in descriptors:
        descriptors.move_to_end(file)
        return descriptors[file]
    try:
        opened = os.open(file, os.O_RDONLY)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
    descriptors[file] = opened
    if len(descriptors) > _OPEN_FILES:
        os.close(descriptors.popitem(last=False)[1])
    return opened


def forget_files() -> None:
    """Close what this thread keeps open; before an index is made, since a file may have been replaced under its name."""
    while _open_files.descriptors:
        os.close(_open_files.descriptors.popitem()[1])


def _read_into(view: memoryview, file: str, offset: int) -> None:
    done = 0
    while done < len(view):
        count = os.preadv(_descriptor(file), [view[done:]], offset + done)
        if not count:
            raise CheckpointError(f"{file}: ends at byte {offset + done}; {len(view) - done} more are expected")
        done += count


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """The whole tensor in memory of its own. Raises CheckpointError if a file is too short."""
    buffer = torch.empty(stored.nbytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    start, file = 0, ""
    for extent in stored.extents:
        _read_into(view[start : start + extent.length], extent.file, extent.offset)
        start, file = start + extent.length, extent.file
    if start != stored.nbytes:
        raise CheckpointError(f"{file}: {start} bytes for a tensor of {stored.nbytes}")
    return buffer.view(stored.dtype).reshape(stored.shape)


def read_chunks(stored: StoredTensor) -> Iterator[torch.Tensor]:
    """The tensor's elements in order, some MiB at a time, flat. A chunk is valid until the next one."""
    buffer = torch.empty(min(_CHUNK_BYTES, max(stored.nbytes, 1)), dtype=torch.uint8)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    filled = 0
    for extent in stored.extents:
        start = 0
        while start < extent.length:
            length = min(len(view) - filled, extent.length - start)
            _read_into(view[filled : filled + length], extent.file, extent.offset + start)
            start, filled = start + length, filled + length
            if filled == len(view):
                yield buffer.view(stored.dtype)
                filled = 0
    if filled:
        yield buffer[:filled].view(stored.dtype)


def _part(stored: StoredTensor, start: int, stop: int) -> tuple[Extent, ...]:
    """Bytes `start` to `stop` of a tensor, where they lie."""
    return _cut(stored.extents, start, stop)


def _cut(pieces: Iterable[Extent], start: int, stop: int) -> tuple[Extent, ...]:
    extents = []
    position = 0
    for extent in pieces:
        low, high = max(start, position), min(stop, position + extent.length)
        if low < high:
            extents.append(Extent(extent.file, extent.offset + low - position, high - low))
        position += extent.length
    return tuple(extents)


def rows_of(stored: StoredTensor, first: int, last: int) -> StoredTensor:
    """Rows `first` to `last` of a matrix."""
    row = stored.nbytes // stored.shape[0]
    return StoredTensor((last - first, *stored.shape[1:]), stored.dtype, _part(stored, first * row, last * row))


def elements_of(stored: StoredTensor, first: int, count: int) -> StoredTensor:
    """`count` elements from `first` on, flat."""
    size = stored.dtype.itemsize
    return StoredTensor((count,), stored.dtype, _part(stored, first * size, (first + count) * size))


# ---- slices of tensor ranks ----------------------------------------------------------------------------------


def _rows(stored: StoredTensor) -> Iterator[list[Extent]]:
    """The extents of each row of a matrix, in order; one walk over the tensor's extents."""
    size = stored.nbytes // stored.shape[0]
    row: list[Extent] = []
    missing = size
    for extent in stored.extents:
        start = 0
        while start < extent.length:
            length = min(missing, extent.length - start)
            row.append(Extent(extent.file, extent.offset + start, length))
            start, missing = start + length, missing - length
            if not missing:
                yield row
                row, missing = [], size


@dataclass(frozen=True)
class _SideBySide:
    """The extents of matrices joined along their columns: row by row, a piece of each."""

    parts: tuple[StoredTensor, ...]

    def __iter__(self) -> Iterator[Extent]:
        for rows in zip(*map(_rows, self.parts), strict=True):
            for row in rows:
                yield from row


@dataclass(frozen=True)
class _Columns:
    """The extents of columns `first` to `last` of a matrix, row by row."""

    whole: StoredTensor
    first: int
    last: int

    def __iter__(self) -> Iterator[Extent]:
        size = self.whole.dtype.itemsize
        for row in _rows(self.whole):
            yield from _cut(row, self.first * size, self.last * size)


def joined(parts: Sequence[StoredTensor], dim: int, length: int) -> StoredTensor:
    """The slices of all tensor ranks as the whole tensor, of which `dim` has `length` entries (the rest is padding)."""
    first = parts[0]
    if dim == 0:
        whole = StoredTensor(
            (sum(p.shape[0] for p in parts), *first.shape[1:]), first.dtype, tuple(e for p in parts for e in p.extents)
        )
        return rows_of(whole, 0, length)
    return StoredTensor((first.shape[0], length), first.dtype, _SideBySide(tuple(parts)))


def sliced(whole: StoredTensor, dim: int, first: int, last: int) -> StoredTensor:
    """Entries `first` to `last` along the first or second dimension."""
    if dim == 0:
        return rows_of(whole, first, last)
    return StoredTensor((whole.shape[0], last - first), whole.dtype, _Columns(whole, first, last))


# ---- safetensors files ---------------------------------------------------------------------------------------


def safetensors_header(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file with these tensors in this order, and each one's offset in the file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    starts = {}
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {
            "dtype": safetensors_name(dtype),
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        starts[name] = position
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: len(header) + start for name, start in starts.items()}


def read_safetensors_index(file: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file are. Raises CheckpointError if it is none, or ends early."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            entries = json.loads(stream.read(length))
        tensors = {}
        for name, entry in entries.items():
            if name == "__metadata__":
                continue
            start, end = entry["data_offsets"]
            dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
            stored = StoredTensor(tuple(entry["shape"]), dtype, (Extent(str(file), 8 + length + start, end - start),))
            if stored.nbytes != end - start or 8 + length + end > file.stat().st_size:
                raise CheckpointError(f"{file}: {name}: shorter than its shape says")
            tensors[name] = stored
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error})") from None


def read_folder_index(folder: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """The tensors of `stem.safetensors`, or of the files of `stem.safetensors.index.json`, by name.

    Raises CheckpointError if a tensor of the index is not where it should be, or one is in none or in two.
    """
    forget_files()
    index = folder / f"{stem}.safetensors.index.json"
    if not index.is_file():
        return read_safetensors_index(folder / f"{stem}.safetensors")
    try:
        places: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{index}: cannot be read ({error})") from None
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(places.values())):
        for name, stored in read_safetensors_index(folder / file).items():
            if places.get(name) != file:
                raise CheckpointError(f"{folder / file}: holds {name}, which {index.name} places in {places.get(name)}")
            found[name] = stored
    if missing := sorted(set(places) - set(found)):
        raise CheckpointError(f"{index}: names {missing[0]}, which is in none of its files")
    return found
