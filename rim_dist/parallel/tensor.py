"""Tensor parallelism: the matrices of every layer, the embedding and the head split over the ranks of a tensor group.

Which layers are split how is read from the family's own plan in transformers (`tp_plan`); the layers stay the modules they
are, with smaller parameters and a forward that sends what is needed, so that names, peft and ZeRO see what they know.
DeepSpeed's AutoTP replaces modules instead: with adapters no trainable parameter is left, and a tied head stays whole.

Embedding and head are split by vocabulary, rows padded to a multiple of the ranks; nothing ever predicts a padding row.
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
from rim_dist.parallel.collectives import all_reduce, copy_to_group, gather_from_group, reduce_from_group, scatter_to_group
from rim_dist.unwrap import bare_model, base_layer

# Styles of transformers' plans. Embedding and head are split by vocabulary whatever the plan says of them.
_COLUMN, _ROW = ("colwise", "colwise_gather_output"), ("rowwise", "rowwise_split_input")
_SUMMED = "replicated_with_grad_allreduce"


@dataclass(frozen=True)
class TensorRank:
    """A rank of a tensor group. Without a group only shapes are made: no forward can run."""

    rank: int
    ranks: int
    group: Any = None


@dataclass(frozen=True)
class Slice:
    """The part of a parameter that tensor rank `rank` holds: `size` entries along dimension `dim`.

    The whole parameter has `whole` entries there; the last ranks may hold padding.
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
        """This rank's part of the whole tensor, padded with zeros."""
        part = tensor.narrow(self.dim, min(self.start, self.full_size), self.real)
        if self.real == self.size:
            return part
        shape = list(part.shape)
        shape[self.dim] = self.size - self.real
        return torch.cat([part, part.new_zeros(shape)], dim=self.dim)

    def full_shape(self, local: torch.Size | tuple[int, ...]) -> tuple[int, ...]:
        shape = list(local)
        shape[self.dim] = self.full_size
        return tuple(shape)


@dataclass(frozen=True)
class Vocabulary:
    """The rows of embedding and head that this rank has: `rows` from `start` on, the first `real` of them no padding."""

    start: int
    rows: int
    real: int
    size: int
    group: Any

    def local(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(row numbers here, whether the row is here) of vocabulary ids; numbers are 0 where it is not."""
        here = (ids >= self.start) & (ids < self.start + self.rows)
        return torch.where(here, ids - self.start, 0), here


def slice_of(parameter: torch.Tensor) -> Slice | None:
    """How a parameter is split; None if every tensor rank has it whole."""
    return getattr(parameter, "rim_slice", None)


def vocabulary_of(module: nn.Module) -> Vocabulary | None:
    """The vocabulary rows of a split embedding or head; None for a whole one."""
    return getattr(module, "rim_vocabulary", None)


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape the parameter has in the unsplit model."""
    split = slice_of(parameter)
    shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor
    return shape if split is None else split.full_shape(shape)


def split_model(model: nn.Module, tensor_rank: TensorRank) -> None:
    """Split a model (plain or with peft's adapters on it) over a tensor group, in place; meta parameters stay meta.

    Raises ModelError for a family without a plan or with one that is not understood, and for sizes that do not divide.
    """
    bare = bare_model(model)
    embedding, head = bare.get_input_embeddings(), bare.get_output_embeddings()
    vocabulary_parts = {id(embedding), id(head)}
    for module, style in list(_planned(bare, vocabulary_parts)):
        if style == _SUMMED:
            for parameter in module.parameters(recurse=False):
                if parameter.requires_grad:
                    _sum_gradient(parameter, tensor_rank)
        else:
            _split_linear(module, style, tensor_rank, bare.config.model_type)
    _split_vocabulary(embedding, head, tensor_rank, bare.config.get_text_config().vocab_size)


def _planned(bare: PreTrainedModel, leave: set[int]) -> Iterator[tuple[nn.Module, str]]:
    """Modules with the style the family's plan gives them."""
    family = bare.config.model_type
    plan: dict[str, str] = dict(bare.tp_plan or {})
    if not any(style in _COLUMN for name, style in plan.items() if ".*." in name):
        raise ModelError(f"model family {family}: transformers has no tensor parallel plan for it; use parallel.tensor 1")
    for name, module in bare.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", name))
        if style is None or id(module) in leave:
            continue
        if style not in (*_COLUMN, *_ROW, _SUMMED):
            raise ModelError(
                f"model family {family}: {name} is split {style!r} in its tensor parallel plan, which this trainer does not "
                "do; use parallel.tensor 1"
            )
        yield module, style


# ---- linear layers -----------------------------------------------------------------------------------------


def _split_linear(module: nn.Module, style: str, tensor_rank: TensorRank, family: str) -> None:
    layer = base_layer(module)
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"model family {family}: {type(layer).__name__} cannot be split; use parallel.tensor 1")
    column = style in _COLUMN
    split = functools.partial(_split_parameter, tensor_rank=tensor_rank, what=f"model family {family}: {style} layer")
    split(layer, "weight", dim=0 if column else 1)
    if column and layer.bias is not None:
        split(layer, "bias", dim=0)
    layer.out_features, layer.in_features = layer.weight.shape
    layer.forward = functools.partial(_FORWARDS[style], layer, tensor_rank.group)  # type: ignore[method-assign]
    adapted: Any = module
    for name, adapter in getattr(module, "lora_A", {}).items():
        _split_adapter(adapter, adapted.lora_B[name], style, tensor_rank, split)


