"""Tensors in files: the byte ranges they occupy, read some MiB at a time, without mapping or loading the files."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from rim_dist.errors import CheckpointError

_CHUNK_BYTES = 1 << 21  # stays in the cache between reading, computing checksums and writing


@dataclass(frozen=True)
class ByteRange:
    """Consecutive bytes of a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in files: its contiguous bytes are those of the ranges, one after the other."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    ranges: Iterable[ByteRange]  # of slices of columns they are made while they are read: there are many

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    @property
    def regions(self) -> Iterator[ByteRange]:
        """All its bytes, in any order: fewer and longer ranges than `ranges` where columns of tensor ranks are joined."""
        if isinstance(self.ranges, _JoinedColumns):
            for matrix in self.ranges.matrices:
                yield from matrix.regions
        else:
            yield from self.ranges


@dataclass(frozen=True)
class LowRank:
    """An adapter on a matrix: weight + scaling x B A (transposed for layers that keep their matrix as [in, out])."""

    a: StoredTensor
    b: StoredTensor
    scaling: float
    transposed: bool


@dataclass(frozen=True)
class ModelTensor:
    """A tensor of the plain model: stored tensors stacked along the first dimension (usually one), plus an adapter."""

    stacked: tuple[StoredTensor, ...]
    low_rank: LowRank | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.stacked[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.stacked[0].shape
        return first if len(self.stacked) == 1 else (sum(s.shape[0] for s in self.stacked), *first[1:])


def as_model_tensors(stored: Mapping[str, StoredTensor]) -> dict[str, ModelTensor]:
    """Tensors that are in the model as they are stored."""
    return {name: ModelTensor((tensor,)) for name, tensor in stored.items()}


# ---- reading -------------------------------------------------------------------------------------------------


class _OpenFile:
    """A file descriptor that is closed when nothing refers to it any more: no thread loses one that it reads from."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


@functools.lru_cache(64)  # hundreds of tensors lie in some dozens of shards; the usual limit is 1,024 open files
def _open(file: str) -> _OpenFile:
    try:
        return _OpenFile(os.open(file, os.O_RDONLY))
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None


def close_files() -> None:
    """Close the files kept open; needed before an index is made, since a file may have been replaced under its name."""
    _open.cache_clear()


def _read_into(view: memoryview, file: str, offset: int) -> None:
    opened = _open(file)
    done = 0
    while done < len(view):
        count = os.preadv(opened.descriptor, [view[done:]], offset + done)
        if not count:
            raise CheckpointError(f"{file}: ends at byte {offset + done}; {len(view) - done} more are expected")
        done += count


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """The whole tensor in memory of its own. Raises CheckpointError if a file is too short."""
    buffer = torch.empty(stored.nbytes, dtype=torch.uint8)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    start, file = 0, ""
    for piece in stored.ranges:
        _read_into(view[start : start + piece.length], piece.file, piece.offset)
        start, file = start + piece.length, piece.file
    if start != stored.nbytes:
        raise CheckpointError(f"{file}: {start} bytes for a tensor of {stored.nbytes}")
    return buffer.view(stored.dtype).reshape(stored.shape)


def read_chunks(stored: StoredTensor) -> Iterator[torch.Tensor]:
    """The tensor's elements in order, flat, some MiB at a time. A chunk is valid until the next one."""
    buffer = torch.empty(min(_CHUNK_BYTES, max(stored.nbytes, 1)), dtype=torch.uint8)
    view = memoryview(buffer.numpy())  # type: ignore[arg-type]
    filled = 0
    for piece in stored.ranges:
        start = 0
        while start < piece.length:
            length = min(len(view) - filled, piece.length - start)
            _read_into(view[filled : filled + length], piece.file, piece.offset + start)
            start, filled = start + length, filled + length
            if filled == len(view):
                yield buffer.view(stored.dtype)
                filled = 0
    if filled:
        yield buffer[:filled].view(stored.dtype)


def model_chunks(tensor: ModelTensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A model tensor's elements in order, flat, in chunks of the given dtype; its adapter is merged."""
    stored = (chunk for matrix in tensor.stacked for chunk in read_chunks(matrix))
    if tensor.low_rank is None:
        for chunk in stored:
            yield chunk.to(dtype)
        return
    adapter = tensor.low_rank
    # The same arithmetic as peft's merge, in fp32, with the base added in place: one tensor in memory.
    update = read_tensor(adapter.b).float() @ read_tensor(adapter.a).float()
    if adapter.transposed:
        update = update.T.contiguous()
    update *= adapter.scaling
    rest = update.view(-1)
    for chunk in stored:
        yield rest[: chunk.numel()].add_(chunk.float()).to(dtype)
        rest = rest[chunk.numel() :]


def read_model_tensor(tensor: ModelTensor, dtype: torch.dtype) -> torch.Tensor:
    """A whole model tensor in the given dtype, its adapter merged."""
    values = torch.empty(tensor.shape, dtype=dtype)
    rest = values.view(-1)
    for chunk in model_chunks(tensor, dtype):
        rest[: chunk.numel()] = chunk
        rest = rest[chunk.numel() :]
    return values


# ---- slices --------------------------------------------------------------------------------------------------


def _cut(ranges: Iterable[ByteRange], start: int, stop: int) -> Iterator[ByteRange]:
    """Bytes `start` to `stop` of all bytes of the ranges."""
    position = 0
    for piece in ranges:
        low, high = max(start, position), min(stop, position + piece.length)
        if low < high:
            yield ByteRange(piece.file, piece.offset + low - position, high - low)
        position += piece.length


def elements_of(stored: StoredTensor, first: int, count: int) -> StoredTensor:
    """`count` elements from `first` on, flat."""
    size = stored.dtype.itemsize
    return StoredTensor((count,), stored.dtype, tuple(_cut(stored.ranges, first * size, (first + count) * size)))


def rows_of(stored: StoredTensor, first: int, last: int) -> StoredTensor:
    """Rows `first` to `last` of a matrix."""
    row = stored.elements // stored.shape[0]
    flat = elements_of(stored, first * row, (last - first) * row)
    return StoredTensor((last - first, *stored.shape[1:]), stored.dtype, flat.ranges)


def with_rows(stored: StoredTensor, rows: StoredTensor, ids: Sequence[int]) -> ModelTensor:
    """A matrix whose rows `ids` (in it, or directly after its last) are those of `rows`."""
    stacked: list[StoredTensor] = []
    position = 0
    for number, row in sorted((number, row) for row, number in enumerate(ids)):
        if number > position:
            stacked.append(rows_of(stored, position, number))
        stacked.append(rows_of(rows, row, row + 1))
        position = number + 1
    if position < stored.shape[0]:
        stacked.append(rows_of(stored, position, stored.shape[0]))
    return ModelTensor(tuple(stacked))


def _row_ranges(stored: StoredTensor) -> Iterator[list[ByteRange]]:
    """The byte ranges of each row of a matrix, in order, by one walk over the tensor's ranges."""
    size = stored.nbytes // stored.shape[0]
    row: list[ByteRange] = []
    missing = size
    for piece in stored.ranges:
        start = 0
        while start < piece.length:
            length = min(missing, piece.length - start)
            row.append(ByteRange(piece.file, piece.offset + start, length))
            start, missing = start + length, missing - length
            if not missing:
                yield row
                row, missing = [], size


@dataclass(frozen=True)
class _JoinedColumns:
    """The byte ranges of matrices joined along their columns: row by row, those of each matrix."""

    matrices: tuple[StoredTensor, ...]

    def __iter__(self) -> Iterator[ByteRange]:
        for rows in zip(*map(_row_ranges, self.matrices), strict=True):
            for row in rows:
                yield from row


@dataclass(frozen=True)
class _Columns:
    """The byte ranges of columns `first` to `last` of a matrix, row by row."""

    whole: StoredTensor
    first: int
    last: int

    def __iter__(self) -> Iterator[ByteRange]:
        size = self.whole.dtype.itemsize
        for row in _row_ranges(self.whole):
            yield from _cut(row, self.first * size, self.last * size)


def joined(slices: Sequence[StoredTensor], dim: int, length: int) -> StoredTensor:
    """The whole tensor from the slices of all tensor ranks along `dim`. It has `length` entries there; the rest is padding."""
    first = slices[0]
    if dim:
        return StoredTensor((first.shape[0], length), first.dtype, _JoinedColumns(tuple(slices)))
    shape = (sum(s.shape[0] for s in slices), *first.shape[1:])
    return rows_of(StoredTensor(shape, first.dtype, tuple(r for s in slices for r in s.ranges)), 0, length)


def sliced(whole: StoredTensor, dim: int, first: int, last: int) -> StoredTensor:
    """Entries `first` to `last` along the first or second dimension."""
    if dim == 0:
        return rows_of(whole, first, last)
    return StoredTensor((whole.shape[0], last - first), whole.dtype, _Columns(whole, first, last))
