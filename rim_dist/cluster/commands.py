"""The cluster's commands of `rim-dist`: submit, status, logs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rim_dist.errors import EXIT_DONE, ConfigError


def add_cluster_commands(
    command: Callable[..., argparse.ArgumentParser], recipe_arguments: Callable[[argparse.ArgumentParser], Any]
) -> None:
    submit = command(
        "submit",
        _submit,
        "Submit a recipe to SLURM: slurm/train.sbatch with the site's settings and these flags. Degrees come from the recipe "
        "(with --gpu-memory also from the planner), the number of ranks from --nodes and --ranks-per-node.",
        "rim-dist submit recipes/gsm8k-aug-gpt2.yaml data.path=train.txt --nodes 4 --time 12:00:00 --dry-run",
        "rim-dist submit recipes/gsm8k-aug-gpt2.yaml --nodes 1 --ranks-per-node 4 --gpus-per-node 4 --chain 5",
    )
    recipe_arguments(submit)
    for flag, option, text in _OPTIONS:
        submit.add_argument(flag, metavar=option.upper().removeprefix("--"), help=text)
    submit.add_argument(
        "--gpu-memory",
        metavar="SIZE",
        help="memory of a GPU (80GiB): the planner fills in degrees the recipe does not set",
    )
    submit.add_argument("--launcher", choices=["srun", "torchrun", "deepspeed", "mpi", "mpirun"], help="what starts the ranks")
    submit.add_argument("--site", metavar="FILE", help="the site's settings (slurm/site.env)")
    submit.add_argument("--until", choices=["stage1"], help="end after this stage")
    submit.add_argument("--sbatch", action="append", default=[], metavar="--NAME=VALUE", help="another option of sbatch")
    submit.add_argument(
        "--chain", type=int, default=1, metavar="N", help="N jobs after each other instead of one that requeues"
    )
    submit.add_argument("--dry-run", action="store_true", help="show the job script and submit nothing")

    status = command(
        "status",
        _status,
        "The state of runs: stage, step, loss, ETA, last checkpoint, restarts, from the run's folder and squeue.",
        "rim-dist status",
        "rim-dist status runs/demo",
    )
    status.add_argument(
        "run_dir", nargs="?", default="runs", metavar="RUN", help="a run's folder, or one that holds runs (runs)"
    )

    logs = command(
        "logs",
        _logs,
        "The output of a run's ranks, over all attempts, in the order of time (UTC).",
        "rim-dist logs runs/demo --rank 3",
        "rim-dist logs runs/demo --stacks",
    )
    logs.add_argument("run_dir", metavar="RUN", help="a run's folder")
    logs.add_argument("--rank", type=int, metavar="R", help="only this rank")
    logs.add_argument("--stacks", action="store_true", help="the stack traces of a hang instead")


# Flag, sbatch option, help. The site's settings and the template have the values of flags that are not given.
_OPTIONS = (
    ("--nodes", "--nodes", "nodes"),
    ("--ranks-per-node", "--ntasks-per-node", "ranks on each node"),
    ("--gpus-per-node", "--gpus-per-node", "GPUs of each node"),
    ("--cpus-per-rank", "--cpus-per-task", "cores of each rank"),
    ("--time", "--time", "time limit, as sbatch takes it"),
    ("--partition", "--partition", "partition"),
    ("--account", "--account", "account"),
    ("--qos", "--qos", "quality of service"),
)


def _submit(arguments: argparse.Namespace) -> int:
    from rim_dist.cluster.submit import Request, parse_options, planned, render, submit
    from rim_dist.planning.request import parse_memory
    from rim_dist.recipe import load_recipe
    from rim_dist.training.folder import check_run_folder

    if arguments.chain < 1:
        raise ConfigError(f"--chain: {arguments.chain} is not allowed; allowed: 1 or more")
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    check_run_folder(recipe)
    options = parse_options(arguments.sbatch, "--sbatch")
    for flag, option, _ in _OPTIONS:
        value = getattr(arguments, flag.removeprefix("--").replace("-", "_"))
        if value is not None:
            options[option] = value
    request = Request(arguments.recipe, arguments.overrides, arguments.site, arguments.launcher, options, arguments.until)
    if arguments.gpu_memory is not None:
        request = planned(recipe, request, parse_memory(arguments.gpu_memory))
        recipe = load_recipe(arguments.recipe, request.overrides)
    if arguments.dry_run:
        print(render(recipe, request, "CHAIN" if arguments.chain > 1 else ""), end="")
        return EXIT_DONE
    jobs = submit(recipe, request, arguments.chain)
    print(f"{recipe.folder}: job{'s' if len(jobs) > 1 else ''} {' '.join(jobs)}; to cancel: scancel {' '.join(jobs)}")
    return EXIT_DONE


def _status(arguments: argparse.Namespace) -> int:
    from rim_dist.cluster.status import describe, find_runs

    for run in find_runs(Path(arguments.run_dir)):
        print(describe(run))
    return EXIT_DONE


def _logs(arguments: argparse.Namespace) -> int:
    from rim_dist.cluster.logs import merged

    for line in merged(Path(arguments.run_dir), arguments.rank, arguments.stacks):
        sys.stdout.write(line + "\n")
    return EXIT_DONE
