"""DeepSpeed's shards as an index of whole tensors: where every fragment of every parameter lies; no values are loaded.

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

from rim_dist.checkpoint.stored_tensors import ByteRange, StoredTensor, joined, read_tensor
from rim_dist.errors import CheckpointError, first_line

MOMENTS = ("exp_avg", "exp_avg_sq")


class _Fragment:
    """Stands in for DeepSpeed's fragment_address, since importing DeepSpeed takes seconds."""

    numel: int
    start: int


class _Ignored:
    """Stands in for objects of a shard that are not read (loss scaler, stage number)."""

    def __init__(self, *_: object) -> None: ...


_STAND_INS: list[Any] = [
    OrderedDict,
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Ignored, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


@dataclass
class TensorIndex:
    """Weights and optimizer state as whole tensors, by the parameters' names in the trained module."""

    weights: dict[str, StoredTensor] = field(default_factory=dict)  # fp32 where the optimizer keeps a copy
    moments: dict[str, dict[str, StoredTensor]] = field(default_factory=lambda: {kind: {} for kind in MOMENTS})
    steps: dict[str, float] = field(default_factory=dict)  # the optimizer's step count of each trained parameter


def index_shards(
    engine: Path,
    ranks: int,
    zero_stage: int,
    groups: Callable[[], list[list[str]]],
    tensor: int,
    slices: Mapping[str, tuple[int, int]],
) -> TensorIndex:
    """The tensors in the `engine/` folder of a checkpoint saved by `tensor` x `ranks` ranks.

    `groups`: names of the optimizer's parameters, group by group (used for ZeRO-0, which does not record them). `slices`: for
    each parameter that is split over tensor ranks, the dimension and how many entries of it the whole has. Raises
    CheckpointError if a shard is missing or does not fit.
    """
    if zero_stage:
        wanted = {_optimizer_file(engine, rank, tensor_rank) for tensor_rank in range(tensor) for rank in range(ranks)}
        if surplus := sorted(set(engine.glob("*_optim_states.pt")) - wanted):
            raise CheckpointError(f"{surplus[0]}: a shard too many for {tensor} x {ranks} tensor and data ranks")
    own = [_index_tensor_rank(engine, ranks, zero_stage, groups, tensor_rank) for tensor_rank in range(tensor)]
    if tensor == 1:
        return own[0]

    def whole(tensors: list[dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
        result = dict(tensors[0])
        for name in result.keys() & slices.keys():
            if any(name not in other for other in tensors):
                raise CheckpointError(f"{engine}: a tensor rank has no slice of {name}")
            result[name] = joined([other[name] for other in tensors], *slices[name])
        return result

    moments = {kind: whole([index.moments[kind] for index in own]) for kind in MOMENTS}
    return TensorIndex(whole([index.weights for index in own]), moments, own[0].steps)


def _index_tensor_rank(
    engine: Path, ranks: int, zero_stage: int, groups: Callable[[], list[list[str]]], tensor_rank: int
) -> TensorIndex:
    model = f"mp_rank_{tensor_rank:02d}_model_states.pt"
    if zero_stage == 0:
        return _zero0(engine / model, groups)
    optimizer_files = [_optimizer_file(engine, rank, tensor_rank) for rank in range(ranks)]
    if zero_stage == 3:
        return _zero3(engine, [engine / f"zero_pp_rank_{rank}_{model}" for rank in range(ranks)], optimizer_files)
    return _zero12(engine, engine / model, optimizer_files)


def _optimizer_file(engine: Path, rank: int, tensor_rank: int) -> Path:
    name = f"zero_pp_rank_{rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"
    found = [engine / f"{prefix}{name}" for prefix in ("", "bf16_", "fp16_") if (engine / f"{prefix}{name}").is_file()]
    if not found:
        raise CheckpointError(f"{engine / name}: is missing")
    return found[0]


# ---- one file ------------------------------------------------------------------------------------------------


def _load(file: Path) -> dict[str, Any]:
    """A shard with its tensors on the meta device: structure and byte offsets, no values. Tensors and plain data only."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(file, map_location="meta", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from None
    except Exception as error:
        raise CheckpointError(f"{file}: not a shard that can be read ({first_line(error)})") from error


def _stored(file: Path, tensor: torch.Tensor) -> StoredTensor:
    if not tensor.is_contiguous():
        raise CheckpointError(f"{file}: holds a tensor that is not contiguous")
    return StoredTensor(tuple(tensor.shape), tensor.dtype, (_byte_range(file, tensor, 0, tensor.numel()),))


def _byte_range(file: Path, flat: torch.Tensor, start: int, elements: int) -> ByteRange:
    """Where elements `start` to `start + elements` of a contiguous tensor of a shard lie."""
    offset: Any = flat.untyped_storage()._checkpoint_offset  # set by a load to the meta device
    first: Any = flat.storage_offset()
    return ByteRange(str(file), offset + (first + start) * flat.dtype.itemsize, elements * flat.dtype.itemsize)


def _number(file: Path, value: Any) -> float:
    return float(read_tensor(_stored(file, value)) if torch.is_tensor(value) else value)


def _module(file: Path, state: dict[str, Any]) -> dict[str, StoredTensor]:
    return {name: _stored(file, tensor) for name, tensor in state["module"].items() if torch.is_tensor(tensor)}


def _check_ranks(file: Path, partition_count: Any, ranks: int) -> None:
    if max(partition_count if isinstance(partition_count, list) else [partition_count]) != ranks:
        raise CheckpointError(f"{file}: a shard of {partition_count} data ranks among {ranks}")


# ---- the ZeRO stages -----------------------------------------------------------------------------------------


def _zero0(file: Path, groups: Callable[[], list[list[str]]]) -> TensorIndex:
    state = _load(file)
    index = TensorIndex(_module(file, state))
    optimizer = state["optimizer"]
    masters = optimizer.get("fp32_groups")  # bf16 and fp16 without ZeRO
    moments_of = optimizer.get("optimizer_state_dict", optimizer)["state"]
    names = groups()
    flat_names = [name for group in names for name in group]
    if len(flat_names) != len(moments_of) and moments_of:
        raise CheckpointError(f"{file}: the optimizer has {len(moments_of)} parameters, the model {len(flat_names)}")
    for number, moments in moments_of.items():
        name = flat_names[int(number)]
        index.steps[name] = _number(file, moments["step"])
        for kind in MOMENTS:
            index.moments[kind][name] = _stored(file, moments[kind])
    for group, tensors in zip(names, masters or [], strict=False):
        for name, tensor in zip(group, tensors, strict=True):
            index.weights[name] = _stored(file, tensor)
    return index


class _Fragments:
    """Fragments of parameters, collected rank by rank, by kind of tensor and name."""

    def __init__(self, where: Path) -> None:
        self._where = where
        self._found: dict[tuple[str, str], tuple[torch.dtype, list[ByteRange]]] = {}
        self.steps: dict[str, float] = {}

    def add(self, kind: str, name: str, file: Path, flat: torch.Tensor, start: int, elements: int) -> None:
        self._found.setdefault((kind, name), (flat.dtype, []))[1].append(_byte_range(file, flat, start, elements))

    def add_group(
        self, file: Path, weights: torch.Tensor, state: dict[str, Any], fragments: Iterable[tuple[str, int, int]]
    ) -> None:
        """A parameter group of one rank: flat weights and moments, and name, start and elements of each fragment in them."""
        step = _number(file, state["step"])
        for name, start, elements in fragments:
            self.steps[name] = step
            for kind, flat in (("weight", weights), *((kind, state[kind]) for kind in MOMENTS)):
                self.add(kind, name, file, flat, start, elements)

    def whole(self, kind: str, shapes: Mapping[str, Iterable[int]]) -> dict[str, StoredTensor]:
        result = {}
        for name, shape in shapes.items():
            dtype, ranges = self._found.get((kind, name), (torch.float32, []))
            result[name] = StoredTensor(tuple(shape), dtype, tuple(ranges))
            if sum(piece.length for piece in ranges) != result[name].nbytes:
                raise CheckpointError(f"{self._where}: the fragments of {name} do not add up to its shape {tuple(shape)}")
        return result

    def index(self, others: dict[str, StoredTensor], shapes: Mapping[str, Iterable[int]]) -> TensorIndex:
        """The trained parameters with their moments, and `others`, which are not trained."""
        weights = {**others, **self.whole("weight", shapes)}
        return TensorIndex(weights, {kind: self.whole(kind, shapes) for kind in MOMENTS}, self.steps)


def _zero12(engine: Path, model_file: Path, files: list[Path]) -> TensorIndex:
    state = _load(model_file)
    found = _Fragments(engine)
    for file in files:
        optimizer = _load(file)["optimizer_state_dict"]
        _check_ranks(file, optimizer["partition_count"], len(files))
        for group, addresses in enumerate(optimizer["param_slice_mappings"]):
            weights = optimizer["single_partition_of_fp32_groups"][group]
            fragments = ((name, address.start, address.numel) for name, address in addresses.items())
            found.add_group(file, weights, optimizer["base_optimizer_state"]["state"][group], fragments)
    return found.index(
        _module(model_file, state), _shapes(state["param_shapes"])
    )  # frozen parameters and buffers are whole in the module


def _zero3(engine: Path, model_files: list[Path], files: list[Path]) -> TensorIndex:
    ranks = len(files)
    found = _Fragments(engine)
    states = [_load(file) for file in model_files]
    frozen_shapes = states[0]["frozen_param_shapes"] or {}
    groups = states[0]["param_shapes"]
    for rank, (state, file) in enumerate(zip(states, files, strict=True)):
        optimizer = _load(file)["optimizer_state_dict"]
        _check_ranks(file, optimizer["partition_count"], ranks)
        for name, fragment in (state["frozen_param_fragments"] or {}).items():
            elements = _partition(math.prod(frozen_shapes[name]), rank, ranks)
            found.add("frozen", name, model_files[rank], fragment, 0, elements)
        for group, shapes in enumerate(groups):
            fragments, start = [], 0
            for name, shape in shapes.items():
                elements = math.prod(shape)
                fragments.append((name, start, _partition(elements, rank, ranks)))
                start += -(-elements // ranks)
            weights = optimizer["fp32_flat_groups"][group]
            found.add_group(file, weights, optimizer["optimizer_state_dict"]["state"][group], fragments)
    buffers = {name: _stored(model_files[0], states[0]["module"][name]) for name in states[0]["buffer_names"]}
    return found.index({**found.whole("frozen", frozen_shapes), **buffers}, _shapes(groups))


def _shapes(groups: list[dict[str, Iterable[int]]]) -> dict[str, Iterable[int]]:
    return {name: shape for group in groups for name, shape in group.items()}


def _partition(elements: int, rank: int, ranks: int) -> int:
    """Elements of a parameter that a ZeRO-3 rank holds, without the padding that makes all partitions equal."""
    size = -(-elements // ranks)
    return max(0, min(size, elements - rank * size))
