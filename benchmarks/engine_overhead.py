"""What the engine costs: ZeRO-3 on 2 ranks against torch's FSDP2, and every ZeRO stage on one rank against a bare loop.

    python benchmarks/engine_overhead.py [--quick]

A whole optimizer step (forward, backward, clipping, AdamW) of a Llama of SmolLM2-135M's shape in fp32, on packed rows with
GSM8K's lengths. Both sides have the same model, attention, loss, batch, optimizer and cores, and take turns step by step in
one process group. The engine is the trainer's own: `Engine` with `ds_configs/` as they are shipped.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import ROOT, SMOLLM2_135M, publish, real_rows

from rim_dist.checkpoint.start import model_of, requirements_of
from rim_dist.config import Dropouts, Recipe
from rim_dist.data.rows import Batch, pack
from rim_dist.model.requirements import Requirements
from rim_dist.objective.forward import run_batch
from rim_dist.recipe import validate_recipe
from rim_dist.table import Table

FLOORS = {"fsdp": 1.05, "bare": 1.1}
TOKENS = 2_048  # of an optimizer step, at least, over all ranks
Step = Callable[[], Any]


def recipe_of(folder: str, zero: int, quick: bool) -> Recipe:
    size = {"num_hidden_layers": 4, "vocab_size": 8192} if quick else {"vocab_size": 49_152}
    return validate_recipe(
        {
            "run": {"name": "overhead", "output_dir": folder},
            "model": {"config": {"model_type": "llama", **SMOLLM2_135M, **size}, "tokenizer": "synthetic"},
            "memory": {"blocks": 8},
            "data": {"synthetic": {"samples": 8}},
            "curriculum": {"stage2": {"samples": 8}},
            "parallel": {"zero_stage": zero},
        },
        "overhead",
    )


def rank_batch(requirements: Requirements, rank: int, ranks: int) -> tuple[Batch, float]:
    """A rank's rows and the weight of the whole step."""
    block = requirements.tokens.block
    rows = real_rows(64, "stage2", 8, len(block), 128, seed=1)
    while sum(map(len, rows[:-ranks])) >= TOKENS:
        rows = rows[:-ranks]
    return pack(rows[rank::ranks], block), sum(row.total_weight for row in rows)


def engine_step(recipe: Recipe, requirements: Requirements, process: Any) -> Step:
    from rim_dist.parallel.degrees import fit_degrees
    from rim_dist.parallel.mesh import make_mesh
    from rim_dist.parallel.zero import compose, partitioner
    from rim_dist.training.engine import Engine

    mesh = make_mesh(fit_degrees(recipe, process.ranks), process.rank, "cpu")
    ds_config = compose(recipe, requirements.hidden_size)
    model = model_of(recipe, requirements, None, mesh, partitioner(ds_config, mesh, torch.float32))
    engine = Engine(recipe, model, ds_config, process, mesh)
    engine.begin_stage(Dropouts())
    batch, weight = rank_batch(requirements, process.rank, process.ranks)

    def step() -> float:
        loss = engine.forward_backward(batch, 1.0 / weight, last=True).weighted_sum
        engine.step(1e-4)
        return float(loss)

    return step


def plain_step(recipe: Recipe, requirements: Requirements, process: Any, fsdp: bool) -> Step:
    """The loop a user writes: FSDP2 with a group a layer, or one model on one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from rim_dist.training.engine import build_optimizer

    model = model_of(recipe, requirements)
    if fsdp:
        mesh = init_device_mesh("cpu", (process.ranks,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer(model, recipe.optimizer, offload=False)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    batch, weight = rank_batch(requirements, process.rank, process.ranks)
    factor = process.ranks / weight  # FSDP averages over ranks

    def step() -> float:
        loss = run_batch(model, batch.to("cpu"), gradient_scale=factor)[0]  # a layout of its own, as every step has
        (loss * factor).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.gradient_clipping)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def in_turns(candidates: dict[str, Step], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every measured step of the slowest rank; two to warm up (ZeRO-3 prefetches from the second one on).

    Which comes first changes from round to round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    losses: dict[str, float] = {}
    for number in range(warmup + rounds):
        for name in list(candidates) if number % 2 else reversed(candidates):
            gc.collect()
            dist.barrier()
            start = time.perf_counter()
            losses[name] = candidates[name]()
            taken = torch.tensor(time.perf_counter() - start, dtype=torch.float64)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if number >= warmup:
                seconds[name].append(float(taken))
    first, *others = losses.values()
    assert all(abs(loss / first - 1) < 1e-4 for loss in others), losses  # they train the same
    return seconds


def on_a_rank(kind: str, zero: int, rounds: int, quick: bool) -> dict[str, Any]:
    from rim_dist.parallel.launch import join, leave

    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(folder, zero, quick)
        requirements = requirements_of(recipe)
    process = join(600)
    candidates = {
        kind: plain_step(recipe, requirements, process, fsdp=kind == "fsdp"),
        "engine": engine_step(recipe, requirements, process),
    }
    seconds = in_turns(candidates, rounds)
    tokens = torch.tensor(rank_batch(requirements, process.rank, process.ranks)[0].tokens)
    dist.all_reduce(tokens)
    threads = torch.get_num_threads()
    leave()
    return {"seconds": seconds, "tokens": int(tokens), "threads": threads}


def on_ranks(ranks: int, *job: object) -> dict[str, Any]:
    torchrun = str(Path(sys.executable).parent / "torchrun")
    command = [torchrun, "--standalone", "--nproc_per_node", str(ranks), __file__, "--rank", *map(str, job)]
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-4000:])
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="4 layers, 8k tokens of vocabulary, 4 rounds, nothing written")
    parser.add_argument("--only", help="fsdp or bare, nothing written")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        kind, zero, rounds, quick = options.rank
        found = on_a_rank(kind, int(zero), int(rounds), quick == "True")
        if os.environ["RANK"] == "0":
            print(json.dumps(found))
        return
    cases = [("fsdp", 2, 3), *(("bare", 1, zero) for zero in range(4))]
    figures, lines = {}, []
    for kind, ranks, zero in cases:
        if options.only not in (None, kind):
            continue
        rounds = 4 if options.quick else 8 if kind == "fsdp" else 5
        found = on_ranks(ranks, kind, zero, rounds, options.quick)
        medians = {name: statistics.median(values) for name, values in found["seconds"].items()}
        found["ratio"] = medians["engine"] / medians[kind]
        against = "FSDP2, a group a layer" if kind == "fsdp" else "bare loop"
        figures[f"{kind}-zero{zero}"] = found
        lines.append(
            [
                f"ZeRO-{zero}, {ranks} rank{'s' * (ranks > 1)} x {found['threads']} threads",
                against,
                found["tokens"],
                *(f"{medians[name]:.3f}" for name in ("engine", kind)),
                f"{found['ratio']:.3f}",
                FLOORS[kind],
            ]
        )
        print(lines[-1], flush=True)
    layers = 4 if options.quick else SMOLLM2_135M["num_hidden_layers"]
    text = f"{layers} layers of SmolLM2-135M's shape, K = 8, M = 2, stage 2, fp32, medians in turns.\n\n"
    text += Table(["engine", "against", "tokens a step", "engine, s", "other, s", "ratio", "at most"], lines).markdown()
    publish("engine-overhead", "What the engine costs", text, figures, options.quick or bool(options.only))


if __name__ == "__main__":
    main()
