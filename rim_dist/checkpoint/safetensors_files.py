"""Safetensors files: where their tensors lie, and model tensors written into new ones without holding the model.

Writing takes some MiB for a tensor that is copied and the whole tensor for one that is computed (a merged adapter). Files
are divided among workers.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from rim_dist.checkpoint.stored_tensors import ByteRange, ModelTensor, StoredTensor, close_files, model_chunks
from rim_dist.checkpoint.workers import Workers
from rim_dist.errors import CheckpointError
from rim_dist.files import PARTIAL, ChecksumWriter, FileRecord, require_room, sync_path, write_manifest
from rim_dist.heartbeat import send_heartbeat

_NAME_OF_DTYPE = {
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
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
}
_LFS = b"version https://git-lfs"
_DTYPE_OF_NAME = {name: dtype for dtype, name in _NAME_OF_DTYPE.items()}


# ---- reading -------------------------------------------------------------------------------------------------


def read_safetensors_index(file: Path) -> dict[str, StoredTensor]:
    """Where the tensors of a safetensors file lie. Raises CheckpointError if it is none, or is shorter than it says."""
    try:
        with file.open("rb") as stream:
            header = 8 + int.from_bytes(stream.read(8), "little")
            stream.seek(0)
            if stream.read(len(_LFS)) == _LFS:
                raise ValueError("a Git LFS pointer stands in for it: fetch it with `git lfs pull`")
            stream.seek(8)
            if header > file.stat().st_size:
                raise ValueError("its header is longer than the file")
            entries = json.loads(stream.read(header - 8))
        entries.pop("__metadata__", None)
        tensors = {}
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPE_OF_NAME:
                raise CheckpointError(f"{file}: {name} is {entry['dtype']}, which is not read here")
            ranges = (ByteRange(str(file), header + start, end - start),)
            tensors[name] = StoredTensor(tuple(entry["shape"]), _DTYPE_OF_NAME[entry["dtype"]], ranges)
            if tensors[name].nbytes != end - start or header + end > file.stat().st_size:
                raise CheckpointError(f"{file}: {name}: shorter than its shape says")
        return tensors
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error})") from None


def read_folder_index(folder: Path, stem: str = "model") -> dict[str, StoredTensor]:
    """The tensors of `stem.safetensors` or, without it (as transformers does), of the files of its index, by name.

    Raises CheckpointError if a tensor of the index is not in its file, or a file has one that the index does not have there.
    """
    close_files()
    index = folder / f"{stem}.safetensors.index.json"
    if (single := folder / f"{stem}.safetensors").is_file() or not index.is_file():
        return read_safetensors_index(single)
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{index}: cannot be read ({error})") from None
    found: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        for name, stored in read_safetensors_index(folder / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(f"{folder / file}: holds {name}, which {index.name} has in {weight_map.get(name)}")
            found[name] = stored
    if missing := sorted(set(weight_map) - set(found)):
        raise CheckpointError(f"{index}: names {missing[0]}, which is in none of its files")
    return found


# ---- writing -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OutputFile:
    """One safetensors file to write: its tensors in order, each with the dtype it gets."""

    name: str  # below the folder that is written
    tensors: dict[str, tuple[ModelTensor, torch.dtype]]

    @property
    def data_bytes(self) -> int:
        return sum(_size_bytes(tensor, dtype) for tensor, dtype in self.tensors.values())


def _size_bytes(tensor: ModelTensor, dtype: torch.dtype) -> int:
    return math.prod(tensor.shape) * dtype.itemsize


def plan_files(
    model: dict[str, ModelTensor], dtype: torch.dtype | None, shard_bytes: int, stem: str = "model"
) -> list[OutputFile]:
    """Files of at most `shard_bytes` (a larger tensor gets one of its own) with all tensors in the model's order.

    `dtype`: of floating-point tensors; None keeps each as it is stored. Other tensors always keep theirs.
    """
    files: list[dict[str, tuple[ModelTensor, torch.dtype]]] = [{}]
    filled = 0
    for name, tensor in model.items():
        target = dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype
        size = _size_bytes(tensor, target)
        if files[-1] and filled + size > shard_bytes:
            files.append({})
            filled = 0
        files[-1][name] = (tensor, target)
        filled += size
    count = len(files)
    if count == 1:
        return [OutputFile(f"{stem}.safetensors", files[0])]
    return [OutputFile(f"{stem}-{i:05d}-of-{count:05d}.safetensors", tensors) for i, tensors in enumerate(files, 1)]


def write_index(folder: Path, files: list[OutputFile], stem: str = "model") -> None:
    """Write the index of several files; nothing for one alone. A tied head has no entry, since it is in no file."""
    if len(files) > 1:
        weight_map = {name: Path(file.name).name for file in files for name in file.tensors}
        total = sum(file.data_bytes for file in files)  # bytes
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2)
        (folder / f"{stem}.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _header(file: OutputFile) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (tensor, dtype) in file.tensors.items():
        end = position + _size_bytes(tensor, dtype)
        entries[name] = {"dtype": _NAME_OF_DTYPE[dtype], "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_file(folder: Path, file: OutputFile) -> FileRecord:
    """Write and sync one file. Raises CheckpointError for a value that became infinite."""
    writer = ChecksumWriter(folder / file.name)
    try:
        writer.write(_header(file))
        for name, (tensor, dtype) in file.tensors.items():
            send_heartbeat(f"writing {name}")
            for chunk in model_chunks(tensor, dtype):
                if dtype == torch.float16 and not torch.isfinite(chunk).all():
                    raise CheckpointError(f"{name}: a value does not fit into fp16; export with --dtype bf16 or fp32")
                writer.write(chunk.view(torch.uint8).numpy())
    except BaseException:
        writer.close(sync=False)
        raise
    return writer.close()


def _write_files(folder: Path, files: list[OutputFile], threads: int) -> dict[str, FileRecord]:
    with ThreadPoolExecutor(threads) as pool:
        records = pool.map(lambda file: _write_file(folder, file), files)
        return dict(zip((file.name for file in files), records, strict=True))


def write_all(folder: Path, files: list[OutputFile], workers: Workers, meanwhile: Callable[[], None]) -> dict[str, FileRecord]:
    """Write all files; returns their records, the same on every MPI rank. Raises CheckpointError or OSError.

    `meanwhile`: what the first rank does while its processes write, or before it writes itself.
    """
    assigned: list[list[OutputFile]] = [[] for _ in range(workers.count)]
    for file in sorted(files, key=lambda f: -f.data_bytes):  # like amounts: the largest first, to the worker with the least
        min(assigned, key=lambda own: sum(f.data_bytes for f in own)).append(file)
    # Copying and computing checksums leave Python's lock: a process alone does two files at a time.
    threads = min(2, os.cpu_count() or 1) if workers.count == 1 else 1
    written = workers.run(_write_files, [(folder, own, threads) for own in assigned], meanwhile)
    return {name: record for records in written for name, record in records.items()}


def write_folder(
    out: Path,
    files: list[OutputFile],
    write_rest: Callable[[Path], None],
    workers: Workers,
    finish: Callable[[Path, dict[str, FileRecord]], None] = write_manifest,
) -> None:
    """Write a folder of tensor files and of what `write_rest` writes, so that `out` is whole or absent.

    It is written beside `out` and renamed after `finish`, which gets the records of the tensor files. Raises CheckpointError if
    it cannot be written.
    """
    partial = out.with_name(out.name + PARTIAL)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in {partial, *((partial / file.name).parent for file in files)}:
            folder.mkdir(parents=True, exist_ok=True)
        require_room(sum(file.data_bytes for file in files), partial, out)

    def complete() -> None:
        finish(partial, records)
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
        sync_path(out.parent)

    try:
        workers.on_first(begin)
        records = write_all(partial, files, workers, lambda: write_rest(partial))
        workers.on_first(complete)
    except OSError as error:
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from None
    finally:
        close_files()
        if workers.is_first:
            shutil.rmtree(partial, ignore_errors=True)
