"""Values for a model that was built without any, module by module, so that no rank ever holds the whole model.

A skeleton on the meta device, adapters and tensor slices included, gets its values one module after the other. Under ZeRO-3
each parameter is partitioned as soon as it has its values. Whole tensors exist one at a time, or one layer at a time where
the family itself draws them. All ranks together get what one process would get.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rim_dist.errors import CheckpointError, ModelError
from rim_dist.heartbeat import send_heartbeat
from rim_dist.model.skeleton import plain_name
from rim_dist.parallel.tensor import full_shape, mark_slice, slice_of
from rim_dist.tokens import MemoryTokens
from rim_dist.unwrap import bare_model, base_layer

_BASE = ".base_layer.weight"
_ROWS = ".trainable_tokens_"  # what peft calls its copies of rows


# A whole tensor in fp32 by its name in the trained module; None for a name that there is no tensor for.
WeightSource = Callable[[str], torch.Tensor | None]


@dataclass(frozen=True)
class MemoryRows:
    """Initial values of the memory tokens' rows of embedding and head (`MemorySection.initialise`), drawn from the seed."""

    tokens: MemoryTokens
    initialise: str
    seed: int

    def of(self, number: int, matrix: torch.Tensor, rows: int, std: float) -> torch.Tensor:
        """The `number`-th matrix (0 embedding, 1 head, 2 head's bias) with `rows` rows and its memory rows set.

        The mean of the old rows plus a hundredth of their spread in noise: blocks start as near-neutral inputs that
        differ from each other. The noise is drawn from the seed alone.
        """
        generator = torch.Generator().manual_seed(self.seed * 3 + number)
        old = matrix.shape[0]
        if rows > old:
            more = torch.empty((rows - old, *matrix.shape[1:])).normal_(0.0, std, generator=generator)
            matrix = torch.cat([matrix, more])
        tokens = self.tokens
        chosen = list(tokens.ids) if self.initialise == "mean" else list(tokens.added) if self.initialise == "auto" else []
        if chosen:
            known = matrix[:old]
            if reused := [i for i in chosen if i < old]:
                others = torch.ones(old, dtype=torch.bool)
                others[reused] = False
                known = known[others]
            spread, mean = torch.std_mean(known, dim=0)
            noise = torch.randn((len(chosen), *matrix.shape[1:]), generator=generator) * spread * 0.01
            matrix[chosen] = mean + noise
        return matrix


