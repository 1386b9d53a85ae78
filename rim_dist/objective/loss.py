"""The loss: weighted cross-entropy at supervised positions only, divided once for the whole step.

Logits exist for a bounded number of positions at a time. Each chunk's gradient is taken as soon as its logits are there,
so that nothing of vocabulary size is kept or computed twice for the backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from rim_dist.data.rows import Targets

LOGITS_ENTRIES = 1 << 25  # logits of one chunk: 128 MiB in fp32


@dataclass(frozen=True)
class LogitRule:
    """What a family does to its head's output: `cap x tanh(scale x logits / cap)`, without a cap `scale x logits`."""

    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(config: Any) -> LogitRule:
        """The rule in a transformers config (Cohere, Granite, Gemma 2 and 3); `probe_family` proves it right."""
        config = config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        return LogitRule(scale, getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class HeadWeights:
    """An output head `[vocabulary, hidden]` with its bias; `rows`, if given, stand in for its rows `row_ids`."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    row_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class ReadoutLoss:
    """Sums of one micro-batch, on the model's device.

    `weighted_sum` (scalar, with gradient): sum of weight x token loss. `block_sums`, `block_counts` (`[blocks + 1]`, no
    gradient): unweighted token losses and their number by block; block 0 is a target without blocks. `token_losses`
    `[targets]`: every one, unweighted.
    """

    weighted_sum: torch.Tensor
    token_losses: torch.Tensor
    block_sums: torch.Tensor
    block_counts: torch.Tensor

    @staticmethod
    def of(weighted_sum: torch.Tensor, token_losses: torch.Tensor, targets: Targets, blocks: int) -> ReadoutLoss:
        """From the weighted sum and every token's loss `[targets]`."""
        sums = torch.zeros(blocks + 1, dtype=torch.float32, device=token_losses.device)
        counts = torch.zeros_like(sums)
        # A weightless row fills a place on a rank; its losses are not part of the step.
        real = (targets.weight > 0).to(token_losses.dtype)
        sums.index_add_(0, targets.block, token_losses * real)
        counts.index_add_(0, targets.block, real)
        return ReadoutLoss(weighted_sum, token_losses, sums, counts)


def weighted_cross_entropy(
    hidden: torch.Tensor, head: HeadWeights, rule: LogitRule, targets: Targets, gradient_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weight x token loss, every token's loss without gradient) from `hidden` `[targets, hidden]`, in fp32.

    `gradient_scale`: the factor that the backward pass will bring (loss scale, normalisation). Gradients are rounded to the
    model's precision with it already in, so that small ones survive in half precision.
    """
    if (losses := _fused_kernel(hidden, head, rule, targets)) is not None:
        return (losses * targets.weight).sum(), losses.detach()
    with_gradient = torch.is_grad_enabled()
    return _ChunkedLoss.apply(
        hidden, head.weight, head.bias, head.rows, head.row_ids, rule, targets, gradient_scale, with_gradient
    )


def plain_cross_entropy(logits: torch.Tensor, rule: LogitRule, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from a head's output `[targets, vocabulary]`, for heads whose weights are not at hand."""
    logits = logits * rule.scale
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    losses = F.cross_entropy(logits.float(), targets.label, reduction="none")
    return (losses * targets.weight).sum(), losses.detach()


def _fused_kernel(hidden: torch.Tensor, head: HeadWeights, rule: LogitRule, targets: Targets) -> torch.Tensor | None:
    """Token losses by cut-cross-entropy, where it is installed and computes this: CUDA, half precision, a head without bias."""
    if not hidden.is_cuda or hidden.dtype == torch.float32 or head.rows is not None or head.bias is not None:
        return None
    try:
        from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]
    except ImportError:
        return None
    # Its default leaves out small parts of the gradient; without the filter it is exact.
    return linear_cross_entropy(
        hidden * rule.scale, head.weight, targets.label, softcap=rule.softcap, reduction="none", filter_eps=None
    )


class _ChunkedLoss(torch.autograd.Function):
    """Forward computes the gradients as well; backward only hands them on."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor | None,
        row_ids: tuple[int, ...],
        rule: LogitRule,
        targets: Targets,
        gradient_scale: float,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = [with_gradient and need for need in ctx.needs_input_grad[:4]]
        # Without supervised positions there are still gradients, of value 0: under ZeRO every rank takes part.
        d_hidden, d_weight, d_bias, d_rows = (
            torch.zeros_like(t) if need and t is not None else None
            for need, t in zip(wanted, (hidden, weight, bias, rows), strict=True)
        )
        ids = torch.tensor(row_ids, device=hidden.device, dtype=torch.long)
        count, vocabulary = hidden.shape[0], weight.shape[0]
        losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        size = max(1, LOGITS_ENTRIES // vocabulary)
        for start in range(0, count, size):
            at = slice(start, min(start + size, count))
            h, label = hidden[at], targets.label[at, None]
            logits = F.linear(h, weight, bias)
            if rows is not None:
                logits[:, ids] = F.linear(h, rows, None if bias is None else bias[ids])
            if rule.scale != 1:
                logits *= rule.scale
            if rule.softcap is not None:
                logits = logits.div_(rule.softcap).tanh_()
                slope = 1 - logits.float().square()
                logits *= rule.softcap
            log_p = torch.log_softmax(logits.float(), dim=1)
            del logits
            losses[at] = -log_p.gather(1, label).squeeze(1)
            if not any(wanted):
                continue
            # d loss / d logits = softmax - one-hot
            d_logits = log_p.exp_()
            d_logits.scatter_add_(1, label, torch.full_like(label, -1, dtype=d_logits.dtype))
            d_logits *= (targets.weight[at, None] * (gradient_scale * rule.scale)).to(d_logits.dtype)
            if rule.softcap is not None:
                d_logits *= slope
            d_logits = d_logits.to(hidden.dtype)
            if d_hidden is not None:
                torch.mm(d_logits, weight, out=d_hidden[at])
                if rows is not None:
                    d_hidden[at] += d_logits[:, ids] @ (rows - weight[ids])
            if d_weight is not None:
                if rows is not None:
                    d_weight.addmm_(d_logits.index_fill(1, ids, 0).T, h)
                else:
                    d_weight.addmm_(d_logits.T, h)
            if d_bias is not None:
                d_bias += d_logits.sum(dim=0)
            if d_rows is not None:
                d_rows.addmm_(d_logits[:, ids].T, h)
        ctx.gradients, ctx.gradient_scale = (d_hidden, d_weight, d_bias, d_rows), gradient_scale
        ctx.mark_non_differentiable(losses)
        return (losses * targets.weight).sum(), losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = gradient / ctx.gradient_scale
        gradients = [None if g is None else g.mul_(factor.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = ()
        return (*gradients, None, None, None, None, None)
