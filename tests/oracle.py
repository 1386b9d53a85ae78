"""The slow, obvious computations that everything fast or parallel is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from rim_dist.attention.registration import use_plain_attention
from rim_dist.config import Recipe
from rim_dist.data.loader import BatchLoader, plan_stages
from rim_dist.data.rows import Readout
from rim_dist.model import build_model
from rim_dist.training.schedule import learning_rate
from rim_dist.training.trainer import prepare_run


def unrolled_loss(model: Any, question: Sequence[int], block: Sequence[int], readouts: Sequence[Readout]) -> torch.Tensor:
    """Weighted loss sum of one sample as separate plain causal runs [x, m_1 .. m_k, r_k], by an unmodified model."""
    total = torch.zeros(())
    for readout in readouts:
        prefix = [*question, *(list(block) * readout.block)]
        ids = torch.tensor([prefix + readout.target[:-1]])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1 :]
        total = total + readout.weight * F.cross_entropy(logits.float(), torch.tensor(readout.target), reduction="sum")
    return total


def row_readouts(row: Any) -> list[Readout]:
    """The readouts of a row, read back from its labels: what each block is asked and at which weight."""
    readouts = []
    for k in sorted({b for b, label in zip(row.block, row.label, strict=True) if label >= 0}):
        at = [i for i, label in enumerate(row.label) if label >= 0 and row.block[i] == k]
        readouts.append(Readout(k, [row.label[i] for i in at], row.weight[at[0]]))
    return readouts


def train_one_process(recipe: Recipe) -> list[tuple[float, float]]:
    """(loss, gradient norm) of every step by a bare loop: unrolled runs, one sample at a time, torch's AdamW, no DeepSpeed."""
    foundation, data = prepare_run(recipe)
    model = build_model(recipe, foundation)
    use_plain_attention(model)
    block = foundation.tokens.block
    results = []
    for plan in plan_stages(recipe, len(data)):
        section = recipe.curriculum.stage(plan.name)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=0.0,
            betas=(recipe.optimizer.beta1, recipe.optimizer.beta2),
            eps=recipe.optimizer.eps,
            weight_decay=0.0,
        )
        loader = BatchLoader(recipe, data, foundation.tokens, 0, 1)
        for step in range(plan.steps):
            rows = [(s, loader.row(plan, step, s)) for s in loader.step_samples(plan, step)]
            weight = sum(row.total_weight for _, row in rows)
            loss = torch.zeros(())
            for sample, row in rows:
                loss = loss + unrolled_loss(model, sample.question, block, row_readouts(row))
            loss = loss / weight
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.gradient_clipping or 1e9)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(section, step, plan.steps)
            optimizer.step()
            results.append((float(loss.detach()), float(norm)))
    return results
