"""Hidden states at the end of every memory block, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rim_dist.evaluation.loading import LoadedModel
from rim_dist.evaluation.prefixes import prefix_batches
from rim_dist.unwrap import backbone


def block_states(loaded: LoadedModel, prompts: Sequence[Sequence[int]], batch: int = 64) -> torch.Tensor:
    """States `[prompts, blocks, hidden]` at the end token of each block, as the output head sees them; float32 on the CPU.

    `prompts` (token ids) end with the model's trained blocks. All states come from one prefill: the state after block k does
    not depend on later blocks. The first token of the answer after k blocks is predicted from it. Attention is plain and
    causal, as a server runs it. Raises DataError if a prompt does not fit the model.
    """
    states = []
    batches = prefix_batches(loaded.model, loaded.tokenizer, prompts, loaded.blocks, loaded.block_size, batch)
    for arguments, coordinates in batches:
        ends = coordinates.block.shape[1] - 1 - torch.arange(loaded.blocks - 1, -1, -1) * loaded.block_size
        with torch.no_grad():
            hidden = backbone(loaded.model)(**arguments, use_cache=False)[0]
        states.append(hidden[:, ends.to(hidden.device)].float().cpu())
    return torch.cat(states)


def principal_axes(states: torch.Tensor) -> Any:
    """scikit-learn's PCA of states `[..., hidden]` with two components.

    The largest entry of each axis is positive, so that equal states give equal pictures.
    """
    from sklearn.decomposition import PCA

    return PCA(n_components=2, svd_solver="full").fit(states.double().flatten(0, -2).numpy())


def project(axes: Any, states: torch.Tensor) -> torch.Tensor:
    """States `[..., hidden]` on principal axes: `[..., 2]`."""
    points = torch.from_numpy(axes.transform(states.double().flatten(0, -2).numpy()))
    return points.unflatten(0, states.shape[:-1])


def variance_fractions(states: torch.Tensor) -> dict[str, float]:
    """How the variance of `[questions, blocks, hidden]` divides: between blocks, between questions, and the rest of it.

    Two-way analysis of variance, summed over the hidden channels; the three fractions sum to 1.
    """
    values = states.double()
    centre = values.mean(dim=(0, 1), keepdim=True)
    total = (values - centre).square().sum()
    blocks = (values.mean(dim=0, keepdim=True) - centre).square().sum() * values.shape[0] / total
    questions = (values.mean(dim=1, keepdim=True) - centre).square().sum() * values.shape[1] / total
    fractions = {"blocks": float(blocks), "questions": float(questions)}
    return {**fractions, "both": 1.0 - sum(fractions.values())}
