"""Dropout by place, wherever a family keeps its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from rim_dist.config import Dropouts


class DropoutPlace(NamedTuple):
    """Where a model keeps a probability: `owner.attribute`. `kind`: the class of the layer, and what it calls its dropout."""

    kind: tuple[str, str]
    owner: Any
    attribute: str
    of_adapter: bool


def dropout_places(model: torch.nn.Module) -> Iterator[DropoutPlace]:
    """All of a model: `nn.Dropout` modules, and those that modules keep as numbers (`attention_dropout`)."""
    for path, module in model.named_modules():
        kind = type(module).__name__
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Dropout):
                yield DropoutPlace((kind, name), child, "p", path.endswith(".lora_dropout"))
        for name, value in list(vars(module).items()):
            if name.endswith(("dropout", "_pdrop")) and isinstance(value, float | int) and not isinstance(value, bool):
                yield DropoutPlace((kind, name), module, name, False)


def set_dropout(model: torch.nn.Module, dropouts: Dropouts, attention: frozenset[tuple[str, str]] = frozenset()) -> None:
    """Set every dropout of a model. `attention`: kinds of the places that drop attention weights (`proof.dropout_kinds`)."""
    for place in dropout_places(model):
        p = dropouts.attention if place.kind in attention else dropouts.residual
        setattr(place.owner, place.attribute, dropouts.lora if place.of_adapter else p)
