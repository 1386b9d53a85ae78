"""Where every tensor of a checkpoint lies; no values are loaded.

The tensors found are compared with an empty copy of the checkpoint's own model (on the meta device, adapters included): one
that is missing, surplus, or of another shape or kind ends the command with its name.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from rim_dist.checkpoint.portable import is_portable, read_portable
from rim_dist.checkpoint.store import ENGINE, MODEL, TrainingState, read_recipe, read_state
from rim_dist.checkpoint.stored_tensors import LowRank, ModelTensor, StoredTensor, close_files, with_rows
from rim_dist.checkpoint.zero_shards import TensorIndex, index_shards
from rim_dist.config import Recipe
from rim_dist.errors import CheckpointError, first_line
from rim_dist.model.generation import generation_config
from rim_dist.model.skeleton import empty_module, parameter_groups, plain_name
from rim_dist.parallel.tensor import TensorRank, slice_of, split_model
from rim_dist.tokens import MemoryTokens, add_memory_tokens


@dataclass(frozen=True)
class CheckpointIndex:
    """A checkpoint's settings, and where its tensors lie."""

    recipe: Recipe
    state: TrainingState
    config: Any
    tokenizer: Any
    generation: GenerationConfig
    tokens: MemoryTokens
    tensors: TensorIndex  # all that was found, with the optimizer's state
    module: dict[str, StoredTensor]  # every tensor of the trained module by its name there, tied ones once
    model: dict[str, ModelTensor]  # every tensor of the plain model, adapters merged
    architecture: str  # the plain model's class, which servers look up
    embeddings: tuple[str, ...]  # the matrices with a row for each token: embedding and, unless it is tied, head


def _tensor_slices(recipe: Recipe, config: Any, tokens: MemoryTokens) -> dict[str, tuple[int, int]]:
    """For each parameter of the trained module that is split over tensor ranks: the dimension, and its length in the whole."""
    module = empty_module(recipe, config, tokens)
    split_model(module, TensorRank(0, recipe.parallel.tensor))
    found = {name: slice_of(p) for name, p in module.named_parameters(remove_duplicate=False)}
    return {name: (split.dim, split.full_size) for name, split in found.items() if split is not None}


def tied_names(module: torch.nn.Module) -> list[list[str]]:
    """Groups of names that are one parameter, each in the module's order."""
    groups: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def second_names(module: torch.nn.Module) -> set[str]:
    """Names of tied parameters besides the first of each."""
    return {name for names in tied_names(module) for name in names[1:]}


def match_tensors(
    where: Path, found: Mapping[str, StoredTensor], module: torch.nn.Module, preferred: Container[str] = ()
) -> dict[str, StoredTensor]:
    """Every tensor of `module` from those found, tied ones once (under the first name).

    `preferred`: names that come first among tied ones (those the optimizer keeps in fp32). Raises CheckpointError, naming
    the first tensor that is missing, unexpected, or of another shape or kind, and how many are.
    """
    expected = module.state_dict()
    aliases = {names[0]: names for names in tied_names(module)}
    second = second_names(module)
    result: dict[str, StoredTensor] = {}
    missing = []
    for name in (name for name in expected if name not in second):
        present = [alias for alias in aliases.get(name, [name]) if alias in found]
        if present:
            result[name] = found[min(present, key=lambda alias: alias not in preferred)]
        else:
            missing.append(name)
    for what, wrong in (("missing", missing), ("unexpected", sorted(found.keys() - expected.keys()))):
        if wrong:
            raise CheckpointError(f"{where}: {len(wrong)} tensors {what}, first {wrong[0]}")
    for name, stored in result.items():
        if stored.shape != tuple(expected[name].shape):
            raise CheckpointError(f"{where}: {name} has shape {stored.shape}, the model's is {tuple(expected[name].shape)}")
        if stored.dtype.is_floating_point != expected[name].dtype.is_floating_point:
            raise CheckpointError(f"{where}: {name} is {stored.dtype}, the model's is {expected[name].dtype}")
    return result


def index_checkpoint(checkpoint: Path) -> CheckpointIndex:
    """Index a checkpoint. Raises CheckpointError if a tensor is missing, surplus or misshapen."""
    close_files()
    recipe, state = read_recipe(checkpoint), read_state(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint / MODEL)
        config = AutoConfig.from_pretrained(checkpoint / MODEL, trust_remote_code=recipe.model.trust_remote_code)
        described = (checkpoint / MODEL / GENERATION_CONFIG_NAME).is_file()  # not by every earlier version
        generation = GenerationConfig.from_pretrained(checkpoint / MODEL) if described else generation_config(tokenizer)
    except Exception as error:
        raise CheckpointError(f"{checkpoint / MODEL}: cannot be loaded ({first_line(error)})") from error
    tokens = add_memory_tokens(tokenizer, recipe.memory)
    plain = empty_module(recipe, config, None)
    module = plain if recipe.model.lora is None else empty_module(recipe, config, tokens)
    if is_portable(checkpoint):
        tensors, names_of = read_portable(checkpoint)
        module = module if names_of == "module" else plain
    else:
        tensor = recipe.parallel.tensor
        tensors = index_shards(
            checkpoint / ENGINE,
            state.ranks // tensor,
            recipe.parallel.zero_stage,
            lambda: _optimizer_groups(module, recipe.optimizer.weight_decay),
            tensor,
            _tensor_slices(recipe, config, tokens) if tensor > 1 else {},
        )
    found = match_tensors(checkpoint, tensors.weights, module, tensors.steps)
    model = _plain_tensors(checkpoint, module, plain, found)
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    rows = {names[id(layer.weight)] for layer in (plain.get_input_embeddings(), plain.get_output_embeddings())}
    architecture = type(plain).__name__
    origin = (recipe, state, config, tokenizer, generation, tokens)
    return CheckpointIndex(*origin, tensors, found, model, architecture, tuple(sorted(rows)))


def _optimizer_groups(module: torch.nn.Module, weight_decay: float) -> list[list[str]]:
    """Names of the trained parameters in the order the optimizer has them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in parameter_groups(module, weight_decay)]


def _plain_tensors(where: Path, module: Any, plain: torch.nn.Module, found: dict[str, StoredTensor]) -> dict[str, ModelTensor]:
    """The plain model's tensors, adapters merged into them."""
    second = second_names(plain)
    layers = dict(module.named_modules())
    merged: dict[str, ModelTensor] = {}
    for name, stored in found.items():
        target = plain_name(name)
        if target is None or target in second:
            continue
        merged[target] = ModelTensor((stored,))
        prefix, base, kind = name.rpartition(".base_layer.")
        if not base or kind != "weight":
            continue
        layer = layers[prefix]
        if hasattr(layer, "lora_A"):
            a, b = (found[f"{prefix}.lora_{x}.default.weight"] for x in "AB")
            merged[target] = ModelTensor((stored,), LowRank(a, b, float(layer.scaling["default"]), bool(layer.fan_in_fan_out)))
        else:
            rows = found[f"{prefix}.trainable_tokens_delta.default"]
            merged[target] = with_rows(stored, rows, layer.token_indices["default"])
    if missing := plain.state_dict().keys() - second - merged.keys():
        raise CheckpointError(f"{where}: {len(missing)} tensors missing, first {min(missing)}")
    return merged
