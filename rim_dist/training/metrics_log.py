"""Writes the metrics of a run: a line of JSON a step, and W&B and TensorBoard where the recipe names them."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from rim_dist.config import LoggingSection
from rim_dist.errors import ConfigError
from rim_dist.files import os_errors, write_atomically
from rim_dist.messages import say
from rim_dist.metrics import MetricLine, damaged_text, numbers, scan_metrics


class MetricsLog:
    """`metrics.jsonl` of a run (first rank only): each step once, also after a kill.

    Opened at the step a run goes on from, it drops later lines: those steps are run, and written, again. A file with damaged
    lines is kept beside it.
    """

    def __init__(self, folder: Path, section: LoggingSection, step: int, recipe: dict[str, Any]) -> None:
        self._path = folder / "metrics.jsonl"
        lines, damaged = scan_metrics(self._path)
        if damaged:
            copy = self._path.with_name(f"metrics-damaged-{secrets.token_hex(4)}.jsonl")
            shutil.copy(self._path, copy)
            say(f"warning: {self._path}:{damaged[0]}: {damaged_text(damaged)}; the file as it was is {copy.name}")
        kept = [line for line in lines if line["step"] <= step]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(folder, section, recipe) if section.wandb != "off" else None
        self._tensorboard = _start_tensorboard(folder, step) if section.tensorboard else None

    def write(self, line: MetricLine) -> None:
        with os_errors(self._path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._wandb is not None:
            self._wandb.log(numbers(line), step=line["step"])
        if self._tensorboard is not None:
            for name, value in numbers(line).items():
                self._tensorboard.add_scalar(f"{line['kind']}/{name}", value, line["step"])

    def close(self, at_once: bool = False) -> None:
        """`at_once`: other ranks wait for this one to end; W&B is not waited for."""
        with os_errors(self._path), self._file:
            os.fsync(self._file.fileno())
        if self._wandb is not None and not at_once:
            self._wandb.finish()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _start_wandb(folder: Path, section: LoggingSection, recipe: dict[str, Any]) -> Any:
    import wandb

    identity = folder / "wandb_id"  # a resumed run goes on under the same id
    if not identity.is_file():
        write_atomically(identity, secrets.token_hex(4) + "\n")
    return wandb.init(
        project=section.wandb_project,
        id=identity.read_text(encoding="utf-8").strip(),
        name=folder.name,
        dir=str(folder),
        mode="online" if section.wandb == "online" else "offline",
        resume="allow",
        config=recipe,
    )


def _start_tensorboard(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigError("logging.tensorboard: the tensorboard package is not installed (pip install tensorboard)") from None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
