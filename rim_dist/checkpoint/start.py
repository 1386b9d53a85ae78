"""The weights that a run starts from: those that its recipe names, or those of the checkpoint it goes on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from rim_dist.checkpoint.index import index_checkpoint
from rim_dist.checkpoint.portable import is_portable, starts_fresh
from rim_dist.checkpoint.pretrained import open_pretrained, refuse_adapter
from rim_dist.checkpoint.store import MODEL, find_checkpoint
from rim_dist.checkpoint.stored_tensors import ModelTensor, as_model_tensors, read_model_tensor
from rim_dist.config import Recipe
from rim_dist.errors import ModelError, RimError
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
        refuse_adapter(folder)
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
    """`gather_requirements` from where the recipe starts, after every tensor there was accounted for."""
    return gather_requirements(recipe, _with_weights(recipe, find_start(recipe)))


def _with_weights(recipe: Recipe, start: Start) -> Start:
    """A start with its configuration and its weights. Raises ModelError if they are not what the model needs."""
    checkpoint, section = start.checkpoint, recipe.model
    if checkpoint is not None:
        return replace(start, weights=lambda: _by_plain_name(_reads(index_checkpoint(checkpoint).model)))
    if start.source is None:
        return start
    try:
        found = open_pretrained(start.source, section.revision, section.trust_remote_code)
    except RimError as error:
        raise ModelError(f"model.init_from: {error}") from error
    return replace(start, config=found.config, weights=lambda: _by_plain_name(found.weights()), notes=found.notes)


def model_of(
    recipe: Recipe,
    requirements: Requirements,
    resume: Path | None = None,
    mesh: Mesh | None = None,
    partition: Callable[[list[nn.Parameter]], None] | None = None,
) -> PreTrainedModel:
    """`build_model` with the weights that a run starts from, or goes on from (`resume`)."""
    return build_model(recipe, requirements, weights_of(recipe, requirements, resume), mesh, partition)


def _reads(tensors: Mapping[str, ModelTensor]) -> WeightSource:
    return lambda name: read_model_tensor(tensors[name], torch.float32) if name in tensors else None


def _by_plain_name(read: WeightSource) -> WeightSource:
    """A source for the names of the trained module from one for those of the plain model."""
    return lambda name: read(known) if (known := plain_name(name)) is not None else None


def weights_of(recipe: Recipe, requirements: Requirements, resume: Path | None = None) -> Weights:
    """Where the weights of a run come from.

    `resume`: the checkpoint that it goes on from. A portable one has the weights; the engine loads those of shards later.
    """
    if resume is not None and is_portable(resume):
        index = index_checkpoint(resume)
        plain = starts_fresh(resume)
        return Weights(_by_plain_name(_reads(index.model)) if plain else _reads(as_model_tensors(index.module)), "keep")
    source = requirements.start.weights
    return Weights(source() if source is not None else None, recipe.memory.initialise)
