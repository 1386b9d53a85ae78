"""One owner for a run's folder: a file in it, held by the first rank's process, that another start finds.

The owner touches `owner.json` as long as it lives; a start that sees it touched is refused. A start takes over at once where
the owner's process is known to have ended, and where it sees no touch for STALE_SECONDS by its own clock: clocks of hosts need
not agree, and a frozen owner looks like a lost one. It takes over by another file under the same name: the old owner touches
its own, a file without a name, and before it writes it sees that the name is another's, and ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rim_dist.errors import ConfigError, Superseded
from rim_dist.files import PARTIAL, describe_os_error, os_errors
from rim_dist.messages import say
from rim_dist.parallel.environment import ProcessIdentity

OWNER = "owner.json"
STALE_SECONDS = 60.0
_TOUCH_SECONDS = 5.0
_LOOK_SECONDS = 0.5


class Lease:
    """The right to write into a run's folder. Used by the first rank alone."""

    def __init__(self, run: Path, stale_seconds: float | None = None) -> None:
        self._run, self._path, self._stale_seconds = run, run / OWNER, stale_seconds or STALE_SECONDS
        job, restart = (os.environ.get(name, "") for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"))
        self._job = {"job": job, "restart": int(restart or 0)}
        self._file: int | None = None
        self._released = threading.Event()

    def acquire(self) -> None:
        """Become the owner. Raises ConfigError, naming the owner, if there is one that lives."""
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            while self._file is None:
                try:
                    self._file = self._write(self._path)
                except FileExistsError:
                    if self._may_take_over():
                        self._take_over()
        except OSError as error:
            raise ConfigError(f"{self._run}: cannot be written ({describe_os_error(error)})") from None
        time.sleep(_LOOK_SECONDS / 5)
        if not self._is_own():
            os.close(self._file)
            self._file = None
            raise ConfigError(f"{self._run}: another start has become its owner at the same moment; this one ends")
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._thread.start()

    def _write(self, path: Path) -> int:
        """A new file with this process's identity; stays open. Raises FileExistsError."""
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        with os_errors(path):
            os.write(file, (json.dumps({**asdict(ProcessIdentity.this()), **self._job}) + "\n").encode())
        return file

    def _take_over(self) -> None:
        own = self._path.with_name(f".{OWNER}-{secrets.token_hex(4)}")
        self._file = self._write(own)
        os.replace(own, self._path)
        # What the old owner has not finished it must not find again.
        for half in [*self._run.glob(f"*{PARTIAL}"), *(self._run / "checkpoints").glob(f"*{PARTIAL}")]:
            shutil.rmtree(half) if half.is_dir() else half.unlink(missing_ok=True)

    def _may_take_over(self) -> bool:
        """Whether the owner is gone; False if there is none any more. Raises ConfigError if it is seen to live."""
        began = time.monotonic()
        first = seen = _look(self._path)
        while seen is not None:
            _, owner = seen
            fields = {"host": "?", "machine": "", "pid": 0, "start_time": ""}
            process = ProcessIdentity(**{key: owner.get(key, default) for key, default in fields.items()})
            name = f"process {process.pid} on {process.host}" + (f" (job {owner['job']})" if owner.get("job") else "")
            if process.is_here and not process.alive:
                return True
            if owner.get("job") and owner["job"] == self._job["job"] and owner.get("restart", 0) < self._job["restart"]:
                say(f"{self._run}: taken over from {name}, which SLURM has restarted here")
                return True
            if seen != first:
                raise ConfigError(f"{self._run}: {name} runs it; stop that one, or choose another run.name")
            if time.monotonic() - began > self._stale_seconds:
                say(f"{self._run}: taken over from {name}, which gave no sign for {self._stale_seconds:g} s")
                return True
            if time.monotonic() - began < _LOOK_SECONDS / 2:
                say(f"{self._run}: owned by {name}; waiting for a sign of it, at most {self._stale_seconds:g} s")
            time.sleep(_LOOK_SECONDS)
            seen = _look(self._path)
        return False

    def check(self) -> None:
        """Raise Superseded if another start has become the owner; called before anything is written into the folder."""
        if not self._is_own():
            raise Superseded(f"{self._run}: another start has taken over this run; this one ends and writes nothing more")

    def _is_own(self) -> bool:
        assert self._file is not None
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _keep(self) -> None:
        assert self._file is not None
        while not self._released.wait(_TOUCH_SECONDS):
            with contextlib.suppress(OSError):  # a file system that is away for a while
                os.utime(self._file)

    def release(self) -> None:
        """Leave the folder to the next start."""
        if self._file is None:
            return
        self._released.set()
        self._thread.join()
        with contextlib.suppress(OSError):  # where it cannot be removed, the next start sees that its process has ended
            if self._is_own():
                self._path.unlink()
        with contextlib.suppress(OSError):
            os.close(self._file)
        self._file = None


def _look(path: Path) -> tuple[int, dict[str, Any]] | None:
    """When the owner last touched its file, and what it says; None if there is none. Opened, so that no cache answers."""
    try:
        with path.open(encoding="utf-8") as file:
            touched, text = os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None
    try:
        return touched, dict(json.loads(text))
    except (ValueError, TypeError):  # not yet written, or of somebody else
        return touched, {}
