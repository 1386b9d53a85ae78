"""What two checkpoints or HF folders differ in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rim_dist.checkpoint import store
from rim_dist.checkpoint.describe import resolve
from rim_dist.checkpoint.index import index_checkpoint
from rim_dist.checkpoint.model_card import read_export_info, recipe_of_export
from rim_dist.checkpoint.safetensors_files import read_folder_index
from rim_dist.checkpoint.stored_tensors import ModelTensor, as_model_tensors, read_model_tensor


def _flat(tree: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}")
    else:
        yield path, tree


def _configuration(folder: Path, is_hf: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of config.json, and those of the recipe; empty for an HF folder without one."""
    config = json.loads(((folder if is_hf else folder / store.MODEL) / "config.json").read_text(encoding="utf-8"))
    recipe = store.read_recipe(folder) if not is_hf else recipe_of_export(folder) if read_export_info(folder) else None
    return dict(_flat(config, "config")), dict(_flat(recipe.model_dump(mode="json"), "recipe")) if recipe else {}


def _tensors(folder: Path, is_hf: bool) -> dict[str, ModelTensor]:
    return as_model_tensors(read_folder_index(folder)) if is_hf else index_checkpoint(folder).model


def differences(a: str | Path, b: str | Path) -> list[str]:
    """A line for each field of configuration and each tensor of the plain model that differs; a pair in memory at a time."""
    (left, left_is_hf), (right, right_is_hf) = resolve(a), resolve(b)
    (old, old_recipe), (new, new_recipe) = _configuration(left, left_is_hf), _configuration(right, right_is_hf)
    if old_recipe and new_recipe:
        old, new = old | old_recipe, new | new_recipe
    keys = sorted(old.keys() | new.keys())
    lines = [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]
    first, second = _tensors(left, left_is_hf), _tensors(right, right_is_hf)
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            lines.append(f"{name}: only in {left if name in first else right}")
        elif first[name].shape != second[name].shape:
            lines.append(f"{name}: shape {first[name].shape} -> {second[name].shape}")
        else:
            lines += _change(name, first[name], second[name])
    return lines


def _change(name: str, old: ModelTensor, new: ModelTensor) -> list[str]:
    # A merged adapter, or rows of several tensors, have no dtype of their own.
    dtypes = [t.dtype if t.low_rank is None and len(t.stacked) == 1 else torch.float32 for t in (old, new)]
    x, y = (read_model_tensor(tensor, dtype).double() for tensor, dtype in zip((old, new), dtypes, strict=True))
    kinds = "" if dtypes[0] == dtypes[1] else f" ({dtypes[0]} -> {dtypes[1]})"
    if not kinds and torch.equal(x, y):
        return []
    change = x - y
    relative = float(change.norm() / x.norm().clamp_min(1e-300))
    return [f"{name}: relative change {relative:.3e}, largest {float(change.abs().max()):.3e}{kinds}"]
