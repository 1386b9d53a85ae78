"""Checks that degrees fit ranks, recipe and model. Pure, so that a job is refused before it is queued or anything is built."""

from __future__ import annotations

import math
from typing import Any, Literal

from rim_dist.config import Recipe
from rim_dist.errors import ConfigError
from rim_dist.parallel.mesh import Degrees

Mode = Literal["ulysses", "allgather_kv"]


def fit_degrees(recipe: Recipe, ranks: int) -> Degrees:
    """The degrees of a mesh of so many ranks. Raises ConfigError with the nearest possible numbers if there is no such mesh."""
    tensor, sequence = recipe.parallel.tensor, recipe.parallel.sequence
    model = tensor * sequence
    if ranks % model:
        fewer, more = ranks // model * model, -(-ranks // model) * model
        # Divisors of the recipe's degrees: they divide whatever number of heads those divide.
        fitting = math.gcd(ranks, tensor)
        degrees = f"parallel.tensor {fitting} with parallel.sequence {math.gcd(ranks // fitting, sequence)}"
        raise ConfigError(
            f"{ranks} ranks cannot be divided: parallel.tensor {tensor} x parallel.sequence {sequence} takes {model}; "
            f"the nearest that can: {f'{fewer} or ' if fewer else ''}{more} ranks, or {degrees} on {ranks} ranks"
        )
    data = ranks // model
    if recipe.optimizer.global_batch < data:
        raise ConfigError(
            f"optimizer.global_batch: {recipe.optimizer.global_batch} samples cannot be spread over {data} data ranks; "
            f"allowed: {data} or more, or larger parallel.tensor or parallel.sequence"
        )
    return Degrees(tensor, sequence, data)


def head_counts(config: Any) -> tuple[int, int]:
    """Attention heads and key/value heads of a transformers config."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    return heads, int(getattr(text, "num_key_value_heads", None) or heads)


def check_tensor_degree(tensor: int, config: Any) -> None:
    """Raise ConfigError if a model's heads or its MLP cannot be split over so many ranks."""
    text = config.get_text_config()
    heads, kv_heads = head_counts(config)
    sizes = {"attention heads": heads, "key/value heads": kv_heads}
    if isinstance(width := getattr(text, "intermediate_size", None), int):
        sizes["MLP channels"] = width
    if not (wrong := [f"{size} {name}" for name, size in sizes.items() if size % tensor]):
        return
    common = math.gcd(*sizes.values())
    possible = _nearest(tensor, [d for d in range(1, common + 1) if common % d == 0])
    raise ConfigError(f"parallel.tensor: {tensor} ranks cannot share {' and '.join(wrong)} of {config.model_type}; {possible}")


def _nearest(wanted: int, possible: list[int]) -> str:
    nearest = min(possible, key=lambda d: (abs(d - wanted), d))
    return f"the nearest that can: {nearest} (allowed: {', '.join(map(str, possible))})"


def choose_mode(wanted: str, degree: int, heads: int, kv_heads: int) -> Mode:
    """Resolve `parallel.sequence_mode` for a tensor rank's heads: `auto` is `ulysses`, which sends less, if the heads divide.

    Raises ConfigError if the recipe sets `ulysses` and they do not.
    """
    divides = heads % math.lcm(kv_heads, degree) == 0
    if wanted == "ulysses" and not divides:
        possible = _nearest(degree, [d for d in range(1, heads + 1) if heads % math.lcm(kv_heads, d) == 0])
        raise ConfigError(
            f"parallel.sequence: {degree} ranks cannot share the {heads} heads ({kv_heads} for keys) that a tensor rank has "
            f"by all-to-all; {possible}, or any number with parallel.sequence_mode allgather_kv"
        )
    if wanted == "auto":
        return "ulysses" if divides else "allgather_kv"
    return wanted  # type: ignore[return-value]