def _split_adapter(a: nn.Linear, b: nn.Linear, style: str, tensor_rank: TensorRank, split: Callable[..., None]) -> None:
    """An adapter on a split layer: its narrow middle is what ranks share, so little is sent."""
    group = tensor_rank.group
    if style in _COLUMN:
        split(b, "weight", dim=0)
        b.out_features = b.weight.shape[0]
        a.register_forward_hook(lambda _module, _inputs, output: copy_to_group(output, group))
        if style == "colwise_gather_output":
            b.register_forward_hook(lambda _module, _inputs, output: gather_from_group(output, group))
    else:
        split(a, "weight", dim=1)
        a.in_features = a.weight.shape[1]
        if style == "rowwise_split_input":
            a.register_forward_pre_hook(lambda _module, inputs: (scatter_to_group(inputs[0], group),))
        a.register_forward_hook(lambda _module, _inputs, output: reduce_from_group(output, group))


def _column(layer: nn.Linear, group: Any, hidden: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(copy_to_group(hidden, group), layer.weight, layer.bias)


def _column_joined(layer: nn.Linear, group: Any, hidden: torch.Tensor) -> torch.Tensor:
    return gather_from_group(_column(layer, group, hidden), group)


def _row(layer: nn.Linear, group: Any, hidden: torch.Tensor) -> torch.Tensor:
    output = reduce_from_group(nn.functional.linear(hidden, layer.weight), group)
    return output if layer.bias is None else output + layer.bias


def _row_of_whole(layer: nn.Linear, group: Any, hidden: torch.Tensor) -> torch.Tensor:
    return _row(layer, group, scatter_to_group(hidden, group))


_FORWARDS: dict[str, Callable[..., torch.Tensor]] = {
    "colwise": _column,
    "colwise_gather_output": _column_joined,
    "rowwise": _row,
    "rowwise_split_input": _row_of_whole,
}


def _split_parameter(module: nn.Module, name: str, dim: int, tensor_rank: TensorRank, what: str) -> None:
    whole = getattr(module, name)
    if whole.shape[dim] % tensor_rank.ranks:
        raise ModelError(f"{what} of shape {tuple(whole.shape)} cannot be split over parallel.tensor {tensor_rank.ranks}")
    split = Slice(dim, whole.shape[dim] // tensor_rank.ranks, whole.shape[dim], tensor_rank.rank)
    setattr(module, name, _part(whole, split))


def _part(whole: nn.Parameter, split: Slice) -> nn.Parameter:
    part = nn.Parameter(split.of(whole.detach()).clone(), requires_grad=whole.requires_grad)
    return mark_slice(part, split)


def mark_slice(parameter: nn.Parameter, split: Slice | None) -> nn.Parameter:
    """Note how a parameter is split, for us and for DeepSpeed's gradient norm."""
    if split is not None:
        parameter.rim_slice = split  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
    return parameter


def _sum_gradient(parameter: nn.Parameter, tensor_rank: TensorRank) -> None:
    """A parameter that ranks have whole but use on their own heads: each sees a part of its gradient."""
    parameter.rim_summed = tensor_rank.group  # type: ignore[attr-defined]


def sum_shared_gradients(model: nn.Module) -> None:
    """Let the gradients of such parameters be summed as they arise. Once the parameters are the ones that train."""
    for parameter in model.parameters():
        group = getattr(parameter, "rim_summed", None)
        if group is not None:
            parameter.register_hook(functools.partial(_summed, group))


def _summed(group: Any, gradient: torch.Tensor) -> torch.Tensor:
    return all_reduce(gradient.clone(memory_format=torch.contiguous_format), group)


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
    inner.weight = _part(inner.weight, split)
    inner.num_embeddings = rows
    padding = inner.padding_idx
    if padding is not None:
        inner.padding_idx = padding - split.start if 0 <= padding - split.start < rows else None
    inner.rim_vocabulary = vocabulary
    inner.forward = functools.partial(_look_up, vocabulary, inner.forward)
    outer.weight = inner.weight if tied else _part(outer.weight, split)  # type: ignore[arg-type]
    if outer.bias is not None:
        outer.bias = _part(outer.bias, split)
    outer.out_features = rows
    outer.rim_vocabulary = vocabulary  # type: ignore[assignment]


def _look_up(vocabulary: Vocabulary, plain: Callable[[torch.Tensor], torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    rows, here = vocabulary.local(ids)
    return reduce_from_group(plain(rows).masked_fill(~here.unsqueeze(-1), 0), vocabulary.group)
