"""Tensor parallelism: the matrices of every layer, the embedding and the head split over the ranks of a tensor group.

The family's own plan in transformers (`tp_plan`) says how each layer is split. Layers keep their modules and get smaller
parameters and a forward that communicates, so that parameter names, peft and ZeRO work unchanged. DeepSpeed's AutoTP replaces
modules instead: with adapters no trainable parameter is left, and a tied head is not split.

Embedding and head are split by vocabulary, with rows padded to a multiple of the ranks; a padding row is never predicted.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rim_dist.errors import ModelError
from rim_dist.parallel.collectives import (
    Function,
    copy_to_group,
    gather_from_group,
    reduce_from_group,
    scatter_to_group,
    summed,
)
from rim_dist.unwrap import bare_model, base_layer


def _keep(tensor: torch.Tensor, _group: Any) -> torch.Tensor:
    return tensor


@dataclass(frozen=True)
class _Style:
    """A split linear layer: the dimension of its weight that is split, and what its input and its output go through."""

    dim: int
    enter: Function
    leave: Function


# Styles of transformers' plans. Embedding and head are split by vocabulary whatever the plan says of them.
_LINEAR = {
    "colwise": _Style(0, copy_to_group, _keep),
    "colwise_gather_output": _Style(0, copy_to_group, gather_from_group),
    "rowwise": _Style(1, _keep, reduce_from_group),
    "rowwise_split_input": _Style(1, scatter_to_group, reduce_from_group),
}
_SUMMED = "replicated_with_grad_allreduce"


@dataclass(frozen=True)
class TensorRank:
    """A rank of a tensor group. Without a group the model gets its split shapes but cannot run a forward pass."""

    rank: int
    ranks: int
    group: Any = None


@dataclass(frozen=True)
class Slice:
    """The slice of a parameter that tensor rank `rank` holds: `size` entries along dimension `dim`.

    The full parameter has `full_size` entries there; slices of the last ranks may end in padding.
    """

    dim: int
    size: int
    full_size: int
    rank: int

    @property
    def start(self) -> int:
        return self.rank * self.size

    @property
    def real(self) -> int:
        """Entries that are not padding."""
        return max(0, min(self.size, self.full_size - self.start))

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This slice of the full tensor, padded with zeros."""
        own = tensor.narrow(self.dim, min(self.start, self.full_size), self.real)
        if self.real == self.size:
            return own
        shape = list(own.shape)
        shape[self.dim] = self.size - self.real
        return torch.cat([own, own.new_zeros(shape)], dim=self.dim)


