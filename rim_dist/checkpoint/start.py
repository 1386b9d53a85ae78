"""What a run starts from: the weights that its recipe names, or those of the checkpoint it goes on from."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rim_dist.checkpoint.assemble import tensor_values
from rim_dist.checkpoint.contents import read_contents
from rim_dist.checkpoint.portable import is_portable, starts_fresh
from rim_dist.checkpoint.store import MODEL, find_checkpoint
from rim_dist.checkpoint.tensors import ModelTensor, read_folder_index
from rim_dist.config import Recipe
from rim_dist.errors import ModelError, RimError, first_line
from rim_dist.model.build import Weights, build_model
from rim_dist.model.requirements import Requirements, Start, gather_requirements
from rim_dist.model.weights import WeightSource
from rim_dist.parallel.mesh import Mesh


def find_start(recipe: Recipe) -> Start:
    """Where a recipe's weights are. Raises ModelError for a folder that does not exist, CheckpointError for a broken one."""
    name = recipe.model.init_from
    if name is None:
        return Start()
    folder = Path(name)
    if (folder / "hf" / "config.json").is_file():
        return Start(folder / "hf")  # a finished run
    if folder.is_dir() and not (folder / "config.json").is_file():
        checkpoint = find_checkpoint(folder)
        return Start(checkpoint / MODEL, checkpoint)
    if not folder.exists() and _is_a_path(name, recipe):
        raise ModelError(f"model.init_from: {name}: no such folder (a hub id has the form owner/name)")
    return Start(name)


def _is_a_path(name: str, recipe: Recipe) -> bool:
    """Whether a name that does not exist here was meant as a folder: looking for it on the hub would take a minute."""
    parent = Path(name).parent
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or parent.exists() or parent == Path(recipe.run.output_dir)


def requirements_of(recipe: Recipe) -> Requirements:
    """`gather_requirements` from where the recipe starts."""
    return gather_requirements(recipe, find_start(recipe))


def model_of(
    recipe: Recipe,
    requirements: Requirements,
    resume: Path | None = None,
    mesh: Mesh | None = None,
    partition: Callable[[list[nn.Parameter]], None] | None = None,
) -> PreTrainedModel:
    """`build_model` with the weights that a run starts from, or goes on from (`resume`)."""
    return build_model(recipe, requirements, weights_of(recipe, requirements, resume), mesh, partition)


@dataclass(frozen=True)
class StoredWeights:
    """Tensors that lie in files."""

    tensors: Mapping[str, ModelTensor]

    def __call__(self, name: str) -> torch.Tensor | None:
        if name not in self.tensors:
            return None
        tensor = self.tensors[name]
        values = torch.empty(math.prod(tensor.shape), dtype=torch.float32)
        start = 0
        for chunk in tensor_values(tensor, torch.float32):
            values[start : start + chunk.numel()] = chunk
            start += chunk.numel()
        return values.reshape(tensor.shape)


@dataclass(frozen=True)
class LoadedWeights:
    """Tensors that are in memory."""

    tensors: Mapping[str, torch.Tensor]

    def __call__(self, name: str) -> torch.Tensor | None:
        return self.tensors[name].detach().float() if name in self.tensors else None


def folder_weights(folder: Path, model: PreTrainedModel) -> StoredWeights | None:
    """The safetensors files of an HF folder, if they hold the tensors of this class by the names it gives them.

    None for other files (.bin, GGUF), and for families that transformers converts while it loads them.
    """
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return None
    stored = read_folder_index(folder)
    prefix = f"{model.base_model_prefix}."
    expected = {name: tensor for name, tensor in model.state_dict().items() if name not in _second_names(model)}
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), r"inv_freq$", r"masked_bias$", r"attn\.bias$"]
    found: dict[str, ModelTensor] = {}
    used: set[str] = set()
    for name in expected:
        place = next((n for n in (name, name.removeprefix(prefix)) if n in stored), None)
        if place is None:
            return None
        found[name] = ModelTensor((stored[place],), stored[place].shape)
        used.add(place)
    second = _second_names(model)
    left = [n for n in stored if n not in used and n not in second and not any(re.search(p, n) for p in ignored)]
    return None if left else StoredWeights(found)


def _second_names(model: nn.Module) -> set[str]:
    """Names of tied parameters beside their first."""
    first = {id(p) for p in model.parameters()}
    named = [name for name, _ in model.named_parameters()]
    return {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in first} - set(named)


def weights_of(recipe: Recipe, requirements: Requirements, resume: Path | None = None) -> Weights:
    """Where the weights of a run come from.

    `resume`: the checkpoint that it goes on from; one of whole tensors has them, one of shards gives them to the engine later.
    """
    initialise = recipe.memory.initialise
    if resume is not None and is_portable(resume):
        contents = read_contents(resume)
        if starts_fresh(resume):
            return Weights(StoredWeights(contents.model), "model", "keep")
        whole = {name: ModelTensor((stored,), stored.shape) for name, stored in contents.module.items()}
        return Weights(StoredWeights(whole), "module", "keep")
    if requirements.checkpoint is not None:
        return Weights(StoredWeights(read_contents(requirements.checkpoint).model), "model", initialise)
    if requirements.source is None:
        return Weights(None, "model", initialise)
    return Weights(_pretrained(recipe, requirements), "model", initialise)


def _pretrained(recipe: Recipe, requirements: Requirements) -> WeightSource:
    """An HF folder's files read tensor by tensor; where that cannot be, the model loaded whole by transformers."""
    section = recipe.model
    try:
        folder = _local_folder(requirements.source, section.revision)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(requirements.config, trust_remote_code=section.trust_remote_code)
        if (stored := folder_weights(folder, empty)) is not None:
            return stored
        loaded = AutoModelForCausalLM.from_pretrained(
            requirements.source, revision=section.revision, trust_remote_code=section.trust_remote_code, dtype=torch.float32
        )
    except RimError:
        raise
    except Exception as error:
        raise ModelError(f"model.init_from: {section.init_from!r} cannot be loaded ({first_line(error)})") from error
    return LoadedWeights(loaded.state_dict())


def _local_folder(source: Path | str | None, revision: str | None) -> Path:
    """The folder with a model's files: the one given, or the hub's on this machine."""
    if source is not None and Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), revision=revision, allow_patterns=["*.safetensors", "*.json"]))
