"""Tensors as they lie in files: where their bytes are, read without mapping or loading the files around them."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from rim_dist.errors import CheckpointError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
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
    """A tensor whose contiguous bytes are the extents, one after the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    extents: tuple[Extent, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize


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
    start = 0
    for extent in stored.extents:
        _read_into(view[start : start + extent.length], extent.file, extent.offset)
        start += extent.length
    if start != stored.nbytes:
        raise CheckpointError(f"{stored.extents[0].file}: {start} bytes for a tensor of {stored.nbytes}")
    return buffer.view(stored.dtype).reshape(stored.shape)


def read_chunks(stored: StoredTensor) -> Iterator[torch.Tensor]:
    """The tensor's elements in order, some MiB at a time, flat. A chunk is valid until the next one."""
    buffer = torch.empty(min(_CHUNK_BYTES, max(stored.nbytes, 1)), dtype=torch.uint8)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    for extent in stored.extents:
        for start in range(0, extent.length, len(view)):
            length = min(len(view), extent.length - start)
            _read_into(view[:length], extent.file, extent.offset + start)
            yield buffer[:length].view(stored.dtype)


def _part(stored: StoredTensor, start: int, stop: int) -> tuple[Extent, ...]:
    """Bytes `start` to `stop` of a tensor, where they lie."""
    extents = []
    position = 0
    for extent in stored.extents:
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
