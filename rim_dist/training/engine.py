"""The DeepSpeed engine as the trainer uses it: steps of weighted loss sums, an optimizer reset, the whole state to save."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rim_dist.checkpoint.portable import is_portable
from rim_dist.checkpoint.restore import restore_optimizer
from rim_dist.checkpoint.snapshot import Capture
from rim_dist.checkpoint.store import ENGINE
from rim_dist.config import Dropouts, OptimizerSection, Recipe
from rim_dist.data.packing import RowCost
from rim_dist.data.rows import Batch
from rim_dist.errors import CheckpointError
from rim_dist.model.dropout import set_dropout
from rim_dist.model.proof import dropout_kinds
from rim_dist.model.skeleton import parameter_groups
from rim_dist.objective.forward import run_batch
from rim_dist.objective.loss import ReadoutLoss
from rim_dist.parallel.collectives import all_reduce
from rim_dist.parallel.degrees import Mode
from rim_dist.parallel.launch import Process
from rim_dist.parallel.mesh import Coordinates, Degrees, Mesh, ModelParallelUnit
from rim_dist.parallel.ops import load_cpu_adam
from rim_dist.parallel.sequence import shard_row
from rim_dist.parallel.tensor import full_shape, slice_of
from rim_dist.parallel.zero import keep_no_gathered_weights, one_kind_of_shards
from rim_dist.unwrap import bare_model, base_layer


@contextmanager
def restricted_loading() -> Iterator[None]:
    """In this context torch unpickles only tensors and plain data, also for DeepSpeed, which would allow any object."""
    from collections import OrderedDict

    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    allowed = [OrderedDict, DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    finally:
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def build_optimizer(model: nn.Module, section: OptimizerSection, offload: bool) -> torch.optim.Optimizer:
    groups = parameter_groups(model, section.weight_decay)
    settings: dict[str, Any] = {"lr": 0.0, "betas": (section.beta1, section.beta2), "eps": section.eps}
    if offload:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        load_cpu_adam()
        return DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, fused=True, **settings)


class Engine:
    """A model under DeepSpeed. Losses are sums; the caller normalises them over the whole optimizer step."""

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        ds_config: dict[str, Any],
        process: Process,
        mesh: Mesh | None = None,
        sequence_mode: Mode = "ulysses",
    ) -> None:
        import deepspeed
        from deepspeed.utils import groups

        self._process = process
        self._mesh = mesh or Mesh(Degrees(data=process.ranks), process.rank, Coordinates(process.rank, 0, 0))
        self._sequence_mode = sequence_mode
        self._blocks = max(recipe.memory.blocks, recipe.curriculum.stage1.max_steps + 1)  # highest block of any readout
        self.row_cost = row_cost(model)
        offload = "offload_optimizer" in ds_config["zero_optimization"]
        optimizer = build_optimizer(model, recipe.optimizer, offload)
        unit = ModelParallelUnit(self._mesh) if self._mesh.degrees.tensor > 1 else None
        groups.mpu = unit  # otherwise DeepSpeed keeps that of an earlier engine
        with one_kind_of_shards():
            self._engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=ds_config, mpu=unit, dist_init_required=False
            )
        self._zero_stage = ds_config["zero_optimization"]["stage"]
        self._fp16 = recipe.model.dtype == "fp16"
        self._trust_remote_code = recipe.model.trust_remote_code
        self.operations = 0.0

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    def sequence_slice(self, batch: Batch) -> Batch:
        """This rank's slice of a micro-batch: all of it unless a sequence group shares the row."""
        return shard_row(batch, self._mesh, self._sequence_mode)

    def forward_backward(self, batch: Batch, scale: float, last: bool) -> ReadoutLoss:
        """Add the gradient of `scale` x the weighted loss sum of a micro-batch (`sequence_slice` of it).

        The engine averages gradients over its data ranks (data x sequence here). That is undone, so that the result is the
        gradient of the sum over all ranks. `last`: `step` follows.
        """
        self.operations += self.row_cost.of_batch(batch)
        batch = batch.to(self._process.device)
        self._engine.train()
        self._engine.set_gradient_accumulation_boundary(last)
        factor = scale * self._mesh.degrees.shards
        with keep_no_gathered_weights() if self._zero_stage == 3 else nullcontext():
            weighted_sum, token_losses = run_batch(self._engine, batch, gradient_scale=factor * self._loss_scale)
        # DeepSpeed scales the loss under ZeRO only; its fp16 optimizer without ZeRO divides by a scale that nobody put in.
        unscaled = self._fp16 and self._zero_stage == 0
        self._engine.backward(weighted_sum * (factor * self._loss_scale if unscaled else factor))
        return ReadoutLoss.of(weighted_sum.detach(), token_losses, batch.targets, self._blocks)

    @property
    def _loss_scale(self) -> float:
        """What DeepSpeed multiplies the loss by, so that gradients fit into fp16."""
        return float(self._engine.optimizer.loss_scale) if self._fp16 else 1.0

    def step(self, learning_rate: float) -> float:
        """Update the parameters; returns the gradient norm before clipping (0 if fp16 skipped the step)."""
        for group in self._inner_optimizer().param_groups:
            group["lr"] = learning_rate
        norm = None
        if self._zero_stage == 0:  # without ZeRO, DeepSpeed computes no norm unless it clips
            norm = total_norm(self.module, self._mesh) / self._loss_scale
        self._engine.step()
        if norm is None:
            norm = self._engine.get_global_grad_norm()
        skipped = norm is None or (self._fp16 and not math.isfinite(norm))
        return 0.0 if skipped else float(norm)

    def _inner_optimizer(self) -> torch.optim.Optimizer:
        optimizer = self._engine.optimizer
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        return optimizer

    def begin_stage(self, dropouts: Dropouts) -> None:
        """Clear the optimizer's moments and step count, and set the stage's dropouts."""
        for state in self._inner_optimizer().state.values():
            for name, value in state.items():
                if torch.is_tensor(value):
                    value.zero_()
                elif isinstance(value, int | float):
                    state[name] = 0
        self.set_dropout(dropouts)

    def set_dropout(self, dropouts: Dropouts) -> None:
        """Set the dropouts of a stage."""
        together = dropouts.attention == dropouts.residual
        config, trusted = bare_model(self.module).config, self._trust_remote_code
        set_dropout(self.module, dropouts, frozenset() if together else dropout_kinds(config, trusted)[0])

    def capture(self, folder: Path) -> dict[str, Any]:
        """This rank's shards, by the file names that DeepSpeed would write in `folder`. Writes nothing. Collective.

        The tensors are the engine's own, valid until the next step.
        """
        capture = Capture(folder)
        engine, own = self._engine, self._engine.checkpoint_engine
        engine._copy_recovery_script = lambda _: None  # zero_to_fp32.py; `rim-dist export` reads every kind of shard
        engine.checkpoint_engine = capture
        try:
            engine.save_checkpoint(str(folder), tag=ENGINE, save_latest=False)
        finally:
            engine.checkpoint_engine = own
        return capture.files

    def load(self, checkpoint: Path) -> None:
        """Restore what `capture` returned, at the same number of ranks, or a portable checkpoint at any. Collective."""
        if is_portable(checkpoint):
            restore_optimizer(checkpoint, self._engine, self._inner_optimizer(), self._zero_stage)
            return
        with restricted_loading():
            path, _ = self._engine.load_checkpoint(str(checkpoint), tag=ENGINE)
        if path is None:
            raise CheckpointError(f"{checkpoint}: the engine's shards cannot be read")


