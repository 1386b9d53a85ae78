"""Errors a user can cause, and the exit status each one ends the command with.

A `RimError` is printed as one message without a traceback. Anything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL: saved and stopped, or lost a peer; starting again continues the run


class RimError(Exception):
    """Base of all errors that carry a message for the user."""

    exit_status = EXIT_USAGE


class ConfigError(RimError):
    """A recipe or an override is wrong, or asks for an impossible combination."""


class EnvironmentProblem(RimError):
    """A package is missing or of another version than is needed."""


class DataError(RimError):
    """A data file or a sample in it cannot be used."""


class ModelError(RimError):
    """The model or tokenizer cannot be used for the method."""


class CheckpointError(RimError):
    """A checkpoint or an exported folder is missing, incomplete or belongs to something else."""


class TrainingError(RimError):
    """Training cannot go on (a loss that is not finite, a full disk): starting again would not help."""

    exit_status = EXIT_FAILED


class Stopped(RimError):
    """Training was asked to stop, saved its state and can be started again."""

    exit_status = EXIT_TRY_AGAIN


class Superseded(RimError):
    """Another start has become the owner of the run's folder: this one must write nothing more, and not come back."""


class PeerLost(RimError):
    """Another rank went away in the middle of a collective; starting again continues the run."""

    exit_status = EXIT_TRY_AGAIN


def first_line(error: Exception) -> str:
    """The first line of a library's error, with the next one if it only leads to that; its kind if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
