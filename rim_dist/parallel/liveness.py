"""What ranks know of each other beside their collectives: who is there, who has failed, who is gone.

A broken collective says that a peer is lost, not which, and one over NCCL may say nothing at all. So every rank has a thread
that speaks to the job's store over a connection of its own. It answers roll calls, looks whether neighbours on the same
machine are alive and hears of failures; a rank that still hangs some time after one is ended. What ranks must agree on before
they can trust a collective goes through the same store.

Keys, below `rim_dist/`: `who/R` where rank R runs; `calls` the number of the last roll call, the bell that makes every thread
look; `here/R` the last call that R answered; `at/R` the last limited action that R began; `failure` the first failure;
`seen/R`, `left/R`: R knows of it, R has left as it should.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rim_dist.errors import EXIT_TRY_AGAIN, PeerLost
from rim_dist.messages import say
from rim_dist.parallel.environment import host_name

_POLL_SECONDS = 0.5
_HANG_SECONDS = 20.0  # between a failure and the end of a rank that still hangs
_ANSWER_SECONDS = 5.0  # to hear of a failure, or to answer a roll call
_EXIT_SECONDS = 10.0  # for a thread that is ending its rank
_LINGER_SECONDS = 3.0  # the store ends with its rank: so long it waits for the others to have read it


@dataclass(frozen=True)
class Failure:
    """Why the job ends: a sentence that names the rank, and the status that every rank ends with."""

    text: str
    status: int


@dataclass(frozen=True)
class _Peer:
    """Where a rank runs. `machine`: the kernel and the namespace in which its pid means something; empty if not known."""

    host: str
    machine: str
    pid: int
    began: str

    @staticmethod
    def this() -> _Peer:
        pid, machine = os.getpid(), ""
        with contextlib.suppress(OSError):
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
            machine = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        return _Peer(host_name(), machine, pid, _began(pid) or "")

    @property
    def alive(self) -> bool:
        return _began(self.pid) == self.began


def _began(pid: int) -> str | None:
    """When a process of this machine began (clock ticks since boot); None if there is none or only its remains."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


