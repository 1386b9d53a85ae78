"""The kernels that compute the RiM attention: a file here is one, and `model.attention: NAME` in a recipe is the file's name.

A file defines `KERNEL`, an instance of a subclass of `rim_dist.attention.kernels.base.Kernel` that declares what it supports.
Recipes, the choice, the planner, tests and documentation read the declarations. Nothing here imports torch while it is loaded.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rim_dist.attention.kernels.base import Kernel

REFERENCE = "dense"  # also computes what a kernel without `decoding` leaves


def kernel_names() -> list[str]:
    """Names a recipe may give as `model.attention`, besides `auto`."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


@functools.cache
def kernel_of(name: str) -> Kernel:
    """A kernel by name. Raises KeyError for an unknown one."""
    if name not in kernel_names():
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}").KERNEL


def proof_kernel(name: str) -> str:
    """The kernel that runs tiny models in proofs: `split` for one that does not train on a CPU, else the kernel itself.

    Kernels of a GPU are compiled, which would take minutes for a tiny model; the layout decides what they compute as well.
    """
    return name if "cpu" in kernel_of(name).devices else "split"
