"""What slurm/lib.sh asks of the package: `python -m rim_dist.cluster COMMAND ...`. Not for people."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rim_dist.errors import EXIT_DONE, ConfigError, RimError
from rim_dist.messages import say

if TYPE_CHECKING:
    from rim_dist.config import Recipe


def _recipe(arguments: list[str]) -> Recipe:
    """The recipe that these arguments of `rim-dist train` mean."""
    from rim_dist.cli import build_parser
    from rim_dist.recipe import load_recipe

    given = build_parser().parse_args(["train", *arguments])
    return load_recipe(given.recipe, given.overrides)


def _begin(arguments: list[str]) -> int:
    """Arguments of `rim-dist train`. Prints NAME=VALUE lines for the job script."""
    from rim_dist.cluster.attempts import begin_attempt
    from rim_dist.cluster.nodes import rendezvous_port
    from rim_dist.parallel.degrees import fit_degrees

    recipe = _recipe(arguments)
    environment = dict(os.environ)
    if ranks := environment.get("RIM_RANKS"):
        fit_degrees(recipe, int(ranks))
    start = begin_attempt(recipe, environment, Path(environment.get("RIM_HOME") or "."))
    print(f"RIM_RUN={recipe.folder.resolve()}")
    print(f"RIM_ATTEMPT={start.folder.resolve()}")
    print(f"MASTER_PORT={rendezvous_port(int(environment.get('SLURM_JOB_ID', '0')))}")
    return EXIT_DONE


def _check_nodes(names: list[str]) -> int:
    from rim_dist.cluster.nodes import check_nodes

    environment = os.environ
    return check_nodes(
        Path(environment["RIM_ATTEMPT"]),
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        int(environment["SLURM_NODEID"]),
        names,
        float(environment.get("RIM_CHECK_SECONDS") or 60),
    )


def _suspects(arguments: list[str]) -> int:
    from rim_dist.cluster.attempts import Attempt, suspects

    print(",".join(suspects(Attempt(Path(arguments[0]), {}))))
    return EXIT_DONE


def _plan(arguments: list[str]) -> int:
    """What curriculum.sh needs to know of a recipe: its folder, its stages, how it is evaluated."""
    from rim_dist.config import STAGE_NAMES

    recipe = _recipe(arguments)
    evaluation = recipe.evaluation
    print(f"RUN={recipe.folder.resolve()}")
    for name in STAGE_NAMES:
        if recipe.curriculum.stage(name).enabled:
            print(f"STAGE={name}")
    data = evaluation.data or ("synthetic" if recipe.data.source == "synthetic" else "")
    print(f"DATA={data}")
    for field in ("samples", "batch", "max_new_tokens"):
        print(f"EVALUATE=--{field.replace('_', '-')}={getattr(evaluation, field)}")
    return EXIT_DONE


def _sweep_overrides(arguments: list[str]) -> int:
    from rim_dist.cluster.sweep import sweep_overrides

    print("\n".join(sweep_overrides(_recipe(arguments[1:]), arguments[0])))
    return EXIT_DONE


def _sweep_best(arguments: list[str]) -> int:
    from rim_dist.cluster.sweep import best_run

    count = int(arguments[0])
    rates = arguments[1 : 1 + count]
    answer = best_run(_recipe(arguments[1 + count :]), rates)
    if answer["best"] is not None:
        best = answer["runs"][answer["best"]]
        print(
            f"sweep: {answer['finished']} of {count} runs finished; best learning rate {answer['best']} "
            f"(accuracy {best['accuracy']}, loss {best['loss']:.4f}): {best['run']}"
        )
    return EXIT_DONE


def main() -> int:
    commands = {
        "begin": _begin,
        "check-nodes": _check_nodes,
        "suspects": _suspects,
        "plan": _plan,
        "sweep-overrides": _sweep_overrides,
        "sweep-best": _sweep_best,
    }
    try:
        if len(sys.argv) < 2 or sys.argv[1] not in commands:
            raise ConfigError(f"commands: {', '.join(commands)}")
        return commands[sys.argv[1]](sys.argv[2:])
    except RimError as error:
        say(f"rim-dist: {error}")
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
