"""What can be trained: a file here is a method, and `method: NAME` in a recipe is the file's name.

A file defines `METHOD`, a subclass of `rim_dist.methods.base.Method`. Data, engine, loss, scoring and export are the same for
all. Nothing here imports torch while it is loaded: recipes are checked where torch is not installed.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rim_dist.config import Recipe
    from rim_dist.methods.base import Method


def method_names() -> list[str]:
    """Names a recipe may give as `method`."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def method_class(name: str) -> type[Method]:
    """The class of a method by name. Raises KeyError for an unknown one."""
    if name not in method_names():
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}").METHOD


def method_of(recipe: Recipe) -> Method:
    """The recipe's method, bound to the recipe."""
    return method_class(recipe.method)(recipe)
