"""What a checkpoint or HF folder is: stage, step, degrees, size, integrity, recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rim_dist.checkpoint import store
from rim_dist.checkpoint.model_card import read_export_info
from rim_dist.checkpoint.portable import is_portable
from rim_dist.checkpoint.retention import read_scores
from rim_dist.checkpoint.safetensors_files import read_folder_index
from rim_dist.errors import CheckpointError
from rim_dist.files import MANIFEST, damage_of, mib


def resolve(path: str | Path) -> tuple[Path, bool]:
    """The folder that a path means, and whether it is an HF folder."""
    folder = Path(path)
    if (folder / "config.json").is_file():
        return folder, True
    return store.find_checkpoint(folder), False


def inspect_path(path: str | Path) -> dict[str, Any]:
    """What a checkpoint or HF folder is, by field. `damage` is empty if nothing is wrong; checksums are compared."""
    folder, is_hf = resolve(path)
    return _inspect_hf(folder) if is_hf else _inspect_checkpoint(folder)


def _size_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def _inspect_checkpoint(folder: Path) -> dict[str, Any]:
    recipe, state = store.read_recipe(folder), store.read_state(folder)
    parallel = recipe.parallel
    return {
        "kind": "portable checkpoint" if is_portable(folder) else "checkpoint",
        "path": str(folder),
        "method": recipe.method,
        **{field: getattr(state, field) for field in ("stage", "stage_step", "step", "samples", "finished")},
        "degrees": {
            "tensor": parallel.tensor,
            "sequence": parallel.sequence,
            "data": state.ranks // (parallel.tensor * parallel.sequence),
        },
        "zero_stage": parallel.zero_stage,
        "dtype": recipe.model.dtype,
        "lora_rank": recipe.model.lora.rank if recipe.model.lora else None,
        "scores": read_scores(folder.parent).get(folder.name, {}),
        "bytes": _size_bytes(folder),
        "damage": damage_of(folder, checksums=True),
        "damaged_beside_it": {
            other.name: wrong
            for other in store.all_checkpoints(folder.parent)
            if other != folder and (wrong := damage_of(other, checksums=False))
        },
        "recipe": recipe.model_dump(mode="json"),
    }


def _inspect_hf(folder: Path) -> dict[str, Any]:
    info = read_export_info(folder)
    has_checksums = (folder / MANIFEST).is_file()
    damage = damage_of(folder, checksums=True) if has_checksums else ""
    parameters: int | None = None
    try:
        tensors = read_folder_index(folder)
        parameters = sum(t.elements for t in tensors.values())
        dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    except CheckpointError as error:
        damage, dtypes = damage or str(error), []
    return {
        "kind": "RiM export" if info else "HF folder",
        "path": str(folder),
        **{key: info[key] for key in ("method", "stage", "stage_step", "step", "samples", "blocks") if key in info},
        "degrees": {"tensor": 1, "sequence": 1, "data": 1},
        "parameters": parameters,
        "dtype": ", ".join(dtypes),
        "bytes": _size_bytes(folder),
        "damage": damage,
        "checksums": has_checksums,
        "recipe": info.get("recipe"),
    }


def describe(fields: dict[str, Any]) -> str:
    """What `inspect_path` found as lines for a person, the recipe last."""
    import yaml

    lines = []
    for key, value in fields.items():
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
    unknown = fields.get("checksums") is False
    lines.append(f"integrity: {fields['damage'] or ('no checksums to compare with' if unknown else 'intact')}")
    if fields["recipe"]:
        lines += ["recipe:", *(f"  {line}" for line in yaml.safe_dump(fields["recipe"], sort_keys=False).splitlines())]
    return "\n".join(lines)
