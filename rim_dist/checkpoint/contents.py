"""What is in a checkpoint, accounted for: every tensor of the trained module by name, shape and kind, nothing loaded.

A checkpoint is indexed and compared with an empty copy of its own model (on the meta device, adapters included). A tensor
that is missing, surplus or of another shape ends the command with its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from rim_dist.checkpoint.portable import read_portable
from rim_dist.checkpoint.shards import ShardIndex, index_shards
from rim_dist.checkpoint.store import ENGINE, MODEL, PORTABLE, TrainingState, read_recipe, read_state
from rim_dist.checkpoint.tensors import LowRank, ModelTensor, StoredTensor, forget_files, rows_of
from rim_dist.config import Recipe
from rim_dist.errors import CheckpointError
from rim_dist.model.skeleton import empty_module, parameter_groups, plain_name
from rim_dist.parallel.tensor import TensorRank, slice_of, split_model
from rim_dist.tokens import MemoryTokens, add_memory_tokens


@dataclass(frozen=True)
class Contents:
    """A checkpoint's tensors. `module`: by their names in the trained module, tied ones once; `model`: the plain model's."""

    recipe: Recipe
    state: TrainingState
    config: Any
    tokenizer: Any
    tokens: MemoryTokens
    index: ShardIndex
    module: dict[str, StoredTensor]
    model: dict[str, ModelTensor]  # adapters merged
    architecture: str  # the plain model's class, which servers look up
    embeddings: tuple[str, ...]  # the matrices that have a row a token: embedding and, if it is one of its own, head


def tensor_slices(recipe: Recipe, config: Any, tokens: MemoryTokens) -> dict[str, tuple[int, int]]:
    """For each parameter of the trained module that tensor ranks share: the dimension, and the whole's entries of it."""
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


def account(
    where: Path, found: Mapping[str, StoredTensor], module: torch.nn.Module, known: Iterable[str]
) -> dict[str, StoredTensor]:
    """Every tensor of `module`, tied ones once (under the first name), from what was found.

    `known`: names to prefer among tied ones (those the optimizer keeps in fp32). Raises CheckpointError, naming the first
    tensor that is missing, unexpected, or of another shape or kind, and how many there are.
    """
    expected = dict(module.state_dict())
    preferred = set(known)
    aliases = {name: names for names in tied_names(module) for name in names}
    result: dict[str, StoredTensor] = {}
    missing = []
    for name in expected:
        names = aliases.get(name, [name])
        if name != names[0]:
            continue
        present = sorted((n for n in names if n in found), key=lambda n: (n not in preferred, names.index(n)))
        if present:
            result[name] = found[present[0]]
        else:
            missing.append(name)
    surplus = sorted(set(found) - set(expected))
    for what, wrong in (("missing", missing), ("unexpected", surplus)):
        if wrong:
            raise CheckpointError(f"{where}: {len(wrong)} tensors {what}, first {wrong[0]}")
    for name, stored in result.items():
        if stored.shape != tuple(expected[name].shape):
            raise CheckpointError(f"{where}: {name} has shape {stored.shape}, the model's is {tuple(expected[name].shape)}")
        if stored.dtype.is_floating_point != expected[name].dtype.is_floating_point:
            raise CheckpointError(f"{where}: {name} is {stored.dtype}, the model's is {expected[name].dtype}")
    return result


def optimizer_groups(module: torch.nn.Module, weight_decay: float) -> list[list[str]]:
    """Names of the trained parameters in the order the optimizer has them."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return [[names[id(p)] for p in group["params"]] for group in parameter_groups(module, weight_decay)]


def read_contents(checkpoint: Path) -> Contents:
    """Index a checkpoint. Raises CheckpointError if a tensor is missing, surplus or misshapen."""
    forget_files()
    recipe, state = read_recipe(checkpoint), read_state(checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint / MODEL)
        config = AutoConfig.from_pretrained(checkpoint / MODEL, trust_remote_code=recipe.model.trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"{checkpoint / MODEL}: cannot be loaded ({str(error).splitlines()[0]})") from error
    tokens = add_memory_tokens(tokenizer, recipe.memory)
    if (checkpoint / PORTABLE).is_dir():
        portable = read_portable(checkpoint / PORTABLE)
        index, adapted = portable.index, portable.names == "module"
        module = empty_module(recipe, config, tokens if adapted else None)
    else:
        module = empty_module(recipe, config, tokens)
        tensor = recipe.parallel.tensor
        index = index_shards(
            checkpoint / ENGINE,
            state.ranks // tensor,
            recipe.parallel.zero_stage,
            lambda: optimizer_groups(module, recipe.optimizer.weight_decay),
            tensor,
            tensor_slices(recipe, config, tokens) if tensor > 1 else {},
        )
    found = account(checkpoint, index.weights, module, index.steps)
    plain = empty_module(recipe, config, None) if hasattr(module, "get_base_model") else module
    model = _plain_tensors(checkpoint, module, plain, found)
    names = {id(parameter): name for name, parameter in plain.named_parameters()}
    rows = {names[id(part.weight)] for part in (plain.get_input_embeddings(), plain.get_output_embeddings())}
    architecture = type(plain).__name__
    return Contents(recipe, state, config, tokenizer, tokens, index, found, model, architecture, tuple(sorted(rows)))


def _plain_tensors(where: Path, module: Any, plain: torch.nn.Module, found: dict[str, StoredTensor]) -> dict[str, ModelTensor]:
    """The plain model's tensors, adapters merged into them."""
    expected = plain.state_dict()
    second = {name for names in tied_names(plain) for name in names[1:]}
    merged: dict[str, ModelTensor] = {}
    layers = dict(module.named_modules())
    for name, stored in found.items():
        target = plain_name(name)
        if target is None or target in second:
            continue
        merged[target] = ModelTensor((stored,), stored.shape)
        layer = layers[name.rpartition(".base_layer.")[0]] if ".base_layer." in name else None
        if layer is None or not name.endswith(".weight"):
            continue
        prefix = name.rpartition(".base_layer.")[0]
        if hasattr(layer, "lora_A"):
            a, b = (found[f"{prefix}.lora_{x}.default.weight"] for x in "AB")
            low_rank = LowRank(a, b, float(layer.scaling["default"]), bool(layer.fan_in_fan_out))
            merged[target] = ModelTensor((stored,), stored.shape, low_rank)
        else:
            rows = found[f"{prefix}.trainable_tokens_delta.default"]
            merged[target] = ModelTensor(with_rows(stored, rows, layer.token_indices["default"]), stored.shape)
    if missing := sorted(set(expected) - second - set(merged)):
        raise CheckpointError(f"{where}: {len(missing)} tensors missing, first {missing[0]}")
    return merged


def with_rows(stored: StoredTensor, rows: StoredTensor, ids: list[int]) -> tuple[StoredTensor, ...]:
    """A matrix in which some rows come from elsewhere, as the parts it is made of."""
    parts: list[StoredTensor] = []
    position = 0
    for number, row in sorted((number, row) for row, number in enumerate(ids)):
        if number > position:
            parts.append(rows_of(stored, position, number))
        parts.append(rows_of(rows, row, row + 1))
        position = number + 1
    if position < stored.shape[0]:
        parts.append(rows_of(stored, position, stored.shape[0]))
    return tuple(parts)
