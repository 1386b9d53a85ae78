"""The loss: weighted cross-entropy at supervised positions only, divided once for the whole step.

Logits exist for a bounded number of positions at a time. Each chunk's gradient is computed right after its logits, so that
nothing of vocabulary size is kept or computed twice for the backward pass.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from rim_dist.data.rows import Targets
from rim_dist.limits import LOGITS_ENTRIES
from rim_dist.parallel.collectives import all_reduce, copy_to_group, gather_from_group
from rim_dist.parallel.tensor import Vocabulary


@dataclass(frozen=True)
class LogitRule:
    """What a family applies to its head's output: `cap x tanh(scale x logits / cap)`, without a cap `scale x logits`."""

    scale: float = 1.0
    softcap: float | None = None

    @staticmethod
    def of(config: Any) -> LogitRule:
        """The rule in a transformers config (Cohere, Granite, Gemma 2 and 3); `prove_family` proves it right."""
        config = config.get_text_config()
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        return LogitRule(scale, getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class HeadWeights:
    """An output head `[vocabulary, hidden]` with its bias. `rows`, if given, replace its rows `row_ids`.

    `vocabulary`: weight and bias are this tensor rank's shard of the head; `rows` is whole on every rank.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    rows: torch.Tensor | None = None
    row_ids: tuple[int, ...] = ()
    vocabulary: Vocabulary | None = None

    @functools.cached_property
    def replaced(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(indices in `rows`, indices in `weight`) of the rows of this rank's shard that `rows` replace."""
        ids = torch.tensor(self.row_ids, device=self.weight.device, dtype=torch.long)
        if self.vocabulary is None:
            return torch.arange(len(ids), device=ids.device), ids
        local, here = self.vocabulary.local(ids)
        return here.nonzero().squeeze(1), local[here]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[..., rows of this rank's shard]`."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.rows is not None:
            which, at = self.replaced
            bias = None if self.bias is None else self.bias[at]
            logits.index_copy_(-1, at, F.linear(hidden, self.rows[which], bias))
        return logits


def full_logits(hidden: torch.Tensor, head: HeadWeights) -> torch.Tensor:
    """`[..., vocabulary]` on every rank of the tensor group, as decoding needs them."""
    vocabulary = head.vocabulary
    assert vocabulary is not None
    logits = head.logits(copy_to_group(hidden, vocabulary.group))
    return gather_from_group(logits, vocabulary.group)[..., : vocabulary.size]


@dataclass(frozen=True)
class ReadoutLoss:
    """Losses of one micro-batch, on the model's device.

    `weighted_sum`: sum of weight x token loss. `token_losses` `[targets]`: unweighted. `by_block` `[4, blocks + 1]`: for each
    block (0: targets without blocks) sum and number of the unweighted token losses, then of those of the steps' first tokens.
    """

    weighted_sum: torch.Tensor
    token_losses: torch.Tensor
    by_block: torch.Tensor

    @staticmethod
    def of(weighted_sum: torch.Tensor, token_losses: torch.Tensor, targets: Targets, blocks: int) -> ReadoutLoss:
        """From the weighted sum and every token's loss `[targets]`."""
        real = targets.weight > 0  # a dummy row has losses, but they are not the step's
        sums = torch.zeros(4, blocks + 1, dtype=torch.float32, device=token_losses.device)
        for row, chosen in ((0, real), (2, real & targets.opens_step)):
            sums[row].index_add_(0, targets.block, token_losses * chosen)
            sums[row + 1].index_add_(0, targets.block, chosen.to(token_losses.dtype))
        return ReadoutLoss(weighted_sum, token_losses, sums)


def weighted_cross_entropy(
    hidden: torch.Tensor, head: HeadWeights, rule: LogitRule, targets: Targets, gradient_scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of weight x token loss, every token's loss without gradient) from `hidden` `[targets, hidden]`, in fp32.

    `gradient_scale`: the gradient that the backward pass will get (loss scale x normalisation). It is multiplied in before
    gradients are rounded to the model's precision, so that small ones survive in half precision.
    """
    if (losses := _fused_kernel(hidden, head, rule, targets)) is not None:
        return (losses * targets.weight).sum(), losses.detach()
    with_gradient = torch.is_grad_enabled()
    return _ChunkedLoss.apply(hidden, head.weight, head.bias, head.rows, head, rule, targets, gradient_scale, with_gradient)


def plain_cross_entropy(logits: torch.Tensor, rule: LogitRule, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """The same from a head's output `[targets, vocabulary]`, for heads that `HeadWeights` cannot describe."""
    logits = logits * rule.scale
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    losses = F.cross_entropy(logits.float(), targets.label, reduction="none")
    return (losses * targets.weight).sum(), losses.detach()


def _fused_kernel(hidden: torch.Tensor, head: HeadWeights, rule: LogitRule, targets: Targets) -> torch.Tensor | None:
    """Token losses by cut-cross-entropy. None where it is not installed or does not apply: CUDA, half precision, no bias."""
    if not hidden.is_cuda or hidden.dtype == torch.float32 or not (head.rows is head.bias is head.vocabulary is None):
        return None
    try:
        from cut_cross_entropy import linear_cross_entropy  # type: ignore[import-not-found]
    except ImportError:
        return None
    # Its default leaves out small parts of the gradient; without the filter it is exact.
    return linear_cross_entropy(
        hidden * rule.scale, head.weight, targets.label, softcap=rule.softcap, reduction="none", filter_eps=None
    )


def _apply_rule(logits: torch.Tensor, rule: LogitRule) -> torch.Tensor | None:
    """Apply a family's rule to logits in place. Returns the slope of the softcap, if there is one."""
    if rule.scale != 1:
        logits *= rule.scale
    if rule.softcap is None:
        return None
    logits.div_(rule.softcap).tanh_()
    slope = 1 - logits.float().square()
    logits *= rule.softcap
    return slope


class _Gradients:
    """Gradients of hidden states and of the head's weight, bias and rows, summed chunk by chunk.

    `wanted`: which of the four. Without supervised positions they are zeros: under ZeRO all ranks reduce gradients. `in_fp32`:
    the sums over chunks are kept in fp32 and rounded to the model's precision once, at the end.
    """

    def __init__(self, wanted: list[bool], hidden: torch.Tensor, head: HeadWeights, in_fp32: bool) -> None:
        self._hidden, self._head = hidden, head
        self._d_hidden = torch.zeros_like(hidden) if wanted[0] else None
        self._d_weight, self._d_bias, self._d_rows = (
            torch.zeros_like(t, dtype=torch.float32 if in_fp32 else None) if need and t is not None else None
            for need, t in zip(wanted[1:], (head.weight, head.bias, head.rows), strict=True)
        )

    def add(self, chunk: slice, d_logits: torch.Tensor) -> None:
        """Add the gradients of a chunk of positions, given that of its logits."""
        h, head, rows = self._hidden[chunk], self._head, self._head.rows
        which, at = head.replaced
        if self._d_hidden is not None:
            torch.mm(d_logits, head.weight, out=self._d_hidden[chunk])
            if rows is not None:
                self._d_hidden[chunk] += d_logits[:, at] @ (rows[which] - head.weight[at])
        if self._d_weight is not None:
            _add_product(self._d_weight, (d_logits if rows is None else d_logits.index_fill(1, at, 0)).T, h)
        if self._d_bias is not None:
            self._d_bias += d_logits.sum(dim=0, dtype=self._d_bias.dtype)
        if self._d_rows is not None:
            self._d_rows[which] += d_logits[:, at].T.to(self._d_rows.dtype) @ h.to(self._d_rows.dtype)

    def reduced(self, group: Any) -> tuple[torch.Tensor | None, ...]:
        """All four. Those that are partial sums on tensor ranks are summed over the group."""
        for partial in (self._d_hidden, self._d_rows):
            if partial is not None:
                all_reduce(partial, group)
        dtype = self._hidden.dtype
        return tuple(t if t is None else t.to(dtype) for t in (self._d_hidden, self._d_weight, self._d_bias, self._d_rows))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, with the product in the precision of `total`."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cpu":
        total.addmm_(left.to(total.dtype), right.to(total.dtype))
    else:  # GPUs add products of 16-bit matrices up in fp32 and can leave the sum there; not seen on a GPU yet
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


class _ChunkedLoss(torch.autograd.Function):
    """Forward computes the gradients as well; backward only returns them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        _weight: torch.Tensor,  # with bias and rows, those of `head`: arguments, so that autograd asks for their gradients
        _bias: torch.Tensor | None,
        _rows: torch.Tensor | None,
        head: HeadWeights,
        rule: LogitRule,
        targets: Targets,
        gradient_scale: float,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wanted = [with_gradient and need for need in ctx.needs_input_grad[:4]]
        size = max(1, LOGITS_ENTRIES[hidden.device.type] // head.weight.shape[0])
        gradients = _Gradients(wanted, hidden, head, in_fp32=hidden.shape[0] > size)
        group = None if head.vocabulary is None else head.vocabulary.group
        count = hidden.shape[0]
        losses = torch.empty(count, dtype=torch.float32, device=hidden.device)
        for start in range(0, count, size):
            chunk = slice(start, min(start + size, count))
            logits = head.logits(hidden[chunk])
            slope = _apply_rule(logits, rule)
            log_p, label, here = _log_softmax(logits.float(), targets.label[chunk], head.vocabulary)
            del logits
            losses[chunk] = -all_reduce(torch.where(here, log_p.gather(1, label[:, None]).squeeze(1), 0.0), group)
            if not any(wanted):
                continue
            # d loss / d logits = softmax - one-hot
            d_logits = log_p.exp_()
            d_logits.scatter_add_(1, label[:, None], -here[:, None].to(d_logits.dtype))
            d_logits *= (targets.weight[chunk, None] * (gradient_scale * rule.scale)).to(d_logits.dtype)
            if slope is not None:
                d_logits *= slope
            gradients.add(chunk, d_logits.to(hidden.dtype))
        ctx.gradients, ctx.gradient_scale = gradients.reduced(group), gradient_scale
        ctx.mark_non_differentiable(losses)
        return (losses * targets.weight).sum(), losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = gradient / ctx.gradient_scale
        gradients = [None if g is None else g.mul_(factor.to(g.dtype)) for g in ctx.gradients]
        ctx.gradients = ()
        return (*gradients, None, None, None, None, None)


def _log_softmax(
    logits: torch.Tensor, label: torch.Tensor, vocabulary: Vocabulary | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities over the vocabulary of all ranks: (those of this rank's columns, the label's column, if it is here).

    Columns of padding rows get -inf: they are not tokens.
    """
    if vocabulary is None:
        return torch.log_softmax(logits, dim=1), label, torch.ones_like(label, dtype=torch.bool)
    logits[:, vocabulary.real :] = -torch.inf
    largest = all_reduce(logits.amax(dim=1), vocabulary.group, dist.ReduceOp.MAX)
    logits -= largest[:, None]
    total = all_reduce(logits.exp().sum(dim=1), vocabulary.group)
    return (logits.sub_(total.log_()[:, None]), *vocabulary.local(label))
