"""Building this rank's slice of the model, with memory rows, adapters and the RiM attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint as recompute
from transformers import GenerationConfig, PreTrainedModel

from rim_dist.attention.registration import use_rim_attention
from rim_dist.config import Dropouts, Recipe
from rim_dist.methods import method_of
from rim_dist.model.dropout import set_dropout
from rim_dist.model.requirements import Requirements
from rim_dist.model.skeleton import DTYPES, skeleton
from rim_dist.model.thinking import think_before_answers
from rim_dist.model.weights import MemoryRows, WeightSource, broadcast_buffers, fill
from rim_dist.objective.forward import install_readout_loss
from rim_dist.parallel.mesh import Coordinates, Mesh
from rim_dist.parallel.tensor import TensorRank, split_model, sum_shared_gradients
from rim_dist.unwrap import bare_model


@dataclass(frozen=True)
class Weights:
    """Where a model's values come from."""

    source: WeightSource | None  # None: drawn from the seed
    memory_rows: str  # `MemorySection.initialise`


def build_model(
    recipe: Recipe,
    requirements: Requirements,
    weights: Weights,
    mesh: Mesh | None = None,
    partition: Callable[[list[torch.nn.Parameter]], None] | None = None,
) -> PreTrainedModel:
    """This rank's slice of the model, with memory rows and adapters, the RiM attention selected, and all dropouts 0.

    The values depend on seed and weights alone, not on the number of ranks. `partition`: shards parameters over ranks (ZeRO-3)
    while the model is built. The model is fp32, or of the run's precision if it is partitioned.
    """
    mesh = mesh or Mesh.alone()
    section = recipe.model
    model: Any = skeleton(recipe, requirements.config, requirements.tokens)
    bare = bare_model(model)
    if mesh.degrees.tensor > 1:
        split_model(model, TensorRank(mesh.coordinates.tensor, mesh.degrees.tensor, mesh.tensor_group))
    bare.generation_config = GenerationConfig(eos_token_id=requirements.ends or None)
    use_rim_attention(bare, next(iter(requirements.attention.values())).kernel)
    dtype = DTYPES[section.dtype] if partition is not None else torch.float32
    memory = MemoryRows(requirements.tokens, weights.memory_rows, recipe.run.seed)
    reads = partition is None or mesh.shard == 0
    fill(model, weights.source, memory, reads, partition, dtype)
    if partition is not None and mesh.degrees.shards > 1:
        first = mesh.degrees.rank_of(Coordinates(0, 0, mesh.coordinates.tensor))
        broadcast_buffers(model, functools.partial(dist.broadcast, src=first, group=mesh.shard_group))
    model.train()
    set_dropout(model, Dropouts())
    sum_shared_gradients(model)
    if section.activation_checkpointing:
        recompute_layers(bare, section.activation_offload)
        if section.lora is not None:
            model.enable_input_require_grads()
    install_readout_loss(bare)
    if thoughts := method_of(recipe).thoughts:
        think_before_answers(bare, thoughts, requirements.tokens.ids)
    return model


def recompute_layers(model: PreTrainedModel, offload: bool) -> None:
    """Activation checkpointing: keep only each layer's input (`offload`: in CPU memory), recompute the layer in backward."""
    # The name of later transformers first: there the earlier one warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    if offload:
        model._set_gradient_checkpointing(True, _offloaded_checkpoint)


def _offloaded_checkpoint(layer: Any, hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
    """Recompute a layer in the backward pass from its input, which is kept in CPU memory until then."""
    device = hidden.device

    def run(kept: torch.Tensor) -> Any:
        return layer(kept.to(device, non_blocking=True), *arguments, **keywords)

    return recompute(run, hidden.cpu(), use_reentrant=False)
