"""LoRA adapters as peft writes them: taken from a checkpoint, merged into a folder, extracted from two folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rim_dist.checkpoint.index import CheckpointIndex
from rim_dist.checkpoint.safetensors_files import read_folder_index
from rim_dist.checkpoint.stored_tensors import LowRank, ModelTensor, as_model_tensors, read_tensor, with_rows
from rim_dist.errors import CheckpointError, first_line

_PREFIX = "base_model.model."
_ROWS = "token_adapter.trainable_tokens_delta"
# What peft can do to a layer besides plain LoRA; an adapter with one of these set is not merged here.
_OTHER_KINDS = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias", "layer_replication")


def adapter_tensors(index: CheckpointIndex, rows: bool) -> dict[str, ModelTensor]:
    """The adapter's tensors under peft's names; `rows`: the memory rows too."""
    return {
        name.replace(".default.", ".").removesuffix(".default"): ModelTensor((stored,))
        for name, stored in index.module.items()
        if ".lora_" in name or (rows and ".trainable_tokens_" in name)
    }


def adapter_config(index: CheckpointIndex, rows: bool) -> dict[str, Any]:
    """adapter_config.json for `adapter_tensors`. An adapter with the memory rows goes on the base that the run started from."""
    lora = index.recipe.model.lora
    assert lora is not None
    matrices = {_module_of(name).rpartition(".")[2] for name in index.module if f".{_ROWS}" in name}
    return _config(
        rank=lora.rank,
        alpha=lora.alpha,
        modules=[_module_of(name) for name in index.module if ".lora_A." in name],
        rows={name: list(index.tokens.ids) for name in sorted(matrices)} if rows else None,
        base=index.recipe.model.init_from if rows else "..",
        transposed=any(t.low_rank is not None and t.low_rank.transposed for t in index.model.values()),
    )


def _module_of(name: str) -> str:
    """The layer of an adapter's tensor."""
    return name.removeprefix(_PREFIX).partition(".lora_")[0].partition(f".{_ROWS}")[0]


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


def _empty_model(folder: Path) -> tuple[Any, Any, dict[str, torch.nn.Module]]:
    """The configuration of an HF folder, its model on the meta device, and the model's layers by name."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{folder}: not an HF model folder ({first_line(error)})") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config, model, dict(model.named_modules())


def _is_conv1d(layer: torch.nn.Module | None) -> bool:
    return type(layer).__name__ == "Conv1D"  # GPT-2 keeps its matrices as [in, out]


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
    config, _, layers = _empty_model(base)
    tensors = as_model_tensors(read_folder_index(base))
    found = read_folder_index(adapter, "adapter_model")
    scaling = settings["lora_alpha"] / settings["r"]
    for name in [n for n in found if n.endswith(".lora_A.weight")]:
        weight = f"{_module_of(name)}.weight"
        a, b = found.pop(name), found.pop(name.replace(".lora_A.", ".lora_B."))
        transposed = _is_conv1d(layers.get(_module_of(name)))
        shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
        if weight not in tensors or tensors[weight].shape != shape:
            raise CheckpointError(f"{adapter}: {name} does not fit the base's {weight}")
        tensors[weight] = ModelTensor(tensors[weight].stacked, LowRank(a, b, scaling, transposed))
    for name in [n for n in found if n.endswith(_ROWS)]:
        weight = f"{_module_of(name)}.weight"
        ids = settings["trainable_token_indices"][_module_of(name).rpartition(".")[2]]
        matrix = tensors[weight].stacked[0]
        if missing := sorted(set(range(matrix.shape[0], max(ids) + 1)) - set(ids)):
            raise CheckpointError(f"row {missing[0]} is neither in the base ({matrix.shape[0]} rows) nor in the adapter")
        tensors[weight] = with_rows(matrix, found.pop(name), ids)
        config.get_text_config().vocab_size = tensors[weight].shape[0]
    if found:
        raise CheckpointError(f"{adapter}: {len(found)} tensors unexpected, first {min(found)}")
    return config, tensors


def extract_lora(base: Path, tuned: Path, out: Path, rank: int) -> dict[str, float]:
    """Write the difference of two folders as a PEFT adapter of the given rank into `out`.

    Returns the relative error (Frobenius) of each matrix that changed. Rows of the embedding that differ or were added become
    trained rows. Raises CheckpointError if something else differs than matrices of linear layers and such rows.
    """
    from safetensors.torch import save_file

    _, model, layers = _empty_model(tuned)
    before, after = read_folder_index(base), read_folder_index(tuned)
    if set(before) != set(after):
        raise CheckpointError(f"{tuned}: other tensors than {base}, first {min(set(before) ^ set(after))}")
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    rows: dict[str, list[int]] = {}
    adapter: dict[str, torch.Tensor] = {}
    errors: dict[str, float] = {}
    transposed = False
    for name in after:
        layer_name = name.removesuffix(".weight")
        layer = layers.get(layer_name)
        new, old = read_tensor(after[name]).float(), read_tensor(before[name]).float()
        if layer in embeddings and layer is not None:
            changed = [i for i in range(new.shape[0]) if i >= old.shape[0] or not torch.equal(new[i], old[i])]
            if changed:
                rows[layer_name.rpartition(".")[2]] = changed
                adapter[f"{_PREFIX}{layer_name}.{_ROWS}"] = new[changed].contiguous()
            continue
        if new.shape != old.shape:
            raise CheckpointError(f"{tuned}: {name} has another shape than in {base}")
        if torch.equal(new, old):
            continue
        if not name.endswith(".weight") or not (isinstance(layer, torch.nn.Linear) or _is_conv1d(layer)):
            raise CheckpointError(f"{tuned}: {name} differs from {base}, and an adapter cannot hold it")
        update = new - old
        if _is_conv1d(layer):
            transposed, update = True, update.T
        u, s, v = torch.linalg.svd(update, full_matrices=False)
        root = s[:rank].sqrt()
        a, b = torch.zeros(rank, update.shape[1]), torch.zeros(update.shape[0], rank)
        a[: len(root)], b[:, : len(root)] = root[:, None] * v[:rank], u[:, :rank] * root
        adapter[f"{_PREFIX}{layer_name}.lora_A.weight"] = a
        adapter[f"{_PREFIX}{layer_name}.lora_B.weight"] = b
        errors[name] = float(s[rank:].norm() / s.norm())
    modules = [_module_of(name) for name in adapter if ".lora_A." in name]
    settings = _config(rank, float(rank), modules, rows or None, str(base), transposed)
    save_file(adapter, out / "adapter_model.safetensors", {"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    return errors
