"""The modules inside peft's wrappers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel


def bare_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside peft's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def base_layer(module: nn.Module) -> Any:
    """The layer inside peft's wrappers around it."""
    module = getattr(module, "token_adapter", module)
    return getattr(module, "base_layer", module)


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head; some families (Llama 4) keep it under another name than they say."""
    if model.base_model is not model:
        return model.base_model
    return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
