"""Versions of what rim_dist needs, compared with what is installed."""

from __future__ import annotations

import contextlib
import platform
import sys
from collections.abc import Iterator
from importlib import metadata

from rim_dist import __version__
from rim_dist.errors import EnvironmentProblem


def _requirements() -> Iterator[tuple[str, str, str | None, bool]]:
    """What the installed rim_dist needs: name, versions, the installed one (None: none), whether that will do."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("rim_dist") or []
    except metadata.PackageNotFoundError:  # run from a copy of the source
        return
    for need in map(Requirement, lines):
        if need.marker is None or need.marker.evaluate({"extra": ""}):
            installed = None
            with contextlib.suppress(metadata.PackageNotFoundError):
                installed = metadata.version(need.name)
            fits = installed is not None and need.specifier.contains(installed, prereleases=True)
            yield need.name, str(need.specifier), installed, fits


def check_versions() -> None:
    """Raise EnvironmentProblem, with the line that installs the right ones, if an installed package is of another version.

    One that is missing is refused by who needs it.
    """
    wrong = [(name, needed, there) for name, needed, there, fits in _requirements() if there is not None and not fits]
    if wrong:
        found = ", ".join(f"{name} {there} (needs {needed})" for name, needed, there in wrong)
        raise EnvironmentProblem(f"installed in another version than rim_dist {__version__} needs: {found};\n{_pip(wrong)}")


def _pip(wrong: list[tuple[str, str, str]]) -> str:
    return f"{sys.executable} -m pip install " + " ".join(f"'{name}{needed}'" for name, needed, _ in wrong)


def version_lines() -> list[str]:
    """Versions of all that matters in a report of a bug."""
    lines = [f"rim_dist {__version__}", f"Python {platform.python_version()} on {platform.platform()}"]
    for name, needed, installed, fits in _requirements():
        lines.append(f"{name} {installed or 'is not installed'}" + ("" if fits else f" (needs {needed})"))
    try:
        import torch

        gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        lines.append(f"CUDA {torch.version.cuda or 'not in this torch'}; GPUs: {', '.join(gpus) or 'none'}")
    except Exception as error:  # a report of a bug is wanted most where torch cannot be imported
        lines.append(f"torch cannot be imported: {error}")
    return lines
