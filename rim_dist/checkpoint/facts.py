"""What a checkpoint or HF folder is, and what two of them differ in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rim_dist.checkpoint import store
from rim_dist.checkpoint.card import ABOUT, recipe_of_export
from rim_dist.checkpoint.contents import read_contents
from rim_dist.checkpoint.portable import is_portable
from rim_dist.checkpoint.retention import read_scores
from rim_dist.checkpoint.tensors import ModelTensor, read_folder_index, read_tensor
from rim_dist.errors import CheckpointError
from rim_dist.files import MANIFEST, damage_of, mib


def _resolve(path: str | Path) -> tuple[Path, bool]:
    """The folder meant, and whether it is an HF folder."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder, True
    return store.find_checkpoint(folder), False


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def inspect_path(path: str | Path) -> dict[str, Any]:
    """The facts of a checkpoint or HF folder. `damage` is empty if nothing is wrong; checksums are read."""
    folder, plain = _resolve(path)
    if plain:
        return _inspect_hf(folder)
    recipe, state = store.read_recipe(folder), store.read_state(folder)
    parallel = recipe.parallel
    return {
        "kind": "portable checkpoint" if is_portable(folder) else "checkpoint",
        "path": str(folder),
        "method": recipe.method,
        "stage": state.stage,
        "stage_step": state.stage_step,
        "step": state.step,
        "samples": state.samples,
        "finished": state.finished,
        "degrees": {
            "tensor": parallel.tensor,
            "sequence": parallel.sequence,
            "data": state.ranks // (parallel.tensor * parallel.sequence),
        },
        "zero_stage": parallel.zero_stage,
        "dtype": recipe.model.dtype,
        "lora_rank": recipe.model.lora.rank if recipe.model.lora else None,
        "scores": read_scores(folder.parent).get(folder.name, {}),
        "bytes": _size(folder),
        "damage": damage_of(folder, checksums=True),
        "damaged_beside_it": {
            other.name: wrong
            for other in store.all_checkpoints(folder.parent)
            if other != folder and (wrong := damage_of(other, checksums=False))
        },
        "recipe": recipe.model_dump(mode="json"),
    }


def _inspect_hf(folder: Path) -> dict[str, Any]:
    about: dict[str, Any] = {}
    if (folder / "rim_dist.json").is_file():
        about = json.loads((folder / "rim_dist.json").read_text(encoding="utf-8"))
    damage = ""
    if (folder / MANIFEST).is_file():
        damage = damage_of(folder, checksums=True)
    parameters: int | None = None
    try:
        tensors = read_folder_index(folder)
        parameters = sum(t.elements for t in tensors.values())
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    except CheckpointError as error:
        damage, dtypes = damage or str(error), []
    return {
        "kind": "RiM export" if about else "HF folder",
        "path": str(folder),
        **{key: about[key] for key in ("method", "stage", "stage_step", "step", "samples", "blocks") if key in about},
        "degrees": {"tensor": 1, "sequence": 1, "data": 1},
        "parameters": parameters,
        "dtype": ", ".join(dtypes),
        "bytes": _size(folder),
        "damage": damage,
        "checksums": (folder / MANIFEST).is_file(),
        "recipe": about.get("recipe"),
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts as lines for a person, the recipe last."""
    import yaml

    lines = []
    for key, value in facts.items():
        if key in ("recipe", "damage") or value is None or value == {}:
            continue
        if key == "bytes":
            lines.append(f"size: {mib(value)}")
        elif key == "damaged_beside_it":
            lines += [f"damaged beside it: {name}: {wrong}" for name, wrong in value.items()]
        elif isinstance(value, dict):
            lines.append(f"{key}: {', '.join(f'{k} {v:g}' for k, v in value.items())}")
        else:
            lines.append(f"{key}: {value}")
    unknown = facts.get("checksums") is False
    lines.append(f"integrity: {facts['damage'] or ('no checksums to compare with' if unknown else 'intact')}")
    if facts["recipe"]:
        lines += ["recipe:", *(f"  {line}" for line in yaml.safe_dump(facts["recipe"], sort_keys=False).splitlines())]
    return "\n".join(lines)


def _flat(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, tree


def _configuration(folder: Path, plain: bool) -> dict[str, Any]:
    place = folder if plain else folder / store.MODEL
    flat = {f"config.{k}": v for k, v in _flat(json.loads((place / "config.json").read_text(encoding="utf-8")))}
    recipe = (recipe_of_export(folder) if (folder / ABOUT).is_file() else None) if plain else store.read_recipe(folder)
    return flat | {f"recipe.{k}": v for k, v in _flat(recipe.model_dump(mode="json") if recipe else {})}


def _tensors(folder: Path, plain: bool) -> dict[str, ModelTensor]:
    if plain:
        return {name: ModelTensor((stored,), stored.shape) for name, stored in read_folder_index(folder).items()}
    return read_contents(folder).model


def _value(tensor: ModelTensor) -> torch.Tensor:
    from rim_dist.checkpoint.assemble import tensor_values

    if tensor.low_rank is None and len(tensor.parts) == 1:
        return read_tensor(tensor.parts[0])
    return torch.cat([chunk.clone() for chunk in tensor_values(tensor, torch.float32)]).reshape(tensor.shape)


def differences(a: str | Path, b: str | Path) -> list[str]:
    """A line for each field of configuration and each tensor of the plain model that differs; a pair in memory at a time."""
    (left, left_plain), (right, right_plain) = _resolve(a), _resolve(b)
    old, new = _configuration(left, left_plain), _configuration(right, right_plain)
    if not all(any(key.startswith("recipe.") for key in side) for side in (old, new)):
        old, new = ({k: v for k, v in side.items() if not k.startswith("recipe.")} for side in (old, new))
    keys = sorted(old.keys() | new.keys())
    lines = [f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys if old.get(key) != new.get(key)]
    first, second = _tensors(left, left_plain), _tensors(right, right_plain)
    for name in sorted(first.keys() | second.keys()):
        if name not in first or name not in second:
            lines.append(f"{name}: only in {left if name in first else right}")
        elif first[name].shape != second[name].shape:
            lines.append(f"{name}: shape {first[name].shape} -> {second[name].shape}")
        else:
            x, y = _value(first[name]), _value(second[name])
            kinds = "" if x.dtype == y.dtype else f" ({x.dtype} -> {y.dtype})"
            x, y = x.double(), y.double()
            if kinds or not torch.equal(x, y):
                change = x - y
                relative = float(change.norm() / x.norm().clamp_min(1e-300))
                lines.append(f"{name}: relative change {relative:.3e}, largest {float(change.abs().max()):.3e}{kinds}")
    return lines
