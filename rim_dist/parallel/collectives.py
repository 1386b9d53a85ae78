"""Collectives with gradients, for tensor and sequence parallelism. A group of None is a group of one rank: nothing is sent.

In Megatron's words: `copy_to_group` and `reduce_from_group` are f and g; `scatter_to_group` and `gather_from_group` act on the
last dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

Function = Callable[[torch.Tensor, Any], torch.Tensor]


class _Collective(torch.autograd.Function):
    """One function of tensor and group forward, another one backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any, forward: Function, backward: Function) -> torch.Tensor:
        ctx.group, ctx.function = group, backward
        return forward(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return ctx.function(gradient, ctx.group), None, None, None


def all_reduce(tensor: torch.Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Sum (or another `op`) over a group, in place and without a gradient."""
    if group is not None and tensor.numel():
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


def _identity(tensor: torch.Tensor, _group: Any) -> torch.Tensor:
    return tensor.view_as(tensor)


def summed(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """A copy, summed over a group; without a gradient."""
    return all_reduce(tensor.clone(memory_format=torch.contiguous_format), group)


def copy_to_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The tensor itself, the same on every rank, before ranks use it differently: its gradients are summed."""
    return tensor if group is None else _Collective.apply(tensor, group, _identity, summed)


def reduce_from_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of tensors that differ by rank, before every rank computes the same with it."""
    return tensor if group is None else _Collective.apply(tensor, group, summed, _identity)


def _chunk(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    return tensor.chunk(dist.get_world_size(group), dim=-1)[dist.get_rank(group)].contiguous()


def _concatenate(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    chunks = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(chunks, tensor.contiguous(), group=group)
    return torch.cat(chunks, dim=-1)


def gather_from_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The ranks' tensors concatenated along the last dimension, before every rank computes the same with them."""
    return tensor if group is None else _Collective.apply(tensor, group, _concatenate, _chunk)


def scatter_to_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """This rank's chunk, along the last dimension, of a tensor that is the same on every rank."""
    return tensor if group is None else _Collective.apply(tensor, group, _chunk, _concatenate)


def _all_to_all(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    dist.all_to_all_single(result, tensor.contiguous(), group=group)
    return result


def all_to_all(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """All-to-all along the first dimension, which has an entry for each rank: entry r goes to rank r."""
    return _Collective.apply(tensor, group, _all_to_all, _all_to_all)


def _all_gather(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    ranks = dist.get_world_size(group)
    result = tensor.new_empty((ranks * tensor.shape[0], *tensor.shape[1:]))
    dist.all_gather_into_tensor(result, tensor.contiguous(), group=group)
    return result.unflatten(0, (ranks, -1))


def _reduce_scatter(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    result = tensor.new_empty(tensor.shape[1:])
    dist.reduce_scatter_tensor(result, tensor.flatten(0, 1).contiguous(), group=group)
    return result


def gather_shards(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """`[ranks, *shape]`: the tensor of every rank, used differently by each; gradients go back summed."""
    return _Collective.apply(tensor, group, _all_gather, _reduce_scatter)
