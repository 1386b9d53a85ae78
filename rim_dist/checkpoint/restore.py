"""A portable checkpoint's optimizer state into a DeepSpeed engine of any number of ranks: each rank reads its own fragments.

DeepSpeed's universal checkpoints carry the same tensors, one pickle a parameter and state; their loader needs pickle's full
powers, leaves frozen parameters (LoRA) out, and has nothing for ZeRO-0. So whole tensors lie in safetensors here, and what
DeepSpeed's own fragment map says is this rank's is copied out of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rim_dist.checkpoint.portable import read_portable
from rim_dist.checkpoint.shards import MOMENTS
from rim_dist.checkpoint.store import PORTABLE
from rim_dist.checkpoint.tensors import StoredTensor, elements_of, read_tensor, sliced
from rim_dist.errors import CheckpointError
from rim_dist.parallel.tensor import Slice, slice_of


@dataclass(frozen=True)
class _Fragment:
    """Elements `start` to `start + count` of a parameter lie at `position` of `flat`, a parameter of the inner optimizer.

    The parameter is a tensor rank's; `split` says what part of the whole one that is.
    """

    name: str
    split: Slice | None
    start: int
    count: int
    flat: torch.Tensor
    position: int


def restore_optimizer(checkpoint: Path, engine: Any, inner: torch.optim.Optimizer, zero_stage: int) -> None:
    """Set fp32 weights, moments and step counts of an engine whose module already has the checkpoint's weights."""
    index = read_portable(checkpoint / PORTABLE).index
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    fused = any(group.get("fused") for group in inner.param_groups)
    seen: set[str] = set()
    for fragment in _fragments(engine, inner, zero_stage, names):
        seen.add(fragment.name)
        if fragment.name not in index.steps:
            raise CheckpointError(f"{checkpoint}: no optimizer state for {fragment.name}")
        state = inner.state[fragment.flat]
        if not state:
            _begin(state, fragment.flat, index.steps[fragment.name], inner, fused)
        with torch.no_grad():
            _copy(fragment, index.weights[fragment.name], fragment.flat)
            for kind in MOMENTS:
                _copy(fragment, index.moments[kind][fragment.name], state[kind])
    if zero_stage == 0 and (left := sorted(set(index.steps) - seen)):
        raise CheckpointError(f"{checkpoint}: the model does not train {left[0]}")


def _begin(state: dict[str, Any], flat: torch.Tensor, step: float, inner: torch.optim.Optimizer, fused: bool) -> None:
    if isinstance(inner, torch.optim.AdamW):
        state["step"] = torch.tensor(step, dtype=torch.float32, device=flat.device if fused else "cpu")
    else:  # DeepSpeed's CPUAdam counts with an int
        state["step"] = int(step)
    for kind in MOMENTS:
        state[kind] = torch.zeros_like(flat.data)


def _copy(fragment: _Fragment, stored: StoredTensor, target: torch.Tensor) -> None:
    if fragment.split is not None:
        split = fragment.split
        stored = sliced(stored, split.dim, min(split.start, split.full_size), min(split.start, split.full_size) + split.real)
    count = max(0, min(fragment.count, stored.elements - fragment.start))  # what is left is padding of the vocabulary
    part = target.data.view(-1)[fragment.position : fragment.position + fragment.count]
    part[count:].zero_()
    if count:
        part[:count].copy_(read_tensor(elements_of(stored, fragment.start, count)))


def _fragments(engine: Any, inner: torch.optim.Optimizer, zero_stage: int, names: dict[int, str]) -> Iterator[_Fragment]:
    optimizer = engine.optimizer
    if zero_stage == 0:
        yield from _whole(optimizer, inner, names)
    elif zero_stage == 3:
        for parameter in engine.module.parameters():
            if not parameter.requires_grad:
                continue
            group, position, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            rank = optimizer._get_param_partition_rank(parameter)
            count = max(0, min(size, parameter.ds_numel - rank * size))
            flat = optimizer.fp32_partitioned_groups_flat[group]
            yield _Fragment(names[id(parameter)], slice_of(parameter), rank * size, count, flat, position)
    else:
        for group, flat in enumerate(optimizer.single_partition_of_fp32_groups):
            for parameter in optimizer.bit16_groups[group]:
                mapping = parameter._hp_mapping
                if mapping is not None:
                    low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield _Fragment(names[id(parameter)], slice_of(parameter), low.start, low.numel, flat, high.start)


def _whole(optimizer: Any, inner: torch.optim.Optimizer, names: dict[int, str]) -> Iterator[_Fragment]:
    """Without ZeRO: the inner optimizer's parameters are the module's, or fp32 copies of them in the same order."""
    groups = getattr(optimizer, "fp16_groups", None)
    lists = groups if groups is not None else [group["params"] for group in inner.param_groups]
    for originals, group in zip(lists, inner.param_groups, strict=True):
        for original, flat in zip(originals, group["params"], strict=True):
            yield _Fragment(names[id(original)], slice_of(original), 0, flat.numel(), flat, 0)