@dataclass(frozen=True)
class Vocabulary:
    """A rank's rows of a split embedding or head.

    They are rows `start` to `start + rows` of the vocabulary of `size` rows; only the first `real` of them are not padding.
    """

    start: int
    rows: int
    real: int
    size: int
    group: Any

    def local(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Local row numbers of vocabulary ids (0 where another rank has the row), and whether this rank has the row."""
        here = (ids >= self.start) & (ids < self.start + self.rows)
        return torch.where(here, ids - self.start, 0), here


def slice_of(parameter: torch.Tensor) -> Slice | None:
    """How a parameter is split; None if it is replicated on every tensor rank."""
    return getattr(parameter, "rim_slice", None)


def vocabulary_of(module: nn.Module) -> Vocabulary | None:
    """The vocabulary rows of a split embedding or head; None if it is not split."""
    return getattr(module, "rim_vocabulary", None)


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape the parameter has in the unsplit model."""
    split = slice_of(parameter)
    shape = list(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor
    if split is not None:
        shape[split.dim] = split.full_size
    return tuple(shape)


def split_model(model: nn.Module, tensor_rank: TensorRank) -> None:
    """Split a model (plain or with peft's adapters on it) over a tensor group, in place; meta parameters stay meta.

    Raises ModelError for a family without a plan or with one that is not understood, and for sizes that do not divide.
    """
    bare = bare_model(model)
    embedding, head = bare.get_input_embeddings(), bare.get_output_embeddings()
    for module, style in list(_planned(bare, {id(embedding), id(head)})):
        if style == _SUMMED:
            # Replicated, but used on a rank's own heads: its gradients are summed once these parameters train.
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.rim_summed = tensor_rank.group  # type: ignore[attr-defined]
        else:
            _split_linear(module, style, tensor_rank, bare.config.model_type)
    _split_vocabulary(embedding, head, tensor_rank, bare.config.get_text_config().vocab_size)


def _planned(bare: PreTrainedModel, leave: set[int]) -> Iterator[tuple[nn.Module, str]]:
    """Modules with the style that the family's plan gives them, without the modules whose ids are in `leave`."""
    family = bare.config.model_type
    plan: dict[str, str] = dict(bare.tp_plan or {})
    if not any(style in _LINEAR and _LINEAR[style].dim == 0 for name, style in plan.items() if ".*." in name):
        raise ModelError(f"model family {family}: transformers has no tensor parallel plan for it; use parallel.tensor 1")
    for name, module in bare.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None or id(module) in leave:
            continue
        if style not in (*_LINEAR, _SUMMED):
            raise ModelError(
                f"model family {family}: {name} is split {style!r} in its tensor parallel plan, which this trainer does not "
                "do; use parallel.tensor 1"
            )
        yield module, style


# ---- linear layers -----------------------------------------------------------------------------------------


def _split_linear(module: nn.Module, name: str, tensor_rank: TensorRank, family: str) -> None:
    """Split a linear layer by the style called `name`, with the LoRA adapters on it."""
    layer, style, group = base_layer(module), _LINEAR[name], tensor_rank.group
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"model family {family}: {type(layer).__name__} cannot be split; use parallel.tensor 1")

    def split(linear: nn.Linear) -> None:
        what = f"model family {family}: {name} layer"
        _split_parameter(linear, "weight", style.dim, tensor_rank, what)
        if style.dim == 0 and linear.bias is not None:
            _split_parameter(linear, "bias", 0, tensor_rank, what)
        linear.out_features, linear.in_features = linear.weight.shape

    split(layer)
    layer.forward = functools.partial(_forward, layer, style, group)  # type: ignore[method-assign]
    # Ranks communicate in an adapter's narrow middle, so little is sent.
    adapted: Any = module
    for adapter, a in getattr(module, "lora_A", {}).items():
        b = adapted.lora_B[adapter]
        if style.dim == 0:
            split(b)
            a.register_forward_hook(lambda _module, _inputs, output: style.enter(output, group))
            b.register_forward_hook(lambda _module, _inputs, output: style.leave(output, group))
        else:
            split(a)
            a.register_forward_pre_hook(lambda _module, inputs: (style.enter(inputs[0], group),))
            a.register_forward_hook(lambda _module, _inputs, output: style.leave(output, group))


def _forward(layer: nn.Linear, style: _Style, group: Any, hidden: torch.Tensor) -> torch.Tensor:
    bias = layer.bias if style.dim == 0 else None  # a row-wise layer adds its bias once, after the sum
    output = style.leave(nn.functional.linear(style.enter(hidden, group), layer.weight, bias), group)
    return output if style.dim == 0 or layer.bias is None else output + layer.bias


def _split_parameter(module: nn.Module, name: str, dim: int, tensor_rank: TensorRank, what: str) -> None:
    full = getattr(module, name)
    if full.shape[dim] % tensor_rank.ranks:
        raise ModelError(f"{what} of shape {tuple(full.shape)} cannot be split over parallel.tensor {tensor_rank.ranks}")
    split = Slice(dim, full.shape[dim] // tensor_rank.ranks, full.shape[dim], tensor_rank.rank)
    setattr(module, name, _sliced(full, split))


def _sliced(full: nn.Parameter, split: Slice) -> nn.Parameter:
    return mark_slice(nn.Parameter(split.of(full.detach()).clone(), requires_grad=full.requires_grad), split)


def mark_slice(parameter: nn.Parameter, split: Slice | None) -> nn.Parameter:
    """Note how a parameter is split, for us and for DeepSpeed's gradient norm."""
    if split is not None:
        parameter.rim_slice = split  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


def sum_shared_gradients(model: nn.Module) -> None:
    """Sum, as they arise, gradients of replicated parameters that each rank uses on its own heads.

    Call it once the parameters are the ones that train.
    """
    for parameter in model.parameters():
        group = getattr(parameter, "rim_summed", None)
        if group is not None:
            parameter.register_hook(functools.partial(summed, group=group))


# ---- embedding and head ------------------------------------------------------------------------------------


def _split_vocabulary(embedding: nn.Module, head: nn.Module, tensor_rank: TensorRank, size: int) -> None:
    inner, outer = base_layer(embedding), base_layer(head)
    if not isinstance(outer, nn.Linear) or hasattr(head, "lora_A"):
        raise ModelError(
            "model.lora.target_modules: adapters on the output head cannot be combined with parallel.tensor above 1"
        )
    tied = outer.weight is inner.weight
    rows = -(-size // tensor_rank.ranks)
    split = Slice(0, rows, size, tensor_rank.rank)
    vocabulary = Vocabulary(split.start, rows, split.real, size, tensor_rank.group)
    inner.weight = _sliced(inner.weight, split)
    inner.num_embeddings = rows
    padding = inner.padding_idx
    if padding is not None:
        inner.padding_idx = padding - split.start if 0 <= padding - split.start < rows else None
    inner.rim_vocabulary = vocabulary
    inner.forward = functools.partial(_look_up, vocabulary, inner.forward)
    outer.weight = inner.weight if tied else _sliced(outer.weight, split)  # type: ignore[arg-type]
    if outer.bias is not None:
        outer.bias = _sliced(outer.bias, split)
    outer.out_features = rows
    outer.rim_vocabulary = vocabulary  # type: ignore[assignment]


def _look_up(vocabulary: Vocabulary, plain: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    rows, here = vocabulary.local(ids)
    return reduce_from_group(plain(rows).masked_fill(~here.unsqueeze(-1), 0), vocabulary.group)
