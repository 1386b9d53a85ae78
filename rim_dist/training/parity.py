"""Parity check on a tiny model: this family, split over these ranks, computes what the unsplit model computes.

The tensor parallel plan comes from transformers, and what ranks send depends on the launcher, the libraries and the network:
all of it is tested before anything large is built.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from rim_dist.attention.kernels import proof_kernel
from rim_dist.attention.registration import use_rim_attention
from rim_dist.data.rows import Batch, pack
from rim_dist.errors import ModelError
from rim_dist.model.proof import tiny_config, tiny_model, tiny_row
from rim_dist.objective.forward import install_readout_loss, run_batch
from rim_dist.parallel.collectives import all_reduce
from rim_dist.parallel.degrees import Mode
from rim_dist.parallel.mesh import Mesh
from rim_dist.parallel.sequence import shard_row
from rim_dist.parallel.tensor import TensorRank, slice_of, split_model, sum_shared_gradients

_TOLERANCE = 1e-3  # a missing sum or a wrong factor is off by the order of 1; fp32 rounding by 1e-6, TF32's by 1e-4


@dataclass(frozen=True)
class Parity:
    """Largest differences from the unsplit model: of the loss (relative), of a gradient (against the model's largest entry)."""

    loss: float
    gradient: float


def check_parity(
    config: PretrainedConfig, mesh: Mesh, mode: Mode, kernel: str, device: str, trust_remote_code: bool = False
) -> Parity:
    """Compare loss and gradients of a tiny model of the family, split over the mesh, with the same model unsplit. Collective.

    Raises ModelError on every rank if they differ by more than rounding explains.
    """
    tensor, sequence = mesh.degrees.tensor, mesh.degrees.sequence
    small = tiny_config(config, tensor, sequence if mode == "ulysses" else 1)
    full = tiny_model(small, trust_remote_code).to(device)
    split = copy.deepcopy(full)
    if tensor > 1:
        split_model(split, TensorRank(mesh.coordinates.tensor, tensor, mesh.tensor_group))
        sum_shared_gradients(split)
    row, block = tiny_row()
    batch = pack([row, row], block)
    kernel = proof_kernel(kernel)
    expected = _loss(full, batch.to(device), kernel)
    found = all_reduce(_loss(split, shard_row(batch, mesh, mode).to(device), kernel), mesh.sequence_group)
    wanted = {name: p.grad for name, p in full.named_parameters() if p.grad is not None}
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    worst = torch.zeros(2, dtype=torch.float64, device=device)
    worst[0] = (found - expected).abs() / expected.abs()
    for name, parameter in split.named_parameters():
        gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
        all_reduce(gradient, mesh.sequence_group)
        own = slice_of(parameter)
        target = wanted.get(name, torch.zeros(()))
        difference = gradient - (target.to(device) if own is None else own.of(target))
        worst[1] = torch.maximum(worst[1], difference.abs().max() / largest)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    result = Parity(*worst.tolist())
    if not max(result.loss, result.gradient) < _TOLERANCE:  # not a number is a difference too
        raise ModelError(
            f"model family {config.model_type}: a tiny model of it split over parallel.tensor {tensor} and parallel.sequence "
            f"{sequence} ({mode}) differs from the same model whole (loss {result.loss:.1e}, gradients {result.gradient:.1e}); "
            "use parallel.tensor 1 or parallel.sequence 1"
        )
    return result


def _loss(model: PreTrainedModel, batch: Batch, kernel: str) -> torch.Tensor:
    """The loss sum of a batch; its gradients stay in the model."""
    use_rim_attention(model, kernel)
    install_readout_loss(model)
    loss, _ = run_batch(model, batch)
    loss.backward()
    return loss.detach()