class LivenessMonitor:
    """This rank's place in the roll call of a job. Every rank makes one at the same time."""

    def __init__(self, store: Any, rank: int, ranks: int, holds_store: bool, seconds: float) -> None:
        """`holds_store`: the store ends with this rank. Raises PeerLost, with their numbers, if ranks do not come in time."""
        from torch.distributed import PrefixStore

        self._store, self.rank, self.ranks, self._holds_store = PrefixStore("rim_dist", store), rank, ranks, holds_store
        self.failure: Failure | None = None
        self._peers: list[_Peer] = []
        self._answered = self._begun = self._ended = self._exchanges = 0
        self._heard = time.monotonic()
        self._leaving = threading.Event()
        self._lock, self._ending = threading.Lock(), threading.RLock()
        me = _Peer.this()
        for key, value in (("here", "0"), ("at", "0"), ("who", json.dumps(asdict(me)))):
            self._store.set(f"{key}/{rank}", value)
        everyone = [f"who/{r}" for r in range(ranks)]
        if missing := self._missing(everyone, seconds):
            raise PeerLost(f"{_numbers(missing)} joined and did not answer in {seconds:g} s; start the same command again")
        self._peers = [_Peer(**json.loads(text)) for text in self._store.multi_get(everyone)]
        self._neighbours = {r for r, peer in enumerate(self._peers) if r != rank and peer.machine == me.machine != ""}
        self._watched = set(self._neighbours)
        self._thread = threading.Thread(target=self._attend, name="roll call", daemon=True)
        self._thread.start()
        atexit.register(self._leaving.set)  # a thread inside the store's client must not meet the end of the interpreter

    @property
    def hosts(self) -> list[str]:
        """The host of every rank."""
        return [peer.host for peer in self._peers]

    def name(self, ranks: list[int]) -> str:
        """Ranks with their hosts, for a message."""
        return _numbers(ranks, self.hosts)

    # ---- before collectives can be trusted -------------------------------------------------------------

    def _missing(self, keys: list[str], seconds: float = float("inf")) -> list[int]:
        """Wait for keys; the numbers of those that are not there in time. Raises PeerLost if a rank fails meanwhile."""
        deadline, pause = time.monotonic() + seconds, 0.001
        while True:
            with self._store_may_be_gone():
                if self._store.check(keys):
                    return []
                if time.monotonic() > deadline:
                    return [number for number, key in enumerate(keys) if not self._store.check([key])]
            if self.failure is not None:
                raise self.loss(self.failure)
            time.sleep(pause)
            pause = min(0.05, 2 * pause)

    def gather(self, value: str) -> list[str]:
        """The value of every rank, on the first one; nothing on the others. To be called within a `limit`."""
        self._exchanges += 1
        keys = [f"exchange/{self._exchanges}/{r}" for r in range(self.ranks)]
        self._store.set(keys[self.rank], value)
        if self.rank:
            return []
        self._missing(keys)
        return [text.decode() for text in self._store.multi_get(keys)]

    def broadcast(self, value: str) -> str:
        """The first rank's value, on every rank. To be called within a `limit`."""
        self._exchanges += 1
        key = f"exchange/{self._exchanges}"
        if self.rank == 0:
            self._store.set(key, value)
        self._missing([key])
        return str(self._store.get(key).decode())

    @contextlib.contextmanager
    def limit(self, seconds: float, what: str) -> Iterator[None]:
        """All ranks come to `what` now and end it in so many seconds. If not, this one says which did not, and is ended."""
        self._begun += 1
        number = self._begun
        timer = threading.Timer(seconds, self._end_late, (seconds, what, number))
        timer.daemon = True
        timer.start()
        try:
            self._store.set(f"at/{self.rank}", str(number))
            yield
        finally:
            self._ended = number
            timer.cancel()

    # ---- failures --------------------------------------------------------------------------------------

    def fail(self, what: str, status: int) -> None:
        """This rank has reported an error and is about to end. Returns when the others know, or soon after."""
        with contextlib.suppress(RuntimeError):
            self._publish(Failure(f"{self.name([self.rank])} failed: {what}", status))
            self._linger("seen")

    def claim_exit(self) -> None:
        """The caller is about to end this process. If another thread of the roll call is doing so, it does.

        What runs at an end need not bear two at once (coverage replaces `os._exit`, and crashed).
        """
        self._ending.acquire(timeout=_EXIT_SECONDS)

    def leave(self) -> None:
        """This rank ends as it should; nobody is to miss it."""
        self._leaving.set()
        self._thread.join(_ANSWER_SECONDS)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "1")
            self._store.set(f"seen/{self.rank}", "1")
            self._linger("left" if self.failure is None else "seen")

    def find_failure(self) -> Failure | None:
        """Why a collective of this rank broke: the failure that was published, or who does not answer; None if all do."""
        with self._store_may_be_gone():
            self._look_at_neighbours()
            call = self._store.add("calls", 1)
            deadline = time.monotonic() + _ANSWER_SECONDS
            while self.failure is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if self.failure is None and (absent := self._absent(call)):
                self._publish(Failure(f"{self.name(absent)} did not answer: killed, stopped or cut off", EXIT_TRY_AGAIN))
        return self.failure

    def loss(self, failure: Failure) -> PeerLost:
        """The error that another rank's failure is to this one."""
        again = "; what was saved is kept; start the same command again" if failure.status == EXIT_TRY_AGAIN else ""
        error = PeerLost(f"rank {self.rank}: lost a peer: {failure.text}{again}")
        error.exit_status = failure.status
        return error

    def _publish(self, failure: Failure) -> None:
        """Make it the job's failure, unless there is one already."""
        with self._store_may_be_gone():
            first = self._store.compare_set("failure", "", json.dumps(asdict(failure)))
            self._store.set(f"seen/{self.rank}", "1")
            self._store.add("calls", 1)
            failure = Failure(**json.loads(first))
        self._learn(failure)

    def _learn(self, failure: Failure) -> None:
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        end = threading.Timer(_HANG_SECONDS, self._end, (f"{self.loss(failure)} (it still hung {_HANG_SECONDS:g} s later)",))
        end.daemon = True
        end.start()

    @contextlib.contextmanager
    def _store_may_be_gone(self) -> Iterator[None]:
        """Errors of the store end here; if its process has ended, that is the failure."""
        from torch.distributed import DistNetworkError

        try:
            yield
        except DistNetworkError:
            text = f"{self.name([0])} is gone: killed, or cut off"
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                text = f"the launcher on {os.environ.get('MASTER_ADDR')}, which holds the job's store, is gone"
            self._learn(Failure(text, EXIT_TRY_AGAIN))
        except RuntimeError:
            pass  # too slow an answer

    def _linger(self, what: str) -> None:
        """The store's rank waits until the others know or have left."""
        if not self._holds_store:
            return
        others, deadline = list(range(1, self.ranks)), time.monotonic() + _LINGER_SECONDS
        while others and time.monotonic() < deadline:
            others = [r for r in others if not self._store.check([f"{what}/{r}"]) and not self._is_dead(r)]
            time.sleep(0.01)

    def _is_dead(self, rank: int) -> bool:
        return rank in self._neighbours and not self._peers[rank].alive

    def _absent(self, call: int) -> list[int]:
        """Ranks that have neither answered a roll call nor left."""
        answers = self._store.multi_get([f"here/{r}" for r in range(self.ranks)])
        silent = [r for r, answer in enumerate(answers) if int(answer) < call and r != self.rank]
        return [r for r in silent if not self._store.check([f"left/{r}"])]

    # ---- the threads -----------------------------------------------------------------------------------

    def _attend(self) -> None:
        while not self._leaving.wait(_POLL_SECONDS):
            with self._store_may_be_gone():
                self._answer()
                self._heard = time.monotonic()
                self._look_at_neighbours()

    def _answer(self) -> None:
        call = self._store.add("calls", 0)
        if call == self._answered:
            return
        self._store.set(f"here/{self.rank}", str(call))
        self._answered = call
        if self._store.check(["failure"]):
            self._learn(Failure(**json.loads(self._store.get("failure"))))
            self._store.set(f"seen/{self.rank}", "1")

    def _look_at_neighbours(self) -> None:
        """A neighbour's death is certain, and known here before any collective breaks."""
        for rank in [r for r in self._watched if self._is_dead(r)]:
            self._watched.discard(rank)
            # One that raised has said so before it went: then this is not the first failure.
            if not self._store.check([f"left/{rank}"]):
                self._publish(Failure(f"{self.name([rank])} is gone: killed, or out of memory", EXIT_TRY_AGAIN))

    def _end_late(self, seconds: float, what: str, number: int) -> None:
        """`what` has not ended in time: say who did not come to it."""
        text = f"{self.name([0])} did not answer: {what} did not end in {seconds:g} s"
        fired = time.monotonic()
        while self._heard < fired and time.monotonic() < fired + _ANSWER_SECONDS:
            time.sleep(0.1)
        if self._heard >= fired:  # otherwise the store does not answer: to ask it would be to hang as well
            with self._store_may_be_gone():
                call = self._store.add("calls", 1)
                deadline = time.monotonic() + _ANSWER_SECONDS
                while self.failure is None and (absent := self._absent(call)) and time.monotonic() < deadline:
                    time.sleep(0.1)
                if self._ended >= number or self.failure is not None:
                    return
                begun = [int(n) for n in self._store.multi_get([f"at/{r}" for r in range(self.ranks)])]
                # Others that are behind wait for the last ones, in groups that this rank is not in.
                behind = [r for r, n in enumerate(begun) if n == min(begun) < number]
                text = f"{what} did not end in {seconds:g} s, though every rank came to it: is the network between them open?"
                if absent or behind:
                    verb = "did not answer" if absent else "did not come to it"
                    text = f"{self.name(absent or behind)} {verb}: {what} did not end in {seconds:g} s"
                self._publish(Failure(text, EXIT_TRY_AGAIN))
        if self.failure is None:
            self._learn(Failure(text, EXIT_TRY_AGAIN))
        assert self.failure is not None
        self._end(str(self.loss(self.failure)))

    def _end(self, text: str) -> None:
        assert self.failure is not None
        if self._ending.acquire(timeout=_EXIT_SECONDS):  # else whoever has it hangs on the way out
            with contextlib.suppress(OSError):
                say(f"rim-dist: {text}")
            with contextlib.suppress(RuntimeError):
                self._linger("seen")
        os._exit(self.failure.status)


def _numbers(ranks: list[int], hosts: list[str] | None = None) -> str:
    shown = [f"{r} (host {hosts[r]})" if hosts else str(r) for r in ranks[:8]]
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}{more}"


# A process has one roll call as it has one default process group: its way out needs it wherever an error came from.
_attending: list[LivenessMonitor] = []


def attend(rank: int, ranks: int, seconds: float) -> LivenessMonitor:
    """Join the roll call of the default process group."""
    from torch.distributed.distributed_c10d import _get_default_store

    own_connection = _get_default_store().clone()  # type: ignore[attr-defined]  # missing in torch's stubs
    holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    monitor = LivenessMonitor(own_connection, rank, ranks, holds_store, seconds)
    _attending.append(monitor)
    return monitor


def current() -> LivenessMonitor | None:
    return _attending[-1] if _attending else None


def dismiss() -> None:
    """Leave the roll call, if this process attends one."""
    while _attending:
        _attending.pop().leave()
