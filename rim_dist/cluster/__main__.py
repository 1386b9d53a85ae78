"""What slurm/lib.sh asks of the package: `python -m rim_dist.cluster begin|check-nodes|suspects ...`. Not for people."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rim_dist.errors import EXIT_DONE, ConfigError, RimError


def _begin(arguments: list[str]) -> int:
    """Arguments of `rim-dist train`. Prints NAME=VALUE lines for the job script."""
    from rim_dist.cli import build_parser
    from rim_dist.cluster.nodes import rendezvous_port
    from rim_dist.cluster.starts import begin
    from rim_dist.config import load_recipe
    from rim_dist.parallel.degrees import check_ranks

    given = build_parser().parse_args(["train", *arguments])
    recipe = load_recipe(given.recipe, given.overrides)
    environment = dict(os.environ)
    if ranks := environment.get("RIM_RANKS"):
        check_ranks(recipe, int(ranks))
    start = begin(recipe, environment, Path(environment.get("RIM_HOME") or "."))
    print(f"RIM_RUN={recipe.folder.resolve()}")
    print(f"RIM_START={start.folder.resolve()}")
    print(f"MASTER_PORT={rendezvous_port(int(environment.get('SLURM_JOB_ID', '0')))}")
    return EXIT_DONE


def _check_nodes(names: list[str]) -> int:
    from rim_dist.cluster.nodes import check_nodes

    environment = os.environ
    return check_nodes(
        Path(environment["RIM_START"]),
        environment["MASTER_ADDR"],
        int(environment["MASTER_PORT"]),
        int(environment["SLURM_NODEID"]),
        names,
        float(environment.get("RIM_CHECK_SECONDS") or 60),
    )


def _suspects(arguments: list[str]) -> int:
    from rim_dist.cluster.starts import Start, suspects

    print(",".join(suspects(Start(Path(arguments[0]), {}))))
    return EXIT_DONE


def main() -> int:
    commands = {"begin": _begin, "check-nodes": _check_nodes, "suspects": _suspects}
    try:
        if len(sys.argv) < 2 or sys.argv[1] not in commands:
            raise ConfigError(f"commands: {', '.join(commands)}")
        return commands[sys.argv[1]](sys.argv[2:])
    except RimError as error:
        print(f"rim-dist: {error}", file=sys.stderr, flush=True)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
