"""Collectives that know their gradients: what tensor and sequence parallelism send."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def all_reduce(tensor: torch.Tensor, group: Any, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum (or another `op`) over a group, in place; the tensor itself for a group of one."""
    if group is not None and tensor.numel():
        dist.all_reduce(tensor, op=op, group=group)
    return tensor


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format), ctx.group), None


def copy_to_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """What every rank has, going into parts that differ by rank: its gradients are summed."""
    return tensor if group is None else _Copy.apply(tensor, group)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:  # noqa: ARG004 - autograd's signature
        return all_reduce(tensor.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ARG004
        return gradient, None


def reduce_from_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of parts that differ by rank, going on where every rank computes the same."""
    return tensor if group is None else _Sum.apply(tensor, group)


def _own_part(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    return tensor.chunk(dist.get_world_size(group), dim=-1)[dist.get_rank(group)].contiguous()


def _all_parts(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=-1)


class _JoinFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _all_parts(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _own_part(gradient, ctx.group), None


def gather_from_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """Parts of the last dimension put together on every rank, where all compute the same from then on."""
    return tensor if group is None else _JoinFeatures.apply(tensor, group)


class _OwnFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return _own_part(tensor, group)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_parts(gradient, ctx.group), None


def scatter_to_group(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """This rank's part of the last dimension of what every rank has."""
    return tensor if group is None else _OwnFeatures.apply(tensor, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        result = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        dist.all_to_all_single(result, tensor.contiguous(), group=group)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(gradient, ctx.group), None


def all_to_all(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """All-to-all along the first dimension, which has an entry for each rank: entry r goes to rank r."""
    return _Exchange.apply(tensor, group)


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        ranks = dist.get_world_size(group)
        result = torch.empty((ranks * tensor.shape[0], *tensor.shape[1:]), dtype=tensor.dtype, device=tensor.device)
        dist.all_gather_into_tensor(result, tensor.contiguous(), group=group)
        return result.unflatten(0, (ranks, -1))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        result = torch.empty(gradient.shape[1:], dtype=gradient.dtype, device=gradient.device)
        dist.reduce_scatter_tensor(result, gradient.flatten(0, 1).contiguous(), group=ctx.group)
        return result, None


def gather_shards(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """`[ranks, *shape]`: the tensor of every rank, used differently by each; gradients go back summed."""
    return _GatherSequence.apply(tensor, group)
