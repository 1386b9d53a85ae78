"""The loss inside the model's forward: hidden states from the backbone, then the head at supervised positions only.

The model is not wrapped, so that its parameters keep their names. The head is called as a module, so that ZeRO-3 gathers its
weights.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rim_dist.data.rows import Batch, Targets
from rim_dist.objective.latent import thought_states
from rim_dist.objective.loss import HeadWeights, LogitRule, full_logits, plain_cross_entropy, weighted_cross_entropy
from rim_dist.parallel.tensor import vocabulary_of
from rim_dist.unwrap import backbone, base_layer


def head_weights(head: nn.Module) -> HeadWeights | None:
    """The weights of an output head that is a linear layer, or a linear layer of which peft trains some rows.

    None for any other head, for example one with adapters.
    """
    adapter = getattr(head, "token_adapter", None)
    linear = base_layer(head) if adapter is not None else head
    if not isinstance(linear, nn.Linear):
        return None
    vocabulary = vocabulary_of(linear)
    if adapter is None:
        return HeadWeights(linear.weight, linear.bias, vocabulary=vocabulary)
    (name,) = adapter.active_adapters
    rows = adapter.trainable_tokens_delta[name]
    return HeadWeights(linear.weight, linear.bias, rows, tuple(adapter.token_indices[name]), vocabulary)


def _trained_rows(adapter: Any, ids: torch.Tensor) -> torch.Tensor:
    """Embeddings of `ids`, with the rows that peft trains. peft's own forward copies the whole matrix for it."""
    (name,) = adapter.active_adapters
    rows = adapter.trainable_tokens_delta[name]
    embedded = adapter.base_layer(ids)
    scale = adapter._get_embed_scale()
    if scale is not None:
        rows = rows * scale.to(rows.dtype)
    at = torch.tensor(adapter.token_indices[name], device=ids.device)
    matches = ids.unsqueeze(-1) == at  # [..., trained rows]
    chosen = nn.functional.embedding(matches.int().argmax(dim=-1), rows).to(embedded.dtype)
    return torch.where(matches.any(dim=-1, keepdim=True), chosen, embedded)


def install_readout_loss(model: PreTrainedModel) -> None:
    """Let the model's forward take `rim_targets`: it then returns (weighted loss sum, token losses `[targets]`).

    Without the keyword the forward is unchanged. A head that `head_weights` cannot describe computes all its logits at once.
    """
    head = model.get_output_embeddings()
    rule = LogitRule.of(model.config)
    plain_forward, plain_head = model.forward, head.forward
    split = vocabulary_of(base_layer(head)) is not None

    @functools.wraps(plain_head)
    def head_forward(*args: Any, rim_targets: Targets | None = None, gradient_scale: float = 1.0, **keywords: Any) -> Any:
        if rim_targets is None and not split:
            return plain_head(*args, **keywords)
        weights = head_weights(head)
        if rim_targets is None:
            assert weights is not None
            return full_logits(args[0], weights)
        if weights is None:
            return plain_cross_entropy(plain_head(*args), rule, rim_targets)
        return weighted_cross_entropy(args[0], weights, rule, rim_targets, gradient_scale)

    @functools.wraps(plain_forward)
    def forward(*args: Any, rim_targets: Targets | None = None, gradient_scale: float = 1.0, **keywords: Any) -> Any:
        if rim_targets is None:
            return plain_forward(*args, **keywords)
        wanted = {name: keywords[name] for name in ("input_ids", "position_ids", "rim_layout")}
        if thoughts := keywords.get("rim_thoughts"):
            states = thought_states(model, wanted["input_ids"], wanted["rim_layout"], rim_targets.column, thoughts)
        else:
            states = backbone(model)(**wanted, use_cache=False)[0][0].index_select(0, rim_targets.column)
        return head(states, rim_targets=rim_targets, gradient_scale=gradient_scale)

    head.forward, model.forward = head_forward, forward
    adapter = getattr(model.get_input_embeddings(), "token_adapter", None)
    if adapter is not None:
        adapter.forward = functools.partial(_trained_rows, adapter)


def run_batch(model: nn.Module, batch: Batch, gradient_scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted loss sum, token losses) of a batch by a model, or an engine around it, with the readout loss installed."""
    return model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        rim_layout=batch.layout,
        rim_targets=batch.targets,
        rim_thoughts=batch.thoughts,
        gradient_scale=gradient_scale,
    )
