"""The weights that a run starts from: those that its recipe names, or those of the checkpoint it goes on from."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from rim_dist.checkpoint.index import index_checkpoint, second_names
from rim_dist.checkpoint.portable import is_portable, starts_fresh
from rim_dist.checkpoint.safetensors_files import read_folder_index
from rim_dist.checkpoint.store import MODEL, find_checkpoint
from rim_dist.checkpoint.stored_tensors import ModelTensor, as_model_tensors, read_model_tensor
from rim_dist.config import Recipe
from rim_dist.errors import ModelError, RimError, first_line
from rim_dist.model.build import Weights, build_model
from rim_dist.model.requirements import Requirements, Start, gather_requirements
from rim_dist.model.skeleton import plain_name
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


def _source(tensors: Mapping[str, Any], read: Callable[[Any], torch.Tensor], plain: bool = True) -> WeightSource:
    """A source that reads these tensors. `plain`: they have the names of the plain model, not those of the trained module."""

    def source(name: str) -> torch.Tensor | None:
        known = plain_name(name) if plain else name
        return read(tensors[known]) if known is not None and known in tensors else None

    return source


def _read_fp32(tensor: ModelTensor) -> torch.Tensor:
    return read_model_tensor(tensor, torch.float32)


def folder_tensors(folder: Path, model: PreTrainedModel) -> dict[str, ModelTensor] | None:
    """The tensors of an HF folder's safetensors files by their names in `model`, if the files have all of them and no others.

    None for other files (.bin, GGUF), and for families that transformers converts while it loads them.
    """
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        return None
    left = read_folder_index(folder)
    second = second_names(model)
    found = {}
    for name in model.state_dict().keys() - second:
        # Files of a backbone alone have names without its prefix.
        known = next((n for n in (name, name.removeprefix(f"{model.base_model_prefix}.")) if n in left), None)
        if known is None:
            return None
        found[name] = left.pop(known)
    ignored = [*(model._keys_to_ignore_on_load_unexpected or []), r"inv_freq$", r"masked_bias$", r"attn\.bias$"]
    surplus = [name for name in left.keys() - second if not any(re.search(pattern, name) for pattern in ignored)]
    return None if surplus else as_model_tensors(found)


def weights_of(recipe: Recipe, requirements: Requirements, resume: Path | None = None) -> Weights:
    """Where the weights of a run come from.

    `resume`: the checkpoint that it goes on from. A portable one has the weights; the engine loads those of shards later.
    """
    if resume is not None and is_portable(resume):
        index, plain = index_checkpoint(resume), starts_fresh(resume)
        return Weights(_source(index.model if plain else as_model_tensors(index.module), _read_fp32, plain), "keep")
    source: WeightSource | None = None
    if requirements.checkpoint is not None:
        source = _source(index_checkpoint(requirements.checkpoint).model, _read_fp32)
    elif requirements.source is not None:
        source = _pretrained(recipe, requirements)
    return Weights(source, recipe.memory.initialise)


def _pretrained(recipe: Recipe, requirements: Requirements) -> WeightSource:
    """An HF folder's files read tensor by tensor; where that cannot be, the model loaded whole by transformers."""
    section = recipe.model
    try:
        folder = _local_folder(requirements.source, section.revision)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(requirements.config, trust_remote_code=section.trust_remote_code)
        if (stored := folder_tensors(folder, empty)) is not None:
            return _source(stored, _read_fp32)
        loaded = AutoModelForCausalLM.from_pretrained(
            requirements.source, revision=section.revision, trust_remote_code=section.trust_remote_code, dtype=torch.float32
        )
    except RimError:
        raise
    except Exception as error:
        raise ModelError(f"model.init_from: {section.init_from!r} cannot be loaded ({first_line(error)})") from error
    return _source(loaded.state_dict(), lambda tensor: tensor.detach().float())


def _local_folder(source: Path | str | None, revision: str | None) -> Path:
    """The folder with a model's files: the one given, or the hub's on this machine."""
    if source is not None and Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), revision=revision, allow_patterns=["*.safetensors", "*.json"]))
