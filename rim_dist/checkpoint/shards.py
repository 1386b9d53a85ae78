"""DeepSpeed's shards as an index of whole tensors: where every fragment of every parameter lies, nothing loaded.

The files of each tensor rank hold its slice of the model; `index_shards` joins them along each parameter's own dimension.
Sequence ranks are data ranks to DeepSpeed and need nothing.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rim_dist.checkpoint.tensors import Extent, StoredTensor, joined, read_tensor
from rim_dist.errors import CheckpointError

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Fragment:
    """Stands in for DeepSpeed's fragment_address: importing DeepSpeed takes seconds and this is all it would be for."""

    numel: int
    start: int


class _Ignored:
    """Stands in for objects of a shard that are not looked at (loss scaler, stage number)."""

    def __init__(self, *_: object) -> None: ...


_STAND_INS: list[Any] = [
    OrderedDict,
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Ignored, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


@dataclass
class ShardIndex:
    """Whole tensors by the names they have in the trained module."""

    weights: dict[str, StoredTensor] = field(default_factory=dict)  # fp32 where the optimizer keeps a copy
    moments: dict[str, dict[str, StoredTensor]] = field(default_factory=dict)  # exp_avg, exp_avg_sq -> name
    steps: dict[str, float] = field(default_factory=dict)  # the optimizer's step count of each trained parameter


def _load(file: Path) -> dict[str, Any]:
    """A shard with its tensors on the meta device: structure and places, no data. Tensors and plain data only."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(file, map_location="meta", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        raise CheckpointError(f"{file}: not a shard that can be read ({str(error).splitlines()[0]})") from error


def _whole(file: Path, tensor: torch.Tensor) -> StoredTensor:
    if not tensor.is_contiguous():
        raise CheckpointError(f"{file}: holds a tensor that is not contiguous")
    return StoredTensor(tuple(tensor.shape), tensor.dtype, (_extent(file, tensor, 0, tensor.numel()),))


def _extent(file: Path, flat: torch.Tensor, start: int, elements: int) -> Extent:
    """Elements `start` to `start + elements` of a contiguous tensor of a shard."""
    offset: Any = flat.untyped_storage()._checkpoint_offset  # set by a load to the meta device
    first: Any = flat.storage_offset()
    return Extent(str(file), offset + (first + start) * flat.dtype.itemsize, elements * flat.dtype.itemsize)


def _number(file: Path, value: Any) -> float:
    if not torch.is_tensor(value):
        return float(value)
    return float(read_tensor(_whole(file, value)))


class _Pieces:
    """Fragments of parameters collected rank by rank."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[torch.dtype, list[Extent]]] = {}

    def add(self, name: str, file: Path, flat: torch.Tensor, start: int, elements: int) -> None:
        self._found.setdefault(name, (flat.dtype, []))[1].append(_extent(file, flat, start, elements))

    def tensors(self, shapes: Mapping[str, Iterable[int]], where: Path) -> dict[str, StoredTensor]:
        result = {}
        for name, shape in shapes.items():
            dtype, extents = self._found.get(name, (torch.float32, []))
            stored = StoredTensor(tuple(shape), dtype, tuple(extents))
            if sum(e.length for e in extents) != stored.nbytes:
                raise CheckpointError(f"{where}: the fragments of {name} do not add up to its shape {stored.shape}")
            result[name] = stored
        return result


def index_shards(
    engine: Path,
    ranks: int,
    zero_stage: int,
    groups: Callable[[], list[list[str]]],
    tensor: int = 1,
    slices: Mapping[str, tuple[int, int]] | None = None,
) -> ShardIndex:
    """The tensors in the `engine/` folder of a checkpoint saved by `tensor` x `ranks` ranks.

    `groups`: names of the optimizer's parameters, group by group (used for ZeRO-0, which does not record them). `slices`: for
    each parameter that tensor ranks share, the dimension and how many entries of it the whole has. Raises CheckpointError if a
    shard is missing or does not fit.
    """
    if zero_stage:
        wanted = {_optimizer_file(engine, rank, place) for place in range(tensor) for rank in range(ranks)}
        if surplus := sorted(set(engine.glob("*_optim_states.pt")) - wanted):
            raise CheckpointError(f"{surplus[0]}: a shard too many for {tensor} x {ranks} tensor and data ranks")
    parts = [_index_slice(engine, ranks, zero_stage, groups, place) for place in range(tensor)]
    if tensor == 1:
        return parts[0]
    first = parts[0]
    return ShardIndex(
        _joined([part.weights for part in parts], slices or {}, engine),
        {kind: _joined([part.moments[kind] for part in parts], slices or {}, engine) for kind in first.moments},
        first.steps,
    )


def _joined(
    parts: list[dict[str, StoredTensor]], slices: Mapping[str, tuple[int, int]], where: Path
) -> dict[str, StoredTensor]:
    result = {}
    for name, stored in parts[0].items():
        if name not in slices:
            result[name] = stored
            continue
        if any(name not in part for part in parts):
            raise CheckpointError(f"{where}: a tensor rank has no slice of {name}")
        dim, length = slices[name]
        result[name] = joined([part[name] for part in parts], dim, length)
    return result


def _index_slice(engine: Path, ranks: int, zero_stage: int, groups: Callable[[], list[list[str]]], place: int) -> ShardIndex:
    """What one tensor rank's files hold."""
    if zero_stage == 0:
        return _unpartitioned(engine / f"mp_rank_{place:02d}_model_states.pt", groups)
    optimizer_files = [_optimizer_file(engine, rank, place) for rank in range(ranks)]
    if zero_stage == 3:
        names = [f"zero_pp_rank_{rank}_mp_rank_{place:02d}_model_states.pt" for rank in range(ranks)]
        return _zero3(engine, [engine / name for name in names], optimizer_files)
    return _zero12(engine, engine / f"mp_rank_{place:02d}_model_states.pt", optimizer_files)


def _optimizer_file(engine: Path, rank: int, place: int) -> Path:
    names = [f"{prefix}zero_pp_rank_{rank}_mp_rank_{place:02d}_optim_states.pt" for prefix in ("", "bf16_", "fp16_")]
    found = [engine / name for name in names if (engine / name).is_file()]
    if not found:
        raise CheckpointError(f"{engine / names[0]}: is missing")
    return found[0]


def _module(file: Path, state: dict[str, Any]) -> dict[str, StoredTensor]:
    return {name: _whole(file, tensor) for name, tensor in state["module"].items() if torch.is_tensor(tensor)}


def _unpartitioned(file: Path, groups: Callable[[], list[list[str]]]) -> ShardIndex:
    state = _load(file)
    index = ShardIndex(weights=_module(file, state), moments={kind: {} for kind in MOMENTS})
    optimizer = state["optimizer"]
    masters = optimizer.get("fp32_groups")  # bf16 and fp16 without ZeRO
    inner = optimizer.get("optimizer_state_dict", optimizer)
    names = groups()
    flat_names = [name for group in names for name in group]
    if len(flat_names) != len(inner["state"]) and inner["state"]:
        raise CheckpointError(f"{file}: the optimizer has {len(inner['state'])} parameters, the model {len(flat_names)}")
    for number, moments in inner["state"].items():
        name = flat_names[int(number)]
        index.steps[name] = _number(file, moments["step"])
        for kind in MOMENTS:
            index.moments[kind][name] = _whole(file, moments[kind])
    for group, tensors in zip(names, masters or [], strict=False):
        for name, tensor in zip(group, tensors, strict=True):
            index.weights[name] = _whole(file, tensor)
    return index


def _zero12(engine: Path, model_file: Path, files: list[Path]) -> ShardIndex:
    state = _load(model_file)
    shapes = {name: shape for group in state["param_shapes"] for name, shape in group.items()}
    pieces = {kind: _Pieces() for kind in ("fp32", *MOMENTS)}
    steps: dict[str, float] = {}
    for file in files:
        optimizer = _load(file)["optimizer_state_dict"]
        counts = optimizer["partition_count"]
        if max(counts if isinstance(counts, list) else [counts]) != len(files):
            raise CheckpointError(f"{file}: a shard of {counts} data ranks among {len(files)}")
        for group, addresses in enumerate(optimizer["param_slice_mappings"]):
            moments = optimizer["base_optimizer_state"]["state"][group]
            flats = {"fp32": optimizer["single_partition_of_fp32_groups"][group], **{k: moments[k] for k in MOMENTS}}
            step = _number(file, moments["step"])
            for name, address in addresses.items():
                steps[name] = step
                for kind, flat in flats.items():
                    pieces[kind].add(name, file, flat, address.start, address.numel)
    masters = pieces["fp32"].tensors(shapes, engine)
    moments = {kind: pieces[kind].tensors(shapes, engine) for kind in MOMENTS}
    # Frozen parameters and buffers are whole in the module.
    return ShardIndex({**_module(model_file, state), **masters}, moments, steps)


def _zero3(engine: Path, model_files: list[Path], files: list[Path]) -> ShardIndex:
    ranks = len(files)
    pieces = {kind: _Pieces() for kind in ("fp32", "frozen", *MOMENTS)}
    steps: dict[str, float] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    frozen: dict[str, tuple[int, ...]] = {}
    buffers: dict[str, StoredTensor] = {}
    for rank, (model_file, file) in enumerate(zip(model_files, files, strict=True)):
        state = _load(model_file)
        optimizer = _load(file)["optimizer_state_dict"]
        if optimizer["partition_count"] != ranks:
            raise CheckpointError(f"{file}: a shard of {optimizer['partition_count']} data ranks among {ranks}")
        if rank == 0:
            shapes = {name: tuple(shape) for group in state["param_shapes"] for name, shape in group.items()}
            frozen = {name: tuple(shape) for name, shape in (state["frozen_param_shapes"] or {}).items()}
            buffers = {name: _whole(model_file, state["module"][name]) for name in state["buffer_names"]}
        for name, fragment in (state["frozen_param_fragments"] or {}).items():
            pieces["frozen"].add(name, model_file, fragment, 0, _share(math.prod(frozen[name]), rank, ranks))
        inner = optimizer["optimizer_state_dict"]["state"]
        for group, names in enumerate(state["param_shapes"]):
            moments = inner[group]
            flats = {"fp32": optimizer["fp32_flat_groups"][group], **{k: moments[k] for k in MOMENTS}}
            step = _number(file, moments["step"])
            start = 0
            for name, shape in names.items():
                elements = math.prod(shape)
                steps[name] = step
                for kind, flat in flats.items():
                    pieces[kind].add(name, file, flat, start, _share(elements, rank, ranks))
                start += -(-elements // ranks)
    weights = {**pieces["frozen"].tensors(frozen, engine), **buffers, **pieces["fp32"].tensors(shapes, engine)}
    return ShardIndex(weights, {kind: pieces[kind].tensors(shapes, engine) for kind in MOMENTS}, steps)


def _share(elements: int, rank: int, ranks: int) -> int:
    """Elements of a parameter that a ZeRO-3 rank holds, without the padding that makes all shares equal."""
    size = -(-elements // ranks)
    return max(0, min(size, elements - rank * size))
