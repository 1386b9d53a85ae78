"""Who writes into a file system, as the kernel reports it (fanotify(7)): an observer beside the code that is watched."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import struct
import threading
import time
from pathlib import Path

_NONBLOCK, _ADD, _FILESYSTEM, _MODIFY, _AT_FDCWD = 0x2, 0x1, 0x100, 0x2, -100
_EVENT = struct.Struct("=IBBHQii")  # length, version, reserved, length of this, what, file, process


class Writers:
    """`with Writers(mount) as writers: ...`: every write to a file below the mount point, from any mount namespace. Needs root.

    `seen`: (value of `variable` in the writing process, path below the mount point), repetitions left out; the value is a
    process id where the variable is not set, and `?` where the process had ended before it was asked.
    """

    def __init__(self, mount: Path, variable: str) -> None:
        self.seen: list[tuple[str, str]] = []
        self._mount, self._variable = str(mount), variable
        self._names: dict[int, tuple[str, str]] = {}  # by process: when it started, and its value
        self._done = threading.Event()

    def __enter__(self) -> Writers:
        libc = ctypes.CDLL(None, use_errno=True)
        self._queue = libc.fanotify_init(_NONBLOCK, os.O_RDONLY | os.O_LARGEFILE)
        flags = ctypes.c_uint(_ADD | _FILESYSTEM)
        if self._queue < 0 or libc.fanotify_mark(self._queue, flags, ctypes.c_uint64(_MODIFY), _AT_FDCWD, self._mount.encode()):
            raise OSError(ctypes.get_errno(), f"fanotify: {os.strerror(ctypes.get_errno())}", self._mount)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        os.close(self._queue)

    def wait(self, pattern: str, seconds: float) -> str | None:
        """The next path that matches from its beginning, as soon as it is written; None if none is in time."""
        looked, end = len(self.seen), time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(0.01)
            for looked in range(looked, len(self.seen)):  # noqa: B020
                if re.match(pattern, self.seen[looked][1]):
                    return self.seen[looked][1]
            looked = len(self.seen)
        return None

    def _read(self) -> None:
        while not self._done.is_set():
            if not select.select([self._queue], [], [], 0.2)[0]:
                continue
            events = os.read(self._queue, 2**16)
            while events:
                length, _, _, _, _, file, process = _EVENT.unpack_from(events)
                events = events[length:]
                assert file >= 0, "the kernel's queue of events ran over"
                path = os.readlink(f"/proc/self/fd/{file}").removeprefix(self._mount).lstrip("/").removesuffix(" (deleted)")
                os.close(file)
                entry = (self._name(process), path)
                if not self.seen or self.seen[-1] != entry:
                    self.seen.append(entry)

    def _name(self, process: int) -> str:
        found = ("", "?")
        with contextlib.suppress(OSError, IndexError):
            began = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
            found = self._names.get(process, found)
            if found[0] == began:
                return found[1]
            words = Path(f"/proc/{process}/environ").read_text(errors="replace").split("\0")
            values = dict(word.split("=", 1) for word in words if "=" in word)
            if values:
                found = self._names[process] = (began, values.get(self._variable) or str(process))
        return self._names.get(process, found)[1]
