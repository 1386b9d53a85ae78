"""A rank's shards as DeepSpeed would write them: kept instead, then measured, copied and written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from rim_dist.files import ChecksumWriter, FileRecord

# Pickled structure and archive headers besides the tensors: measured 12 to 30 KB a file for some hundred tensors.
_OVERHEAD_PER_FILE_BYTES = 1 << 18


class Capture:
    """Stands in for DeepSpeed's checkpoint engine during a save: keeps the states that it would write."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.files: dict[str, Any] = {}

    def save(self, state_dict: Any, path: str) -> None:
        self.files[str(Path(path).relative_to(self._folder))] = state_dict

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def create(self, info: object) -> None:
        pass

    def commit(self, info: object) -> bool:  # noqa: ARG002 - the interface's name
        return True

    def is_decoupled(self) -> bool:
        return False

    def preserves_storage_sharing(self) -> bool:
        return True


def _storages(tree: Any, found: dict[int, torch.UntypedStorage]) -> dict[int, torch.UntypedStorage]:
    """All storages of a tree by identity. Storages, not tensors, are what torch writes: views of one are written once."""
    if torch.is_tensor(tree):
        storage = tree.untyped_storage()
        found.setdefault(storage._cdata, storage)
    elif isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            _storages(value, found)
    return found


def size_bytes(files: dict[str, Any]) -> int:
    """Bytes the files will take on disk (a little more)."""
    tensors = sum(s.nbytes() for tree in files.values() for s in _storages(tree, {}).values())
    return tensors + len(files) * _OVERHEAD_PER_FILE_BYTES


def _rebuilt(tree: Any, copies: dict[int, torch.UntypedStorage]) -> Any:
    if torch.is_tensor(tree):
        storage = copies[tree.untyped_storage()._cdata]
        empty = torch.empty(0, dtype=tree.dtype)
        return empty.set_(storage, tree.storage_offset(), tree.size(), tree.stride())
    if isinstance(tree, dict):
        return type(tree)((key, _rebuilt(value, copies)) for key, value in tree.items())
    if isinstance(tree, list):
        return [_rebuilt(value, copies) for value in tree]
    if type(tree) is tuple:
        return tuple(_rebuilt(value, copies) for value in tree)
    return copy.deepcopy(tree)  # fp16's loss scaler goes on counting while it is written


class Snapshotter:
    """Copies states into CPU memory that is kept from one snapshot to the next (pinned where there is a GPU)."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def copy(self, files: dict[str, Any]) -> dict[str, Any]:
        """The same trees over copied storages. The copy is valid until the next call."""
        cuda = torch.cuda.is_available()
        result = {}
        for name, tree in files.items():
            copies: dict[int, torch.UntypedStorage] = {}
            for number, (identity, storage) in enumerate(_storages(tree, {}).items()):
                size = storage.nbytes()
                buffer = self._buffers.get((name, number))
                if buffer is None or buffer.numel() != size:
                    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=cuda and size > 0)
                    self._buffers[name, number] = buffer
                source = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                buffer.copy_(source, non_blocking=True)
                copies[identity] = buffer.untyped_storage()
            result[name] = _rebuilt(tree, copies)
        if cuda:
            torch.cuda.synchronize()
        return result


def write_files(folder: Path, files: dict[str, Any]) -> dict[str, FileRecord]:
    """Write and sync each file below `folder`, which exists; returns sizes and checksums.

    Raises OSError, also where another owner of the run has removed the folder: it must not come back.
    """
    records = {}
    for name, tree in files.items():
        path = folder / name
        for parent in reversed(Path(name).parents[:-1]):
            (folder / parent).mkdir(exist_ok=True)
        writer = ChecksumWriter(path)
        try:
            torch.save(tree, writer)  # type: ignore[arg-type]
        except BaseException:
            writer.close(sync=False)
            if writer.error is not None:
                raise writer.error from None
            raise
        records[name] = writer.close()
    return records
