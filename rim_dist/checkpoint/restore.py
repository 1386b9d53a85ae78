"""Loads a portable checkpoint's optimizer state into a DeepSpeed engine of any number of ranks.

Each rank reads the fragments of whole tensors that DeepSpeed's own fragment map assigns to it. DeepSpeed's universal
checkpoints are not used: they carry the same tensors, but their loader needs pickle's full powers, leaves frozen parameters
(LoRA) out, and has nothing for ZeRO-0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rim_dist.checkpoint.portable import read_portable
from rim_dist.checkpoint.stored_tensors import StoredTensor, elements_of, read_tensor, sliced
from rim_dist.checkpoint.zero_shards import MOMENTS
from rim_dist.errors import CheckpointError
from rim_dist.parallel.tensor import Slice, slice_of


@dataclass(frozen=True)
class _Fragment:
    """Elements `start` to `start + count` of a parameter. They are at `position` of `flat`, which the inner optimizer updates.

    `split`: the slice of the whole parameter that this tensor rank has; None if it has all of it.
    """

    name: str
    split: Slice | None
    start: int
    count: int
    flat: torch.Tensor
    position: int


def restore_optimizer(checkpoint: Path, engine: Any, inner: torch.optim.Optimizer, zero_stage: int) -> None:
    """Set fp32 weights, moments and step counts of an engine whose module already has the checkpoint's weights."""
    index, _ = read_portable(checkpoint)
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    seen: set[str] = set()
    for fragment in _fragments(engine, inner, zero_stage, names):
        seen.add(fragment.name)
        if fragment.name not in index.steps:
            raise CheckpointError(f"{checkpoint}: no optimizer state for {fragment.name}")
        state = inner.state[fragment.flat]
        if not state:
            state["step"] = _step_count(index.steps[fragment.name], fragment.flat, inner)
            state |= {kind: torch.zeros_like(fragment.flat.data) for kind in MOMENTS}
        with torch.no_grad():
            _copy(fragment, index.weights[fragment.name], fragment.flat)
            for kind in MOMENTS:
                _copy(fragment, index.moments[kind][fragment.name], state[kind])
    if zero_stage == 0 and (left := sorted(set(index.steps) - seen)):
        raise CheckpointError(f"{checkpoint}: the model does not train {left[0]}")


def _step_count(step: float, flat: torch.Tensor, inner: torch.optim.Optimizer) -> torch.Tensor | int:
    if not isinstance(inner, torch.optim.AdamW):
        return int(step)  # DeepSpeed's CPUAdam counts with an int
    fused = any(group.get("fused") for group in inner.param_groups)
    return torch.tensor(step, dtype=torch.float32, device=flat.device if fused else "cpu")


def _copy(fragment: _Fragment, stored: StoredTensor, target: torch.Tensor) -> None:
    if fragment.split is not None:
        split = fragment.split
        stored = sliced(stored, split.dim, min(split.start, split.full_size), min(split.start, split.full_size) + split.real)
    count = max(0, min(fragment.count, stored.elements - fragment.start))  # the rest is padding of the vocabulary
    own = target.data.view(-1)[fragment.position : fragment.position + fragment.count]
    own[count:].zero_()
    if count:
        own[:count].copy_(read_tensor(elements_of(stored, fragment.start, count)))


def _fragments(engine: Any, inner: torch.optim.Optimizer, zero_stage: int, names: dict[int, str]) -> Iterator[_Fragment]:
    optimizer = engine.optimizer
    if zero_stage == 0:
        # The inner optimizer's parameters are the module's, or fp32 copies of them in the same order.
        originals = getattr(optimizer, "fp16_groups", None) or [group["params"] for group in inner.param_groups]
        for parameters, own in zip(originals, inner.param_groups, strict=True):
            for parameter, flat in zip(parameters, own["params"], strict=True):
                yield _Fragment(names[id(parameter)], slice_of(parameter), 0, flat.numel(), flat, 0)
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
