"""Savers without a trainer, killed at random moments or on a disk that fills up: imports are paid once, each kill is a fork.

save_loop.py kill FOLDER COUNT SEED     COUNT savers (one or two ranks, sync or background), each killed at a random moment
save_loop.py full FOLDER                FOLDER is on a small file system; prints what the saver says
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rim_dist.checkpoint import store
from rim_dist.checkpoint.resume import agree_on_checkpoint
from rim_dist.checkpoint.saver import CheckpointSaver
from rim_dist.config import Recipe
from rim_dist.errors import RimError
from rim_dist.parallel.launch import Process
from rim_dist.parallel.liveness import start_monitor
from rim_dist.recipe import validate_recipe

ELEMENTS = 300_000


def recipe_of(folder: Path, **checkpoint: object) -> Recipe:
    tree = {
        "run": {"name": folder.name, "output_dir": str(folder.parent)},
        "model": {"config": {"model_type": "llama"}, "tokenizer": "synthetic"},
        "curriculum": {"stage2": {"samples": 128}},
        "parallel": {"timeout_seconds": 60},
        "checkpoint": checkpoint,
    }
    return validate_recipe(tree, "save_loop")


def files_of(step: int, rank: int, live: torch.Tensor) -> dict[str, Any]:
    """What a rank would save: its tensor is changed in place from step to step, as an optimizer does."""
    live.fill_(step * 10 + rank)
    return {f"engine/rank-{rank}.pt": {"weights": live, "step": step}}


def write_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


def run_rank(folder: Path, rank: int, ranks: int, background: bool) -> None:
    """Saves without end; after each one is safe a line goes to `announced`."""
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{os.getppid()}-{ranks}", rank=rank, world_size=ranks)
    monitor = start_monitor(rank, ranks, 60) if ranks > 1 else None
    process = Process(rank, ranks, "cpu", monitor)
    checkpoints = folder / "checkpoints"
    saver = CheckpointSaver(recipe_of(folder, keep=2, background=background), checkpoints, process)
    found = agree_on_checkpoint(checkpoints, process)
    step = store.read_state(found).step if found else 0
    live = torch.zeros(ELEMENTS)
    previous = None
    while True:
        step += 1
        state = store.TrainingState("stage2", step, step, step, 0.0, ranks)
        saver.save(state, lambda _, step=step: files_of(step, rank, live), write_model, {"loss": 1.0 / step})
        safe = previous if background else step  # a save waits for the one before it
        if rank == 0 and safe is not None:
            with (folder / "announced").open("a") as file:
                file.write(f"{safe}\n")
        previous = step
        live.fill_(-1.0)  # training goes on while a background save is written


def check(folder: Path) -> int:
    """The newest checkpoint is intact, not older than what was announced, and holds the values of its step."""
    checkpoints = folder / "checkpoints"
    found = agree_on_checkpoint(checkpoints, Process(0, 1, "cpu"))
    announced = [int(line) for line in (folder / "announced").read_text().split()] if (folder / "announced").is_file() else [0]
    if found is None:
        assert announced == [0], f"announced {announced[-1]}, nothing there"
        return 0
    state = store.read_state(found)
    assert state.step >= announced[-1], f"announced {announced[-1]}, newest intact is {state.step}"
    for rank in range(state.ranks):
        saved = torch.load(found / "engine" / f"rank-{rank}.pt", weights_only=True)
        assert saved["step"] == state.step
        assert torch.equal(saved["weights"], torch.full((ELEMENTS,), float(state.step * 10 + rank)))
    return state.step


def kill(folder: Path, count: int, seed: int) -> None:
    pick = random.Random(seed)
    moments: dict[str, int] = {}
    for number in range(count):
        ranks, background = pick.choice([(1, False), (1, True), (2, False), (2, True)])
        for old in folder.glob("meet-*"):
            old.unlink()
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                try:
                    run_rank(folder, rank, ranks, background)
                finally:
                    os._exit(1)
            children.append(child)
        time.sleep(pick.uniform(0.0, 0.35) + (0.1 if ranks > 1 else 0.0))
        for child in children:
            ended, _ = os.waitpid(child, os.WNOHANG)
            assert ended == 0, f"kill {number}: a saver ended by itself"
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        left = sorted(p.name for p in (folder / "checkpoints").glob("*.partial")) if (folder / "checkpoints").is_dir() else []
        kind = "in a save" if any("removed" not in name for name in left) else "in a removal" if left else "between"
        moments[kind] = moments.get(kind, 0) + 1
        step = check(folder)
    print(json.dumps({"kills": count, "moments": moments, "last_step": step}))


def full(folder: Path) -> None:
    """Saves until the space check refuses; then, with the check off, until the disk does."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    said = []
    for checked in (True, False):
        saver = CheckpointSaver(recipe_of(folder, keep=1000), checkpoints, Process(0, 1, "cpu"))
        if not checked:
            saver._check_space = lambda _step, mine: mine  # type: ignore[method-assign]
        step = len(store.all_checkpoints(checkpoints))
        live = torch.zeros(4_000_000)
        try:
            while True:
                step += 1
                state = store.TrainingState("stage2", step, step, step, 0.0, 1)
                saver.save(state, lambda _, step=step, live=live: files_of(step, 0, live), write_model, {})
        except RimError as error:
            said.append(str(error))
        found = agree_on_checkpoint(checkpoints, Process(0, 1, "cpu"))
        assert found is not None
        assert store.read_state(found).step == step - 1
        assert not list(checkpoints.glob("*.partial"))
    print(json.dumps(said))


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        full(Path(sys.argv[2]))
