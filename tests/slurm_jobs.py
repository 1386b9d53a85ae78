"""What the cluster tests share: recipes, the environment of jobs, and reading what a job left behind."""

from __future__ import annotations

import itertools
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import TINY_MODEL, tiny_recipe, write_recipe
from slurm_cluster import Cluster
from states import trained_weights

from rim_dist.checkpoint.store import find_checkpoint
from rim_dist.cluster.attempts import Attempt, attempts_of
from rim_dist.metrics import read_metrics

JOB_ENVIRONMENT = {
    "RIM_VENV": sys.prefix,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "DS_ACCELERATOR": "cpu",
    # mpirun refuses root, and test clusters are started by root.
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}

DEMO_MODEL = {
    **TINY_MODEL,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}


def demo_cut(steps: int = 20) -> list[str]:
    """recipes/demo.yaml cut to some steps a stage, from random weights instead of the demo's base; its dropout is 0."""
    return [
        "model.init_from=null",
        f"model.config={json.dumps(DEMO_MODEL)}",
        "model.tokenizer=synthetic",
        "data.synthetic.samples=2560",
        f"curriculum.stage1.samples={64 * steps}",
        f"curriculum.stage2.samples={64 * steps}",
        "checkpoint.every_steps=10",
        "evaluation.samples=16",
        "evaluation.batch=16",
        "evaluation.every_steps=0",
        "logging.every_steps=1",
    ]


def shape(nodes: int, ranks_per_node: int) -> list[str]:
    return [f"--nodes={nodes}", f"--ntasks-per-node={ranks_per_node}", "--cpus-per-task=1", "--gpus-per-node=0"]


def steps_recipe(folder: Path, name: str, steps: int = 150, **sections: object) -> Path:
    """Some steps a stage of a tiny model, dropout on, a checkpoint every 20: long enough to be disturbed in the middle."""
    recipe = tiny_recipe(
        folder,
        run={"name": name},
        curriculum={
            "stage1": {"samples": 16 * steps, "learning_rate": 1e-3, "max_steps": 4, "attention_dropout": 0.1},
            "stage2": {"samples": 16 * steps, "learning_rate": 5e-4, "attention_dropout": 0.2},
        },
        model={"config": {**tiny_recipe(folder)["model"]["config"], "attention_dropout": 0.1}},
        data={"synthetic": {"samples": 700, "min_steps": 1, "max_steps": 4}},
        parallel={"zero_stage": 3},
        checkpoint={"every_steps": 20},
        logging={"every_steps": 1},
    )
    for section, values in sections.items():
        recipe[section] = {**recipe.get(section, {}), **values} if isinstance(values, dict) else values
    return write_recipe(folder / f"{name}.yaml", recipe)


def train_job(cluster: Cluster, recipe: Path, *flags: str, **environment: str) -> str:
    """Two nodes, a rank each."""
    output = f"--output={recipe.parent}/slurm-%j.out"
    return cluster.sbatch(*shape(2, 1), output, *flags, "slurm/train.sbatch", str(recipe), **JOB_ENVIRONMENT, **environment)


def losses(run: Path) -> list[tuple[str, int, float]]:
    return [(m["stage"], m["step"], m["loss"]) for m in read_metrics(run / "metrics.jsonl") if m["kind"] == "train"]


def same_parameters(left: Path, right: Path) -> None:
    a, b = trained_weights(find_checkpoint(left)), trained_weights(find_checkpoint(right))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a), "parameters differ"


def _step_lines(start: Attempt) -> list[int]:
    path = start.folder / "rank-00000.log"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return [int(step) for step in re.findall(r"\| stage\d step (\d+)/", text)]


def last_step(run: Path) -> int:
    """The last step the newest start has done, 0 before its first."""
    starts = attempts_of(run)
    return (_step_lines(starts[-1]) or [0])[-1] if starts else 0


def wait_for_step(cluster: Cluster, job: str, run: Path, step: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while last_step(run) < step:
        state = cluster.job(job)["JobState"]
        assert state in ("PENDING", "RUNNING", "COMPLETING"), f"{state}\n{job_output(run)}"
        assert time.monotonic() < deadline, f"{state}\n{job_output(run)}"
        time.sleep(0.1)


def lost_steps(run: Path) -> list[int]:
    """Steps done twice at each restart."""
    done = [lines for start in attempts_of(run) if (lines := _step_lines(start))]
    return [max(0, before[-1] - after[0] + 1) for before, after in itertools.pairwise(done)]


def job_output(run: Path) -> str:
    """What the run's jobs printed, without the lines of steps."""
    lines = [
        line
        for path in [*run.parent.glob("slurm-*.out"), *run.glob("logs/slurm-*.out")]
        for line in path.read_text(errors="replace").splitlines()
    ]
    return "\n".join(line for line in lines if not re.search(r"\| stage\d step", line))


def complete(cluster: Cluster, job: str, run: Path, seconds: float) -> None:
    """Wait until a job is COMPLETED; what it printed if it does not come to that."""
    try:
        cluster.wait(job, "COMPLETED", seconds)
    except (AssertionError, TimeoutError) as error:
        raise AssertionError(f"{error}\n{job_output(run)}") from None


def rank_processes(run: Path, rank: int) -> list[int]:
    """Process ids of a rank of the newest attempt, without its supervisor."""
    start = str(attempts_of(run)[-1].folder.resolve())
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = dict(v.split("=", 1) for v in (folder / "environ").read_text().split("\0") if "=" in v)
            words = (folder / "cmdline").read_text().split("\0")
        except (OSError, UnicodeDecodeError):
            continue
        if environment.get("RIM_ATTEMPT") == start and environment.get("RANK") == str(rank) and "rim_dist" in words:
            found.append(int(folder.name))
    return found


def until(condition: Callable[[], bool], seconds: float, what: str) -> float:
    """Wait for something; returns how long it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{what}: not after {seconds:.0f} s"
        time.sleep(0.1)
    return time.monotonic() - start
