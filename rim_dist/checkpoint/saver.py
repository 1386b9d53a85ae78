"""Saving from all ranks: space checked, written in front or in the background, announced when every rank is done."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from rim_dist.checkpoint import retention, store
from rim_dist.checkpoint.snapshot import Snapshotter, size_bytes, write_files
from rim_dist.checkpoint.store import RankReport, TrainingState
from rim_dist.config import Recipe
from rim_dist.errors import RimError, TrainingError, first_line
from rim_dist.files import FileRecord, describe_os_error, os_errors, room_for
from rim_dist.parallel.launch import Process
from rim_dist.recipe import dump_recipe

_SAVES = "saves.jsonl"
_SMALL_FILES_BYTES = 1 << 24  # recipe, state, tokenizer (Llama 3's takes 9 MB)
_POLL_SECONDS = 0.02


def _describe(error: Exception) -> str:
    return describe_os_error(error) if isinstance(error, OSError) else first_line(error)


@dataclass
class _Save:
    """A checkpoint that this rank writes, and what went wrong (empty: nothing so far)."""

    state: TrainingState
    partial: Path
    needed_bytes: int
    scores: dict[str, float]
    error: str = ""
    thread: threading.Thread | None = None


class CheckpointSaver:
    """Writes the checkpoints of a run. `save` and `wait` are collective: every rank calls them in the same order.

    What goes wrong on one rank is told to all, and all raise the same TrainingError with the last complete checkpoint in
    place: none waits in a collective for one that has raised.
    """

    def __init__(
        self, recipe: Recipe, checkpoints: Path, process: Process, check_owner: Callable[[], None] = lambda: None
    ) -> None:
        """`check_owner`: called on the first rank before it writes; raises if another start owns the folder."""
        self._check_owner = check_owner
        self._recipe, self._checkpoints, self._process = recipe, checkpoints, process
        self._policy = recipe.checkpoint
        self._snapshotter = Snapshotter()
        self._background: _Save | None = None

    @property
    def failed(self) -> bool:
        """Whether the background write of this rank has failed; `wait` then raises on every rank."""
        return self._background is not None and bool(self._background.error)

    def save(
        self,
        state: TrainingState,
        capture: Callable[[Path], dict[str, Any]],
        write_model: Callable[[Path], None],
        scores: dict[str, float],
    ) -> None:
        """Save what `capture` returns (this rank's files; collective) and what `write_model` writes (first rank only).

        With `checkpoint.background` it returns when the state is copied. Raises TrainingError if it cannot be written.
        """
        started = time.perf_counter()
        self.wait()
        partial = store.partial_folder(self._checkpoints, state.step)
        self._agree(state.step, 0, self._on_first(lambda: store.start_writing(self._checkpoints, state.step)))
        files = capture(partial)
        save = _Save(state, partial, self._check_space(state.step, size_bytes(files)), scores)
        self._agree(state.step, save.needed_bytes, self._on_first(lambda: write_model(partial / store.MODEL)))
        if self._policy.background:
            copy = self._snapshotter.copy(files)
            del files
            blocked = time.perf_counter() - started
            save.thread = threading.Thread(target=self._write_in_background, args=(save, copy, blocked), daemon=True)
            self._background = save
            save.thread.start()
            return
        self._agree(state.step, save.needed_bytes, self._write_own(save, files))
        self._agree(state.step, save.needed_bytes, self._on_first(lambda: self._finish(save)))
        seconds = time.perf_counter() - started
        self._agree(state.step, save.needed_bytes, self._on_first(lambda: self._log(save, seconds, seconds)))

    def wait(self) -> None:
        """Wait until a background save is complete on every rank. Raises TrainingError if it failed on any."""
        save, self._background = self._background, None
        if save is not None:
            assert save.thread is not None
            save.thread.join()
            self._agree(save.state.step, save.needed_bytes, save.error)

    # ---- one rank ------------------------------------------------------------------------------------

    def _attempt(self, action: Callable[[], object]) -> str:
        """What went wrong in an action on files; empty if nothing did. Bugs keep their traceback."""
        try:
            action()
        except OSError as error:
            return _describe(error)
        return ""

    def _on_first(self, action: Callable[[], object]) -> str:
        if not self._process.is_first:
            return ""
        self._check_owner()
        return self._attempt(action)

    def _write_own(self, save: _Save, files: dict[str, Any]) -> str:
        """Write this rank's files and tell the first rank; returns what went wrong."""
        records: dict[str, FileRecord] = {}
        error = self._attempt(lambda: records.update(write_files(save.partial, files)))
        report = RankReport({} if error else records, error)
        return self._attempt(lambda: store.write_report(save.partial, self._process.rank, report)) or error

    def _finish(self, save: _Save) -> None:
        """First rank, when all have written: announce, note scores, remove old checkpoints. Raises OSError."""
        deadline, written = time.monotonic() + self._recipe.parallel.timeout_seconds, -1
        records: dict[str, FileRecord] = {}
        for rank in range(self._process.ranks):
            while (report := store.read_report(save.partial, rank)) is None:
                if time.monotonic() > deadline:
                    before, written = written, sum(path.stat().st_size for path in save.partial.rglob("*"))
                    if written > before:  # a large file, a slow disk
                        deadline = time.monotonic() + self._recipe.parallel.timeout_seconds
                        continue
                    raise OSError(f"rank {rank} did not write its files in time")
                time.sleep(_POLL_SECONDS)
            if report.error:
                raise OSError(report.error)
            records |= report.records
        final = store.announce(save.partial, save.state, dump_recipe(self._recipe), records, self._check_owner)
        self._check_owner()
        if save.scores:
            retention.note_scores(self._checkpoints, save.state.step, save.scores)
        self._check_owner()
        retention.retain(self._checkpoints, self._policy, good={final})

    def _write_in_background(self, save: _Save, files: dict[str, Any], blocked: float) -> None:
        started = time.perf_counter()
        try:
            save.error = self._write_own(save, files) or self._on_first(lambda: self._finish(save))
            if not save.error:
                save.error = self._on_first(lambda: self._log(save, blocked, time.perf_counter() - started))
        except RimError as error:
            save.error = str(error)
        except Exception as error:
            save.error = f"{type(error).__name__}: {_describe(error)}"
            raise

    def _log(self, save: _Save, blocked: float, written: float) -> None:
        """First rank: a line on how long the loop stood still and how long the write took. Raises OSError."""
        line = {
            "step": save.state.step,
            "bytes": save.needed_bytes,
            "blocked_seconds": round(blocked, 4),
            "write_seconds": round(written, 4),
            "background": self._policy.background,
        }
        path = self._checkpoints / _SAVES
        with os_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    # ---- all ranks -----------------------------------------------------------------------------------

    def _check_space(self, step: int, own: int) -> int:
        """Bytes the checkpoint will take over all ranks; raises TrainingError if they do not fit.

        One file system is assumed to hold the files of all ranks, as resuming needs one.
        """
        total = torch.tensor([float(own)], dtype=torch.float64, device=self._process.device)
        if self._process.ranks > 1:
            dist.all_reduce(total)
        needed = int(total.item()) + _SMALL_FILES_BYTES
        too_small = self._process.is_first and needed > shutil.disk_usage(self._checkpoints).free
        self._agree(step, needed, "not enough space" if too_small else "")
        return needed

    def _agree(self, step: int, needed: int, error: str) -> None:
        """Raise on every rank if something went wrong on any. Each comes when its disk is done: no collective waits for it."""
        errors = self._process.share(error)
        if not any(errors):
            return
        message = ""
        if self._process.is_first:
            self._check_owner()
            shutil.rmtree(store.partial_folder(self._checkpoints, step), ignore_errors=True)
            earlier = store.complete_checkpoints(self._checkpoints)
            kept = f"{earlier[-1].name} is kept" if earlier else "there is no earlier one"
            rank = next((f" on rank {rank}" for rank, e in enumerate(errors) if e and rank), "")
            why = next(e for e in errors if e)
            message = (
                f"{self._checkpoints}: the checkpoint of step {step} cannot be written ({why}{rank}; "
                f"{room_for(needed, self._checkpoints)}); {kept}; put that right and start the same command again"
            )
        raise TrainingError(self._process.share(message)[0])
