"""LoRA adapters as peft writes them: taken from a checkpoint, merged into a folder, extracted from two folders."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rim_dist.checkpoint.index import CheckpointIndex
from rim_dist.checkpoint.pretrained import Pretrained, open_pretrained
from rim_dist.checkpoint.safetensors_files import read_folder_index
from rim_dist.checkpoint.stored_tensors import LowRank, ModelTensor, StoredTensor, as_model_tensors, read_tensor, with_rows
from rim_dist.errors import CheckpointError, first_line
from rim_dist.messages import say
from rim_dist.model.skeleton import empty_model

_PREFIX = "base_model.model."
_ROWS = "token_adapter.trainable_tokens_delta"
# Settings of LoRA that leave a merge what it is, weight + scaling x B A: which layers, and by which rank and scale.
_STREAMED = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "trainable_token_indices", "fan_in_fan_out", "init_lora_weights", "eva_config"),
    *("task_type", "peft_type", "peft_version", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping"),
    *("megatron_config", "megatron_core", "loftq_config", "runtime_config"),
}
_HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")


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


def _is_conv1d(layer: torch.nn.Module | None) -> bool:
    return type(layer).__name__ == "Conv1D"  # GPT-2 keeps its matrices as [in, out]


@dataclass(frozen=True)
class Merged:
    """A base with an adapter merged into it: its tensors, or the function with which peft makes the whole model in memory."""

    config: Any
    tensors: dict[str, ModelTensor]
    load: Callable[[], PreTrainedModel] | None = None


def merge(base: Path, adapter: Path) -> Merged:
    """Merge a PEFT adapter into an HF folder: LoRA on linear layers and rows of the embedding tensor by tensor, others by peft.

    Rows that the adapter trains beyond the base's vocabulary are added. Raises CheckpointError or ModelError for an adapter or
    a base that is not whole, and for an adapter that does not fit or has nothing to merge.
    """
    import peft

    try:
        settings = peft.PeftConfig.from_pretrained(str(adapter))
    except Exception as error:
        raise CheckpointError(f"{adapter}: not a PEFT adapter ({first_line(error)})") from error
    if settings.is_prompt_learning:
        raise CheckpointError(f"{adapter}: {settings.peft_type.value} puts tokens before a prompt; there is nothing to merge")
    if getattr(settings, "layer_replication", None):
        raise CheckpointError(f"{adapter}: layer_replication: layers that share their matrices are not written")
    found = open_pretrained(base)
    files = read_folder_index(adapter, "adapter_model")
    vocabulary = _vocabulary(found.config, settings, files)
    if odd := _beyond_streaming(settings, found, files):
        say(f"{adapter}: merged by peft, the whole model in memory ({odd})")
        return Merged(found.config, {}, lambda: _merged_by_peft(found, adapter, vocabulary))
    config = copy.deepcopy(found.config)
    config.get_text_config().vocab_size = vocabulary
    plain = {name: t for name, t in (found.tensors or {}).items() if isinstance(t, StoredTensor)}
    return Merged(config, _merged_tensors(config, plain, adapter, settings, files))


def _vocabulary(config: Any, settings: Any, files: Mapping[str, StoredTensor]) -> int:
    """Rows of the embedding with those that the adapter adds."""
    rows = getattr(settings, "trainable_token_indices", None) or {}
    last = [max(ids) + 1 for ids in (rows.values() if isinstance(rows, dict) else [rows]) if ids]
    saved = [
        t.shape[0] for name, t in files.items() if re.search(r"(embed_tokens|wte|embed_in|lm_head|embed_out)\.weight$", name)
    ]
    return max(config.get_text_config().vocab_size, *last, *saved, 0)


def _beyond_streaming(settings: Any, base: Pretrained, files: Mapping[str, StoredTensor]) -> str:
    """What an adapter (or its base) has that is not LoRA on matrices or trained rows; empty if that is all."""
    import peft

    if base.tensors is None or not all(isinstance(t, StoredTensor) for t in base.tensors.values()):
        return f"{base.config.model_type} is laid out in another way on disk, or not in safetensors"
    if type(settings) is not peft.LoraConfig:
        return str(settings.peft_type.value)
    usual = peft.LoraConfig().to_dict()
    given = settings.to_dict()
    odd = [k for k, v in given.items() if k not in _STREAMED and v != usual.get(k) and (v or usual.get(k))]
    # A tied head, an embedding, or what is no layer.
    if others := {_module_of(n) for n in files if ".lora_" in n and f"{_module_of(n)}.weight" not in base.tensors}:
        odd.append(f"on {min(others)}")
    odd += sorted({f"on {_module_of(name)}" for name in files if ".lora_embedding_" in name})
    # All other ways to start change the base, and peft does so again when it loads the adapter.
    if (start := given["init_lora_weights"]) not in _HARMLESS_STARTS:
        odd.append(f"init_lora_weights: {start}")
    return ", ".join(odd)


def _merged_tensors(
    config: Any, base: dict[str, StoredTensor], adapter: Path, settings: Any, files: Mapping[str, StoredTensor]
) -> dict[str, ModelTensor]:
    """The base's tensors with an adapter on them, as peft's own layers say what belongs where, and by which scale."""
    import peft

    settings = copy.deepcopy(settings)
    settings.init_lora_weights = False  # on the meta device nothing can be computed
    try:
        with torch.device("meta"):
            module: Any = peft.get_peft_model(empty_model(config), settings)
    except ValueError as error:
        raise CheckpointError(f"{adapter}: does not fit the base ({first_line(error)})") from error
    expected = peft.get_peft_model_state_dict(module, save_embedding_layers=False)
    for what, names in (("missing", expected.keys() - files.keys()), ("unexpected", files.keys() - expected.keys())):
        if names:
            raise CheckpointError(f"{adapter}: {len(names)} tensors {what}, first {min(names)}")
    tensors = as_model_tensors(base)
    for path, layer in module.named_modules():
        name = f"{path.removeprefix(_PREFIX)}.weight"
        if "default" in getattr(layer, "lora_A", {}):
            a, b = (files[f"{path}.lora_{x}.weight"] for x in "AB")
            transposed = bool(layer.fan_in_fan_out)
            shape = (a.shape[1], b.shape[0]) if transposed else (b.shape[0], a.shape[1])
            if name not in base or base[name].shape != shape or a.shape[0] != b.shape[1]:
                raise CheckpointError(f"{adapter}: {path}.lora_A.weight does not fit the base's {name}")
            tensors[name] = ModelTensor((base[name],), LowRank(a, b, float(layer.scaling["default"]), transposed))
        elif path.endswith(".token_adapter") and f"{path}.trainable_tokens_delta" in files:  # a tied head has none of its own
            name = f"{path.removeprefix(_PREFIX).removesuffix('.token_adapter')}.weight"
            ids, matrix = layer.token_indices["default"], base[name]
            if missing := sorted(set(range(matrix.shape[0], max(ids) + 1)) - set(ids)):
                raise CheckpointError(f"row {missing[0]} is neither in the base ({matrix.shape[0]} rows) nor in the adapter")
            tensors[name] = with_rows(matrix, files[f"{path}.trainable_tokens_delta"], ids)
    return tensors


def _merged_by_peft(base: Pretrained, adapter: Path, vocabulary: int) -> PreTrainedModel:
    import peft

    model: Any = base.load(torch.float32)
    try:
        if vocabulary > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(vocabulary, mean_resizing=False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = peft.PeftModel.from_pretrained(model, str(adapter))
            report = adapted.load_adapter(str(adapter), "default")  # again, for what `from_pretrained` only warns of
            merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise CheckpointError(f"{adapter}: peft does not merge it ({first_line(error)})") from error
    for what, names in (("missing", report.missing_keys), ("unexpected", report.unexpected_keys)):
        if names:
            raise CheckpointError(f"{adapter}: {len(names)} tensors {what}, first {min(names)}")
    tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    merged.config.tie_word_embeddings = tied
    return merged.to(base.config.dtype or torch.float32)


def _tensors_of(found: Pretrained) -> dict[str, StoredTensor]:
    if found.tensors is None or not all(isinstance(t, StoredTensor) for t in found.tensors.values()):
        raise CheckpointError(
            f"{found.source}: not in safetensors, or {found.config.model_type} is laid out in another way there"
        )
    return {name: t for name, t in found.tensors.items() if isinstance(t, StoredTensor)}


def extract_lora(base: Path, tuned: Path, out: Path, rank: int) -> dict[str, float]:
    """Write the difference of two folders as a PEFT adapter of the given rank into `out`.

    Returns the relative error (Frobenius) of each matrix that changed. Rows of the embedding that differ or were added become
    trained rows. Raises CheckpointError if something else differs than matrices of linear layers and such rows.
    """
    from safetensors.torch import save_file

    before, after = (_tensors_of(open_pretrained(folder)) for folder in (base, tuned))
    model = empty_model(open_pretrained(tuned).config)
    layers = dict(model.named_modules())
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