def fill(
    model: nn.Module,
    source: WeightSource | None,
    memory: MemoryRows,
    reads: bool = True,
    partition: Callable[[list[nn.Parameter]], None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Give every parameter and buffer of a skeleton its values. Raises CheckpointError or ModelError for one without.

    `source`: None draws them as the family does, from torch's random state. `reads`: whether this rank makes values; others
    get theirs when a parameter is partitioned. `partition`: called with parameters as soon as they have values.
    """
    _Filler(model, source, memory, reads, partition, dtype).run()


class _Filler:
    def __init__(
        self,
        model: nn.Module,
        source: WeightSource | None,
        memory: MemoryRows,
        reads: bool,
        partition: Callable[[list[nn.Parameter]], None] | None,
        dtype: torch.dtype,
    ) -> None:
        self._model, self._source, self._memory = model, source, memory
        self._reads, self._partition, self._dtype = reads, partition, dtype
        self._bare = bare_model(model)
        self._names = {id(m): f"{name}." if name else "" for name, m in model.named_modules()}
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self._owners.setdefault(id(parameter), []).append((module, name))
        embedding, head = base_layer(self._bare.get_input_embeddings()), base_layer(self._bare.get_output_embeddings())
        self._vocabulary = {id(embedding.weight): 0}
        self._vocabulary.setdefault(id(head.weight), 1)
        if getattr(head, "bias", None) is not None:
            self._vocabulary[id(head.bias)] = 2
        self._rows: dict[str, torch.Tensor] = {}  # memory rows by the name of their matrix, for peft's copies of them
        self._kept: list[nn.Parameter] = []

    def run(self) -> None:
        if self._source is None:
            torch.manual_seed(self._memory.seed)
            lists = [module for module in self._bare.modules() if isinstance(module, nn.ModuleList)]
            largest = max((_elements(layer) for layers in lists for layer in layers), default=0)
            for unit, owner in _units(self._bare, self._bare, largest):
                self._draw(unit, owner)
        for module in self._model.modules():
            self._fill_buffers(module)
            for name in list(module._parameters):
                self._fill_parameter(module, name)
        for name, tensor in [*self._model.named_parameters(), *self._model.named_buffers()]:
            if tensor.is_meta:
                raise ModelError(f"{name}: no value could be made for it; this model family is not supported")

    # ---- drawn by the family ----------------------------------------------------------------------

    def _draw(self, unit: nn.Module, owner: PreTrainedModel) -> None:
        """Whole tensors for a unit, drawn as transformers draws them, then sliced and partitioned."""
        skeletons: dict[int, nn.Parameter] = {}
        for module in unit.modules():
            for name, skeleton in module._parameters.items():
                if skeleton is not None and skeleton.is_meta and plain_name(f"{self._names[id(module)]}{name}") is not None:
                    whole = nn.Parameter(torch.full(full_shape(skeleton), math.nan), requires_grad=skeleton.requires_grad)
                    skeletons[id(whole)] = skeleton
                    self._replace(skeleton, whole)
            self._empty_buffers(module)
        if self._reads:
            _initialise(unit, owner, set(skeletons))
        else:
            for module in unit.modules():
                if module._buffers:  # buffers are made by every rank
                    owner._init_weights(module)
        for module in list(unit.modules()):
            for name, drawn in list(module._parameters.items()):
                if drawn is not None and id(drawn) in skeletons:
                    self._finish(skeletons[id(drawn)], drawn.detach(), f"{self._names[id(module)]}{name}", drawn)

    def _empty_buffers(self, module: nn.Module) -> None:
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                missing = math.nan if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full_like(buffer, missing, device="cpu")

    # ---- from a source -----------------------------------------------------------------------------

    def _fill_parameter(self, module: nn.Module, name: str) -> None:
        skeleton = module._parameters[name]
        if skeleton is not None and skeleton.is_meta:
            full_name = f"{self._names[id(module)]}{name}"
            send_heartbeat(f"weights of {full_name}")
            # The value is held nowhere else: a matrix may be large.
            self._finish(skeleton, self._value(full_name, full_shape(skeleton)), full_name, skeleton)

    def _value(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if not self._reads:
            return torch.empty(shape)
        value = self._source(name) if self._source is not None else None
        if value is not None:
            return value
        # The start of an adapter's tensor, as peft has it, drawn from the seed and the name alone.
        if ".lora_A." in name:
            generator = torch.Generator().manual_seed((self._memory.seed << 32) + zlib.crc32(name.encode()))
            return nn.init.kaiming_uniform_(torch.empty(shape), a=math.sqrt(5), generator=generator)
        if ".lora_B." in name:
            return torch.zeros(shape)
        if _ROWS in name:
            return self._rows[name.partition(_ROWS)[0]].clone()
        raise CheckpointError(f"{name}: the weights have no such tensor")

    def _fill_buffers(self, module: nn.Module) -> None:
        todo = [name for name, buffer in module._buffers.items() if buffer is not None and buffer.is_meta]
        if not todo:
            return
        self._empty_buffers(module)
        if _ROWS not in f".{self._names[id(module)]}":
            self._bare._init_weights(module)
        for name in todo:
            full_name = f"{self._names[id(module)]}{name}"
            buffer = module._buffers[name]
            assert buffer is not None
            if _ROWS in full_name:
                buffer.copy_(self._rows[full_name.partition(_ROWS)[0]] if self._reads else torch.zeros(()))
            elif self._source is not None and (value := self._source(full_name)) is not None:
                buffer.copy_(value)
            if buffer.is_floating_point() and buffer.isnan().any():
                raise ModelError(f"{full_name}: no value could be made for it; this model family is not supported")

    # ---- into the model ------------------------------------------------------------------------------

    def _finish(self, skeleton: nn.Parameter, whole: torch.Tensor, name: str, current: nn.Parameter) -> None:
        """Replace `current` by this rank's slice of `whole`; `skeleton` is the parameter that the model was built with."""
        number = self._vocabulary.get(id(skeleton))
        shape = full_shape(skeleton)
        if number is not None and self._reads:
            if whole.shape[0] <= shape[0]:
                std = float(getattr(self._bare.config.get_text_config(), "initializer_range", None) or 0.02)
                whole = self._memory.of(number, whole, shape[0], std)
            if name.endswith(_BASE):
                self._rows[name.removesuffix(_BASE)] = whole[list(self._memory.tokens.ids)]
        if tuple(whole.shape) != shape:
            raise CheckpointError(f"{name} has shape {tuple(whole.shape)}, the model's is {shape}")
        split = slice_of(skeleton)
        values = whole if split is None else split.of(whole).clone()
        fresh = nn.Parameter(values.to(self._dtype), requires_grad=skeleton.requires_grad)
        mark_slice(fresh, split)
        if hasattr(skeleton, "rim_summed"):
            fresh.rim_summed = skeleton.rim_summed  # type: ignore[attr-defined]
        self._replace(current, fresh)
        if self._partition is not None:
            self._partition([fresh])

    def _replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        owners = self._owners.pop(id(old))
        for module, name in owners:
            module._parameters[name] = new
        self._owners[id(new)] = owners
        self._kept.append(old)  # an id is only a name as long as its object lives


def _elements(module: nn.Module) -> int:
    return sum(math.prod(full_shape(p)) for p in module.parameters())


def _units(module: nn.Module, owner: PreTrainedModel, largest: int) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """Modules to draw one after the other: layers as they are, larger modules child by child."""
    for child in module.children():
        inner = child if isinstance(child, PreTrainedModel) else owner
        if isinstance(child, nn.ModuleList) or (list(child.children()) and _elements(child) > largest):
            yield from _units(child, inner, largest)
        else:
            yield child, inner


def _initialise(module: nn.Module, owner: PreTrainedModel, fresh: set[int]) -> None:
    """Children first, as transformers does it; adapters and layers whose (tied) weights already have values are left out."""
    for name, child in module.named_children():
        if not name.startswith(("lora_", "trainable_tokens_")):
            _initialise(child, owner, fresh)
    own = list(module.parameters(recurse=False))
    if not own or any(id(parameter) in fresh for parameter in own):
        owner._init_weights(module)


def broadcast_buffers(model: nn.Module, send: Callable[[torch.Tensor], Any]) -> None:
    """Give buffers that only the reading rank could make (peft's copies of rows) to the others."""
    for name, buffer in model.named_buffers():
        if _ROWS in name:
            send(buffer)
