"""How files hold samples: a file here is a format, and `data.source: NAME` in a recipe is the file's name.

A file defines `FORMAT`, an instance of a subclass of `rim_dist.data.formats.base.Format`. Recipes, evaluation, `rim-dist data`
and the reference page read this list. Nothing here imports torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import TYPE_CHECKING

from rim_dist.errors import DataError

if TYPE_CHECKING:
    from rim_dist.data.formats.base import Format


def format_names() -> list[str]:
    """Names a recipe may give as `data.source` or `evaluation.format`, besides those that are no file's."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def format_of(name: str) -> Format:
    """A format by name. Raises KeyError for an unknown one."""
    if name not in format_names():
        raise KeyError(name)
    return importlib.import_module(f"{__name__}.{name}").FORMAT


def recognise(path: Path) -> str:
    """The format of a data file, from its ending and its first row. Raises DataError if none fits."""
    from rim_dist.data.formats.base import first_line

    if not path.is_file():
        raise DataError(f"{path}: no such file")
    formats = {name: format_of(name) for name in format_names()}
    line = None
    if path.suffix not in {ending for known in formats.values() for ending in known.binary_endings}:
        line = first_line(path)
        if line is None:
            raise DataError(f"{path}: the file is empty")
    for name in sorted(formats, key=lambda name: (-formats[name].precedence, name)):
        if formats[name].recognises(path, line):
            return name
    raise DataError(f"{path}: format not recognised; name it: {', '.join(formats)}")
