"""The commands that slurm/lib.sh and the job scripts call: `python -m rim_dist.cluster COMMAND ...`. Not for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rim_dist.errors import EXIT_DONE, ConfigError, RimError
from rim_dist.messages import say

if TYPE_CHECKING:
    from rim_dist.config import Recipe


def _recipe(arguments: list[str]) -> Recipe:
    """The recipe of a `rim-dist train` command with these arguments."""
    from rim_dist.cli import build_parser
    from rim_dist.recipe import load_recipe

    given = build_parser().parse_args(["train", *arguments])
    return load_recipe(given.recipe, given.overrides)


def _begin(arguments: list[str]) -> None:
    """Arguments of `rim-dist train`. Prints NAME=VALUE lines for the job script."""
    from rim_dist.cluster.attempts import begin_attempt
    from rim_dist.cluster.nodes import rendezvous_port
    from rim_dist.parallel.degrees import fit_degrees

    recipe = _recipe(arguments)
    environment = dict(os.environ)
    if ranks := environment.get("RIM_RANKS"):
        fit_degrees(recipe, int(ranks))
    attempt = begin_attempt(recipe, environment, Path(environment.get("RIM_HOME") or "."))
    print(f"RIM_RUN={recipe.folder.resolve()}")
    print(f"RIM_ATTEMPT={attempt.folder.resolve()}")
    print(f"MASTER_PORT={rendezvous_port(int(environment.get('SLURM_JOB_ID', '0')))}")


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


def _suspects(arguments: list[str]) -> None:
    from rim_dist.cluster.attempts import Attempt

    print(",".join(Attempt(Path(arguments[0]), {}).suspects()))


def _plan(arguments: list[str]) -> None:
    """What curriculum.sh needs of a recipe: its folder, its stages, the data and settings of its evaluation."""
    from rim_dist.config import STAGE_NAMES

    recipe = _recipe(arguments)
    evaluation = recipe.evaluation
    print(f"RUN={recipe.folder.resolve()}")
    for name in STAGE_NAMES:
        if recipe.curriculum.stage(name).enabled:
            print(f"STAGE={name}")
    print(f"DATA={evaluation.data or ('synthetic' if recipe.data.source == 'synthetic' else '')}")
    for field in ("samples", "batch", "max_new_tokens"):
        print(f"EVALUATE=--{field.replace('_', '-')}={getattr(evaluation, field)}")


def _sweep_overrides(arguments: list[str]) -> None:
    from rim_dist.cluster.sweep import sweep_overrides

    rate, *rest = arguments
    print("\n".join(sweep_overrides(_recipe(rest), rate)))


def _sweep_best(arguments: list[str]) -> None:
    from rim_dist.cluster.sweep import best_run

    count = int(arguments[0])
    answer = best_run(_recipe(arguments[1 + count :]), arguments[1 : 1 + count])
    if answer["best"] is not None:
        best = answer["runs"][answer["best"]]
        print(
            f"sweep: {answer['finished']} of {count} runs finished; best learning rate {answer['best']} "
            f"(accuracy {best['accuracy']}, loss {best['loss']:.4f}): {best['run']}"
        )


def main() -> int:
    commands: dict[str, Callable[[list[str]], int | None]] = {
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
        return commands[sys.argv[1]](sys.argv[2:]) or EXIT_DONE
    except RimError as error:
        say(f"rim-dist: {error}")
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
