"""LoRA adapters as peft writes them: out of a checkpoint, merged into a folder, extracted from two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rim_dist.checkpoint.contents import Contents, with_rows
from rim_dist.checkpoint.tensors import LowRank, ModelTensor, StoredTensor, read_folder_index, read_tensor
from rim_dist.errors import CheckpointError

_PREFIX = "base_model.model."
_ROWS = "token_adapter.trainable_tokens_delta"
# What peft can do to a layer besides plain LoRA; an adapter with one of these set is not merged here.
_OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layer_replication")


def adapter_tensors(contents: Contents, with_rows: bool) -> dict[str, ModelTensor]:
    """The adapter's tensors under peft's names; `with_rows`: the memory rows too."""
    tensors = {}
    for name, stored in contents.module.items():
        if ".lora_" in name or (with_rows and ".trainable_tokens_" in name):
            tensors[name.replace(".default.", ".").removesuffix(".default")] = ModelTensor((stored,), stored.shape)
    return tensors


def adapter_config(contents: Contents, with_rows: bool) -> dict[str, Any]:
    """adapter_config.json for `adapter_tensors`."""
    lora = contents.recipe.model.lora
    assert lora is not None
    names = [name for name in contents.module if name.endswith(".lora_A.default.weight")]
    rows = {name.split(f".{_ROWS}")[0].rpartition(".")[2] for name in contents.module if f".{_ROWS}" in name}
    return _config(
        rank=lora.rank,
        alpha=lora.alpha,
        modules=[name.removesuffix(".lora_A.default.weight").removeprefix(_PREFIX) for name in names],
        rows={name: list(contents.tokens.ids) for name in sorted(rows)} if with_rows else None,
        base=contents.recipe.model.init_from if with_rows else "..",
        transposed=any(t.low_rank is not None and t.low_rank.transposed for t in contents.model.values()),
    )


def _config(
    rank: int, alpha: float, modules: list[str], rows: dict[str, list[int]] | None, base: str | None, transposed: bool
) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": transposed,
        "inference_mode": True,
        "target_modules": sorted(modules),
        "trainable_token_indices": rows,
    }


def _empty(folder: Path) -> tuple[Any, torch.nn.Module]:
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{folder}: not an HF model folder ({str(error).splitlines()[0]})") from error
    with torch.device("meta"):
        return config, AutoModelForCausalLM.from_config(config)


def _transposed(module: torch.nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"  # GPT-2 keeps its matrices the other way round


def merged_tensors(base: Path, adapter: Path) -> tuple[Any, dict[str, ModelTensor]]:
    """The configuration and the tensors of a base folder with a PEFT adapter merged into it.

    Rows that the adapter trains beyond the base's vocabulary are added. Raises CheckpointError for an adapter that does not
    fit, or whose kind is more than plain LoRA.
    """
    try:
        settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{adapter}: not a PEFT adapter ({error})") from None
    if settings.get("peft_type") != "LORA" or (odd := [k for k in _OTHER_KINDS if settings.get(k)]):
        raise CheckpointError(f"{adapter}: only plain LoRA is merged, not {settings.get('peft_type')} with {odd}")
    config, module = _empty(base)
    layers = dict(module.named_modules())
    tensors = {name: ModelTensor((stored,), stored.shape) for name, stored in read_folder_index(base).items()}
    found = dict(read_folder_index(adapter, "adapter_model"))
    scaling = settings["lora_alpha"] / settings["r"]
    for name in [n for n in found if n.endswith(".lora_A.weight")]:
        layer = name.removesuffix(".lora_A.weight").removeprefix(_PREFIX)
        a, b = found.pop(name), found.pop(name.replace(".lora_A.", ".lora_B."))
        target = tensors.get(f"{layer}.weight")
        transposed = layer in layers and _transposed(layers[layer])
        shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        if target is None or target.shape != shape:
            raise CheckpointError(f"{adapter}: {name} does not fit the base's {layer}.weight")
        tensors[f"{layer}.weight"] = ModelTensor(target.parts, shape, LowRank(a, b, scaling, transposed))
    for name in [n for n in found if n.endswith(_ROWS)]:
        layer = name.removesuffix(f".{_ROWS}").removeprefix(_PREFIX)
        ids = settings["trainable_token_indices"][layer.rpartition(".")[2]]
        target = tensors[f"{layer}.weight"]
        merged = _replace_rows(target.parts[0], found.pop(name), ids)
        tensors[f"{layer}.weight"] = merged
        config.get_text_config().vocab_size = merged.shape[0]
    if found:
        raise CheckpointError(f"{adapter}: {len(found)} tensors unexpected, first {min(found)}")
    return config, tensors


def _replace_rows(matrix: StoredTensor, rows: StoredTensor, ids: list[int]) -> ModelTensor:
    """A matrix with rows replaced, and added at its end."""
    count = max(matrix.shape[0], max(ids) + 1)
    if missing := sorted(set(range(matrix.shape[0], count)) - set(ids)):
        raise CheckpointError(f"row {missing[0]} is neither in the base ({matrix.shape[0]} rows) nor in the adapter")
    return ModelTensor(with_rows(matrix, rows, ids), (count, *matrix.shape[1:]))


def extract_lora(base: Path, tuned: Path, out: Path, rank: int) -> dict[str, float]:
    """Write the difference of two folders as a PEFT adapter of the given rank into `out`.

    Returns the relative error (Frobenius) of each matrix that changed. Rows of the embedding that differ or were added become
    trained rows. Raises CheckpointError if something else differs than matrices of linear layers and such rows.
    """
    from safetensors.torch import save_file

    _, module = _empty(tuned)
    model: Any = module
    before, after = read_folder_index(base), read_folder_index(tuned)
    if set(before) != set(after):
        raise CheckpointError(f"{tuned}: other tensors than {base}, first {min(set(before) ^ set(after))}")
    layers = dict(module.named_modules())
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    rows: dict[str, list[int]] = {}
    adapter: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    transposed = False
    for name in after:
        layer = name.removesuffix(".weight")
        new, old = read_tensor(after[name]).float(), read_tensor(before[name]).float()
        if layer in layers and id(getattr(layers[layer], "weight", None)) in embeddings:
            known = old.shape[0]
            changed = [i for i in range(new.shape[0]) if i >= known or not torch.equal(new[i], old[i])]
            if changed:
                rows[layer.rpartition(".")[2]] = changed
                adapter[f"{_PREFIX}{layer}.{_ROWS}"] = new[changed].contiguous()
            continue
        if new.shape != old.shape:
            raise CheckpointError(f"{tuned}: {name} has another shape than in {base}")
        if torch.equal(new, old):
            continue
        linear = layer in layers and (isinstance(layers[layer], torch.nn.Linear) or _transposed(layers[layer]))
        if not linear or not name.endswith(".weight"):
            raise CheckpointError(f"{tuned}: {name} differs from {base}, and an adapter cannot hold it")
        update = new - old
        if _transposed(layers[layer]):
            transposed, update = True, update.T
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        keep = min(rank, len(s))
        root = torch.zeros(rank)
        root[:keep] = s[:keep].sqrt()
        b = torch.zeros(update.shape[0], rank)
        a = torch.zeros(rank, update.shape[1])
        b[:, :keep], a[:keep] = u[:, :keep], v[:keep]
        adapter[f"{_PREFIX}{layer}.lora_A.weight"] = (a * root[:, None]).contiguous()
        adapter[f"{_PREFIX}{layer}.lora_B.weight"] = (b * root).contiguous()
        errors[name] = float(s[keep:].norm() / s.norm())
    modules = [n.removesuffix(".lora_A.weight").removeprefix(_PREFIX) for n in adapter if n.endswith(".lora_A.weight")]
    settings = _config(rank, float(rank), modules, rows or None, str(base), transposed)
    save_file(adapter, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return errors
