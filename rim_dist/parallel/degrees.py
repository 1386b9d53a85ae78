"""Do the ranks of an allocation fit a recipe? Pure, so that a job is refused before it is queued."""

from __future__ import annotations

from rim_dist.config import Recipe
from rim_dist.errors import ConfigError


def check_ranks(recipe: Recipe, ranks: int) -> None:
    """Raise ConfigError if so many ranks cannot run the recipe."""
    model = recipe.parallel.tensor * recipe.parallel.sequence
    if ranks % model:
        raise ConfigError(
            f"{ranks} ranks: parallel.tensor x parallel.sequence is {model}; allowed: a multiple of it, for example "
            f"{max(1, ranks // model) * model}"
        )
    if recipe.optimizer.global_batch < ranks // model:
        raise ConfigError(
            f"optimizer.global_batch: {recipe.optimizer.global_batch} samples cannot be spread over {ranks // model} "
            f"data ranks; allowed: {ranks // model} or more"
        )
