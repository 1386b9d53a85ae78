"""Runs cases of the parallel matrix one after the other in one process group; the first rank writes what they differ by."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import torch.distributed as dist
from parallel_matrix import LAYOUTS, Case, Difference, case_recipe

from rim_dist.checkpoint.start import model_of
from rim_dist.config import Dropouts
from rim_dist.data.loader import BatchLoader, plan_stages
from rim_dist.parallel.degrees import fit_degrees
from rim_dist.parallel.launch import Process, join, leave
from rim_dist.parallel.mesh import Mesh, make_mesh
from rim_dist.parallel.tensor import slice_of
from rim_dist.parallel.zero import compose, partitioner
from rim_dist.training.engine import Engine
from rim_dist.training.schedule import learning_rate
from rim_dist.training.trainer import prepare_run


def own(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """The part of a reference tensor that this tensor rank has."""
    split = slice_of(parameter)
    return whole if split is None else split.of(whole)


def whole_sum(value: torch.Tensor, parameter: torch.Tensor, mesh: Mesh) -> float:
    """A sum of squares over the whole parameter."""
    total = value.detach().double().square().sum()
    if slice_of(parameter) is not None:
        dist.all_reduce(total, group=mesh.tensor_group)
    return float(total)


def run_case(case: Case, folder: Path, process: Process) -> Difference:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    recipe = case_recipe(case, folder)
    reference: dict[str, Any] = torch.load(folder / f"{case.reference}.pt", weights_only=True)
    requirements, data = prepare_run(recipe)
    mesh = make_mesh(fit_degrees(recipe, process.ranks), process.rank, "cpu")
    ds_config = compose(recipe, requirements.hidden_size)
    model = model_of(recipe, requirements, None, mesh, partitioner(ds_config, mesh, torch.float32))
    engine = Engine(recipe, model, ds_config, process, mesh, requirements.sequence_mode)
    engine.begin_stage(Dropouts())
    loader = BatchLoader(recipe, data, requirements.tokens, mesh.coordinates.data, mesh.degrees.data, engine.row_cost)
    (plan,) = plan_stages(recipe, len(data))
    loss_off = norm_off = gradient_off = 0.0
    for step in range(plan.steps):
        rank_batch = loader.rank_batch(plan, step)
        weight = torch.tensor(rank_batch.weight / mesh.degrees.sequence if mesh.counts else 0.0, dtype=torch.float64)
        dist.all_reduce(weight)
        total = torch.zeros((), dtype=torch.float64)
        assert step or len(rank_batch.micro_batches) > 1, "no accumulation"
        for number, batch in enumerate(rank_batch.micro_batches):
            last = number == len(rank_batch.micro_batches) - 1
            total += engine.forward_backward(engine.sequence_slice(batch), 1.0 / float(weight), last).weighted_sum.double()
        total *= mesh.counts
        dist.all_reduce(total)
        expected_loss, expected_norm = reference["steps"][step]
        loss_off = max(loss_off, abs(float(total / weight) / expected_loss - 1))
        if step == 0:
            largest = max(float(g.abs().max()) for g in reference["gradients"].values())
            for name, parameter in engine.module.named_parameters():
                if parameter.requires_grad:
                    gradient = safe_get_full_grad(parameter)
                    wanted = own(parameter, reference["gradients"][name])
                    gradient_off = max(gradient_off, float((gradient - wanted).abs().max()) / largest)
        norm = engine.step(learning_rate(recipe.curriculum.stage(plan.name), step, plan.steps))
        norm_off = max(norm_off, abs(norm / expected_norm - 1))
    weights_off = 0.0
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            wanted = own(parameter, reference["weights"][name])
            got = safe_get_full_fp32_param(parameter)
            change = whole_sum(got - wanted, parameter, mesh) / whole_sum(wanted, parameter, mesh)
            weights_off = max(weights_off, change**0.5)
    worst = torch.tensor([loss_off, norm_off, gradient_off, weights_off], dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return Difference(*worst.tolist())


if __name__ == "__main__":
    process = join(300)
    todo, done = (Path(a) for a in sys.argv[1:3])
    results = []
    for fields in json.loads(todo.read_text()):
        case = Case(**fields)
        assert LAYOUTS[case.layout].ranks == process.ranks
        difference = run_case(case, todo.parent, process)
        if process.is_first:
            print(case, difference, flush=True)
        results.append(asdict(difference))
    if process.is_first:
        done.write_text(json.dumps(results))
    leave()