def total_norm(module: nn.Module, mesh: Mesh) -> torch.Tensor:
    """The gradient norm of the whole model, in fp32. Parameters that all tensor ranks have are counted once."""
    gradients = [p.grad for p in module.parameters() if p.grad is not None and (mesh.counts or slice_of(p) is not None)]
    norm = torch.nn.utils.get_total_norm([torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients])
    return all_reduce(norm.square(), mesh.tensor_group).sqrt() if mesh.tensor_group is not None else norm


def row_cost(model: nn.Module) -> RowCost:
    """Operations per token, supervised position and attended pair: 6 per trained weight, 4 per frozen one (it has no gradient),
    12 per pair and channel."""
    bare = bare_model(model)
    head = base_layer(bare.get_output_embeddings())
    embeddings = {id(base_layer(bare.get_input_embeddings()).weight), id(head.weight)}
    token = 0.0
    for parameter in model.parameters():
        shape = full_shape(parameter)
        if len(shape) >= 2 and id(parameter) not in embeddings:
            token += (6.0 if parameter.requires_grad else 4.0) * math.prod(shape)
    config = bare.config.get_text_config()
    width = config.num_attention_heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    return RowCost(
        token=token,
        target=(6.0 if head.weight.requires_grad else 4.0) * math.prod(full_shape(head.weight)),
        pair=12.0 * config.num_hidden_layers * width,
    )
