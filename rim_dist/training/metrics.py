"""What a run records: a line of JSON a step, W&B and TensorBoard when asked, a picture of the curves at the end."""

from __future__ import annotations

import itertools
import json
import os
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rim_dist.config import LoggingSection
from rim_dist.errors import ConfigError
from rim_dist.files import write_atomically

Metrics = dict[str, Any]


def read_metrics(path: Path) -> list[Metrics]:
    """All complete lines of a metrics file, in order; a last line cut off by a kill is left out."""
    lines: list[Metrics] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines


class MetricsLog:
    """`metrics.jsonl` of a run (first rank only): each step once, also after a kill.

    Opened at the step a run goes on from, it drops later lines: those steps are run, and written, again.
    """

    def __init__(self, folder: Path, section: LoggingSection, step: int, finished: bool, recipe: dict[str, Any]) -> None:
        self._path = folder / "metrics.jsonl"
        # A run killed after its last step evaluates again; one killed elsewhere evaluated before it saved.
        kept = [
            line
            for line in read_metrics(self._path)
            if line["step"] < step or (line["step"] == step and not (finished and line["kind"] == "evaluation"))
        ]
        write_atomically(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self._path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(folder, section, recipe) if section.wandb != "off" else None
        self._tensorboard = _start_tensorboard(folder, step) if section.tensorboard else None

    def write(self, line: Metrics) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in line.items() if isinstance(v, int | float) and k != "step"}
        for name in ("block_loss", "step_loss", "block_accuracy"):
            numbers |= {f"{name}/{k}": value for k, value in enumerate(line.get(name) or [], 1) if value is not None}
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])
        if self._tensorboard is not None:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(f"{line['kind']}/{name}", value, line["step"])

    def close(self, at_once: bool = False) -> None:
        """`at_once`: other ranks wait for this one to end; W&B is not waited for."""
        os.fsync(self._file.fileno())
        self._file.close()
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


def draw_curves(lines: Iterable[Metrics], path: Path) -> None:
    """Loss, per-block loss, learning rate and accuracy over the run's steps as a PNG."""
    from matplotlib.figure import Figure

    lines = list(lines)
    train = [line for line in lines if line["kind"] == "train"]
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, blocks, rate, accuracy = figure.subplots(2, 2).flat
    steps = [line["step"] for line in train]
    loss.plot(steps, [line["loss"] for line in train], linewidth=0.8)
    loss.set(title="loss", xlabel="optimizer step")
    highest = max((len(line.get("block_loss") or []) for line in train), default=0)
    for k in range(highest):
        points = [(line["step"], line["block_loss"][k]) for line in train if len(line.get("block_loss") or []) > k]
        points = [p for p in points if p[1] is not None]
        if points:
            blocks.plot(*zip(*points, strict=True), linewidth=0.8, label=f"block {k + 1}")
    blocks.set(title="token loss by block", xlabel="optimizer step")
    if highest:
        blocks.legend(fontsize="small", ncols=2)
    rate.plot(steps, [line["learning_rate"] for line in train])
    rate.set(title="learning rate", xlabel="optimizer step")
    accuracy.plot([e["step"] for e in evaluations], [100 * e["accuracy"] for e in evaluations], marker="o")
    accuracy.set(title="accuracy after the last block (%)", xlabel="optimizer step", ylim=(0, 100))
    switches = [b["step"] for a, b in itertools.pairwise(train) if a["stage"] != b["stage"]]
    for axes in (loss, blocks, rate, accuracy):
        axes.grid(alpha=0.3)
        for step in switches:
            axes.axvline(step, color="grey", linestyle="--", linewidth=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
