"""The planner for the arguments of `rim-dist plan` and `rim-dist submit`, which are checked here."""

from __future__ import annotations

import re

from rim_dist.config import Recipe
from rim_dist.errors import ConfigError
from rim_dist.planning.links import INTERCONNECTS
from rim_dist.planning.recommend import Cluster, Planner
from rim_dist.planning.shape import model_shape, recipe_shape

_UNITS = {"GiB": 2**30, "MiB": 2**20, "TiB": 2**40, "GB": 10**9, "MB": 10**6, "TB": 10**12}


def parse_memory(text: str, option: str = "--gpu-memory") -> int:
    """Bytes of a size with its unit. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)", text.strip())
    if found is None or found[2] not in _UNITS or float(found[1]) <= 0:
        raise ConfigError(f"{option}: {text!r} is not a size; write a number and its unit, for example 80GiB")
    return int(float(found[1]) * _UNITS[found[2]])


def make_planner(
    recipe: Recipe,
    gpus: int,
    gpu_memory: int,
    model: str | None = None,
    gpus_per_node: int | None = None,
    interconnect: str = "nvlink+ib-400g",
    node_memory: int = 2**40,
    question: int = 128,
    target: int = 16,
) -> Planner:
    """A `Planner`. Raises ConfigError for an argument that is not allowed."""
    per_node = min(gpus, 8) if gpus_per_node is None else gpus_per_node
    for name, value in (
        ("--gpus", gpus),
        ("--gpus-per-node", per_node),
        ("--question-tokens", question),
        ("--target-tokens", target),
    ):
        if value < 1 and not (name == "--gpus-per-node" and gpus < 1):
            raise ConfigError(f"{name}: {value} is not allowed; allowed: 1 or more")
    if gpus > per_node and gpus % per_node:
        raise ConfigError(
            f"--gpus: {gpus} GPUs are no whole nodes of {per_node}; allowed: a multiple of {per_node}, or --gpus-per-node"
        )
    if interconnect not in INTERCONNECTS:
        raise ConfigError(f"--interconnect: {interconnect!r} is not known; known: {', '.join(INTERCONNECTS)}")
    shape = recipe_shape(recipe) if model is None else model_shape(model)
    cluster = Cluster(gpus, gpu_memory, INTERCONNECTS[interconnect], per_node, node_memory)
    return Planner(recipe, shape, cluster, question, target)


def recommended_overrides(recipe: Recipe, gpus: int, gpu_memory: int, gpus_per_node: int) -> list[str]:
    """Overrides for what the recipe leaves open (`Planner.fill_in`). Raises ConfigError if nothing fits."""
    return make_planner(recipe, gpus, gpu_memory, gpus_per_node=gpus_per_node).fill_in()
