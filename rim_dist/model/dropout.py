"""The one dropout of a run, wherever a family keeps its own."""

from __future__ import annotations

import torch


def set_dropout(model: torch.nn.Module, probability: float) -> None:
    """Set every dropout of a model: `nn.Dropout` modules, and those that modules keep as attributes (`attention_dropout`)."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        for name, value in vars(module).items():
            if name.endswith(("dropout", "_pdrop")) and isinstance(value, float):
                setattr(module, name, probability)
