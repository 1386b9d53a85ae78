"""The model of a run without values: on the meta device, with its memory rows and adapters."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rim_dist.config import Recipe
from rim_dist.errors import ModelError, first_line
from rim_dist.tokens import MemoryTokens

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def empty_model(config: PretrainedConfig, trust_remote_code: bool = False) -> Any:
    """A family's model on the meta device, also what the family draws while it is built, whatever the device."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=torch.float32)
    empty: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and not p.is_meta:
                module._parameters[name] = empty.setdefault(
                    id(p), nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
                )
    return model


def empty_module(recipe: Recipe, config: PretrainedConfig, tokens: MemoryTokens | None) -> Any:
    """The model of a recipe on the meta device. It gets the recipe's adapters if `tokens` are given."""
    model = empty_model(config, recipe.model.trust_remote_code)
    if recipe.model.lora is not None and tokens is not None:
        with torch.device("meta"):
            return add_adapters(model, recipe, tokens)
    return model


def skeleton(recipe: Recipe, config: PretrainedConfig, tokens: MemoryTokens) -> Any:
    """The trained module of a run on the meta device: with a row for each memory token, and with adapters."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, max(tokens.ids) + 1)
    return empty_module(recipe, config, tokens)


def add_adapters(model: PreTrainedModel, recipe: Recipe, tokens: MemoryTokens) -> Any:
    """Wrap the model with peft. Adapters and the memory rows are trained, everything else is frozen."""
    import peft

    lora = recipe.model.lora
    assert lora is not None
    modules = dict(model.named_modules())
    rows: dict[str, list[int]] = {}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        name = next(name for name, module in modules.items() if module is layer).rpartition(".")[2]
        rows[name] = list(tokens.ids)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        rows = dict([next(iter(rows.items()))])  # a tied head follows the embedding
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        # peft builds no dropout module for 0. The trainer sets the real value at each stage.
        lora_dropout=recipe.largest_dropouts.lora,
        target_modules=lora.target_modules,
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules: {lora.target_modules!r}: {first_line(error)}") from None


def plain_name(name: str) -> str | None:
    """The name in the plain model of a tensor of the trained module; None for an adapter's own tensors."""
    if ".lora_" in name or ".trainable_tokens_" in name:
        return None
    return re.sub(r"(\.base_layer)+\.", ".", name.removeprefix("base_model.model.").replace(".token_adapter.", "."))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters; weight decay on matrices only."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": trainable, "weight_decay": 0.0}]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
