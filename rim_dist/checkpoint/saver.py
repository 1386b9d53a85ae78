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
from rim_dist.checkpoint.store import Part, TrainingState
from rim_dist.config import Recipe
from rim_dist.errors import TrainingError
from rim_dist.files import FileRecord, room_for
from rim_dist.parallel.launch import Process
from rim_dist.recipe import dump_recipe

_SAVES = "saves.jsonl"
_SMALL_FILES_BYTES = 1 << 24  # recipe, state, tokenizer (Llama 3's takes 9 MB)
_POLL_SECONDS = 0.02


def _describe(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


@dataclass
class _Background:
    """A save that is still being written by this rank (and, on the first rank, waits for the others)."""

    step: int
    needed_bytes: int
    error: str = ""
    thread: threading.Thread | None = None


class CheckpointSaver:
    """Writes the checkpoints of a run. `save` and `wait` are collective: every rank calls them in the same order.

    No rank depends on another's exception: what went wrong on one is told to all, and all raise the same TrainingError with
    the last complete checkpoint in place.
    """

    def __init__(self, recipe: Recipe, checkpoints: Path, process: Process) -> None:
        self._recipe, self._checkpoints, self._process = recipe, checkpoints, process
        self._policy = recipe.checkpoint
        self._snapshotter = Snapshotter()
        self._background: _Background | None = None

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
        """Save what `capture` gives (this rank's files; collective) and what `write_model` writes (first rank only).

        With `checkpoint.background` it returns when the state is copied. Raises TrainingError if it cannot be written.
        """
        started = time.perf_counter()
        self.wait()
        step = state.step
        partial = store.partial_folder(self._checkpoints, step)
        self._agree(step, 0, self._attempt(lambda: store.start_writing(self._checkpoints, step)) if self._first else "")
        files = capture(partial)
        needed = self._check_space(step, size_bytes(files))
        self._agree(step, needed, self._attempt(lambda: write_model(partial / store.MODEL)) if self._first else "")
        if self._policy.background:
            copy = self._snapshotter.copy(files)
            del files
            running = self._background = _Background(step, needed)
            blocked = time.perf_counter() - started
            running.thread = threading.Thread(
                target=self._write_in_background, args=(running, state, partial, copy, scores, blocked), daemon=True
            )
            running.thread.start()
            return
        self._agree(step, needed, self._write_part(partial, files))
        if self._first:
            error = self._attempt(lambda: self._finish(state, partial, scores))
        self._agree(step, needed, error if self._first else "")
        if self._first:
            seconds = time.perf_counter() - started
            self._log(step, needed, seconds, seconds)

    def wait(self) -> None:
        """Until a background save is complete on every rank. Raises TrainingError if it failed on any."""
        running, self._background = self._background, None
        if running is not None:
            assert running.thread is not None
            running.thread.join()
            self._agree(running.step, running.needed_bytes, running.error)

    # ---- this rank's share ---------------------------------------------------------------------------

    @property
    def _first(self) -> bool:
        return self._process.is_first

    def _attempt(self, action: Callable[[], object]) -> str:
        """What went wrong in an action on files; empty if nothing did. Bugs keep their traceback."""
        try:
            action()
        except OSError as error:
            return _describe(error)
        return ""

    def _write_part(self, partial: Path, files: dict[str, Any]) -> str:
        """Write this rank's files and tell the first rank; returns what went wrong."""
        records: dict[str, FileRecord] = {}

        def write() -> None:
            records.update(write_files(partial, files))

        error = self._attempt(write)
        part = Part({} if error else records, error)
        return self._attempt(lambda: store.write_part(partial, self._process.rank, part)) or error

    def _finish(self, state: TrainingState, partial: Path, scores: dict[str, float]) -> None:
        """First rank, when all parts are there: announce, note scores, let old ones go."""
        records: dict[str, FileRecord] = {}
        for rank in range(self._process.ranks):
            part = store.read_part(partial, rank)
            if part is None:
                raise OSError(f"rank {rank} has not said that its share is written")
            records |= part.records
        final = store.announce(partial, state, dump_recipe(self._recipe), records)
        if scores:
            retention.note_scores(self._checkpoints, state.step, scores)
        retention.retain(self._checkpoints, self._policy, good={final})

    def _write_in_background(
        self,
        running: _Background,
        state: TrainingState,
        partial: Path,
        files: dict[str, Any],
        scores: dict[str, float],
        blocked: float,
    ) -> None:
        started = time.perf_counter()
        try:
            running.error = self._write_part(partial, files)
            if self._first and not running.error:
                running.error = self._wait_for_parts(partial) or self._attempt(lambda: self._finish(state, partial, scores))
                if not running.error:
                    self._log(state.step, running.needed_bytes, blocked, time.perf_counter() - started)
        except BaseException as error:
            running.error = f"{type(error).__name__}: {_describe(error)}"
            raise

    def _wait_for_parts(self, partial: Path) -> str:
        deadline = time.monotonic() + self._recipe.parallel.timeout_seconds
        for rank in range(self._process.ranks):
            while (part := store.read_part(partial, rank)) is None:
                if time.monotonic() > deadline:
                    return f"rank {rank} did not write its share in time"
                time.sleep(_POLL_SECONDS)
            if part.error:
                return part.error
        return ""

    # ---- all ranks -----------------------------------------------------------------------------------

    def _check_space(self, step: int, mine: int) -> int:
        """Bytes the checkpoint will take over all ranks; raises TrainingError, saying how many are missing, if they do not fit.

        One file system is assumed to hold all shares, as resuming needs one.
        """
        total = torch.tensor([float(mine)], dtype=torch.float64, device=self._process.device)
        if self._process.ranks > 1:
            dist.all_reduce(total)
        needed = int(total.item()) + _SMALL_FILES_BYTES
        error = ""
        if self._first:
            free = shutil.disk_usage(self._checkpoints).free
            if needed > free:
                error = "not enough space"
        self._agree(step, needed, error)
        return needed

    def _agree(self, step: int, needed: int, error: str) -> None:
        """Raise on every rank if something went wrong on any."""
        errors: list[Any] = [error]
        if self._process.ranks > 1:
            errors = [None] * self._process.ranks
            dist.all_gather_object(errors, error)
        if not any(errors):
            return
        message = ""
        if self._first:
            store.discard(self._checkpoints, step)
            earlier = store.complete_checkpoints(self._checkpoints)
            kept = f"{earlier[-1].name} is kept" if earlier else "there is no earlier one"
            space = f"; {room_for(needed, self._checkpoints)}"
            whose = next((f" on rank {rank}" for rank, e in enumerate(errors) if e and rank), "")
            why = next(e for e in errors if e)
            message = (
                f"{self._checkpoints}: the checkpoint of step {step} cannot be written ({why}{whose}{space}); {kept}; "
                "make room and start the same command again"
            )
        told: list[Any] = [message]
        if self._process.ranks > 1:
            dist.broadcast_object_list(told, src=0)
        raise TrainingError(told[0])

    def _log(self, step: int, size: int, blocked: float, written: float) -> None:
        """A line on how long the loop stood still and how long the write took."""
        line = {
            "step": step,
            "bytes": size,
            "blocked_seconds": round(blocked, 4),
            "write_seconds": round(written, 4),
            "background": self._policy.background,
        }
        with (self._checkpoints / _SAVES).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def read_saves(checkpoints: Path) -> list[dict[str, Any]]:
    """What `saves.jsonl` says: step, bytes, seconds the loop was blocked, seconds until it was on disk."""
    path = checkpoints / _SAVES
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
