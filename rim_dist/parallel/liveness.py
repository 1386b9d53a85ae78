"""Failure detection beside the collectives: which ranks are alive, which one failed first, and why.

A broken collective says that a peer is lost, not which, and one over NCCL may say nothing at all. So every rank runs a thread
with its own connection to the job's store. The thread answers pings, watches the processes of ranks on the same machine and
reads failures that others publish; a rank that still hangs some time after a failure is ended. What ranks must agree on before
they can trust a collective goes through the same store.

Keys, below `rim_dist/`: `peer/R` host and process of rank R; `ping` a counter that every thread polls, raised when the others
should look; `ack/R` the last ping that R answered; `entered/R` the last timed section that R entered; `failure` the first
failure; `seen/R`, `left/R`: R knows of the failure, R has left regularly.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rim_dist.errors import EXIT_TRY_AGAIN, PeerLost
from rim_dist.heartbeat import send_heartbeat
from rim_dist.messages import say
from rim_dist.parallel.environment import ProcessIdentity

_POLL_SECONDS = 0.5
_HANG_SECONDS = 20.0  # between a failure and the end of a rank that still hangs
_ANSWER_SECONDS = 5.0  # to hear of a failure, or to answer a ping
_EXIT_SECONDS = 10.0  # for a thread that is ending its rank
_FOLLOW_SECONDS = 10.0  # between two heartbeats of a rank that waits for another's files
_LINGER_SECONDS = 3.0  # the store ends with its rank, which waits this long for the others to have read it


@dataclass(frozen=True)
class Failure:
    """Why the job ends: a sentence that names the rank, and the status that every rank ends with."""

    text: str
    status: int


class LivenessMonitor:
    """One rank's view of which ranks are alive. All ranks of a job make theirs at the same time."""

    def __init__(self, store: Any, rank: int, ranks: int, holds_store: bool, seconds: float) -> None:
        """`holds_store`: the store ends with this rank. Raises PeerLost, naming ranks that do not check in in time."""
        from torch.distributed import PrefixStore

        self._store, self.rank, self.ranks, self._holds_store = PrefixStore("rim_dist", store), rank, ranks, holds_store
        self.failure: Failure | None = None
        self._peers: list[ProcessIdentity] = []
        self._acknowledged = self._entered = self._finished = self._exchanges = 0
        self._last_contact = time.monotonic()
        self._leaving = threading.Event()
        self._lock, self._ending = threading.Lock(), threading.RLock()
        me = ProcessIdentity.this()
        for key, value in (("ack", "0"), ("entered", "0"), ("peer", json.dumps(asdict(me)))):
            self._store.set(f"{key}/{rank}", value)
        everyone = [f"peer/{r}" for r in range(ranks)]
        if missing := self._missing(everyone, seconds):
            raise PeerLost(f"{self.name(missing)} joined and did not answer in {seconds:g} s; start the same command again")
        self._peers = [ProcessIdentity(**json.loads(text)) for text in self._store.multi_get(everyone)]
        self._local_peers = {r for r, peer in enumerate(self._peers) if r != rank and peer.machine == me.machine != ""}
        self._watched = set(self._local_peers)
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._thread.start()
        atexit.register(self._leaving.set)  # a thread inside the store's client must not meet the end of the interpreter

    @property
    def hosts(self) -> list[str]:
        """The host of every rank."""
        return [peer.host for peer in self._peers]

    def name(self, ranks: list[int]) -> str:
        """Ranks for a message, with their hosts once these are known."""
        shown = [f"{r} (host {self._peers[r].host})" if self._peers else str(r) for r in ranks[:8]]
        more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
        return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}{more}"

    # ---- before collectives can be trusted -------------------------------------------------------------

    def _missing(self, keys: list[str], seconds: float = float("inf")) -> list[int]:
        """Wait for keys; the numbers of those not set in time. Raises PeerLost if a rank fails meanwhile."""
        deadline, pause = time.monotonic() + seconds, 0.001
        while True:
            with self._store_may_be_gone():
                if self._store.check(keys):
                    return []
                if time.monotonic() > deadline:
                    return [number for number, key in enumerate(keys) if not self._store.check([key])]
            if self.failure is not None:
                raise self.error_for(self.failure)
            time.sleep(pause)
            pause = min(0.05, 2 * pause)

    def gather(self, value: str) -> list[str]:
        """The value of every rank on the first rank, an empty list on the others. Call it within a `timeout`."""
        self._exchanges += 1
        keys = [f"exchange/{self._exchanges}/{r}" for r in range(self.ranks)]
        self._store.set(keys[self.rank], value)
        if self.rank:
            return []
        self._missing(keys)
        return [text.decode() for text in self._store.multi_get(keys)]

    def broadcast(self, value: str) -> str:
        """The first rank's value, on every rank. Call it within a `timeout`."""
        self._exchanges += 1
        key = f"exchange/{self._exchanges}"
        if self.rank == 0:
            self._store.set(key, value)
        self._missing([key])
        return str(self._store.get(key).decode())

    def follow_first(self, action: Callable[[], None]) -> None:
        """Run an action on the first rank; the others wait for it, in no collective. Raises PeerLost if it fails there."""
        self._exchanges += 1
        key = f"exchange/{self._exchanges}"
        if self.rank == 0:
            action()
            self._store.set(key, "1")
        self._wait([key])

    def share(self, value: str) -> list[str]:
        """The value of every rank, on every rank; however long a rank works for its own, the others wait in no collective."""
        self._exchanges += 1
        key = f"exchange/{self._exchanges}"
        own = [f"{key}/{r}" for r in range(self.ranks)]
        self._store.set(own[self.rank], value)
        if self.rank == 0:
            self._wait(own)
            self._store.set(key, json.dumps([text.decode() for text in self._store.multi_get(own)]))
            for name in own:  # nobody else reads them, and a long run has many saves
                self._store.delete_key(name)
        self._wait([key])
        return list(json.loads(self._store.get(key)))

    def _wait(self, keys: list[str]) -> None:
        """Wait for keys without a limit, with heartbeats. Raises PeerLost if a rank fails meanwhile."""
        while missing := self._missing(keys, _FOLLOW_SECONDS):
            send_heartbeat(f"waiting for {self.name(missing) if len(keys) == self.ranks else 'the first rank'}")

    @contextlib.contextmanager
    def timeout(self, seconds: float, what: str) -> Iterator[None]:
        """A section that all ranks enter now and finish in time; else this rank names those that did not, and is ended."""
        self._entered += 1
        number = self._entered
        timer = threading.Timer(seconds, self._time_out, (seconds, what, number))
        timer.daemon = True
        timer.start()
        try:
            self._store.set(f"entered/{self.rank}", str(number))
            yield
        finally:
            self._finished = number
            timer.cancel()

    # ---- failures --------------------------------------------------------------------------------------

    def fail(self, what: str, status: int) -> None:
        """Publish that this rank failed and is about to end. Returns when the others know, or soon after."""
        with contextlib.suppress(RuntimeError):
            self._publish(Failure(f"{self.name([self.rank])} failed: {what}", status))
            self._linger("seen")

    def claim_exit(self) -> None:
        """Reserve the end of this process for the calling thread; waits if another thread is ending it already.

        What runs at an end need not bear two at once (coverage replaces `os._exit`, and crashed).
        """
        self._ending.acquire(timeout=_EXIT_SECONDS)

    def leave(self) -> None:
        """Announce that this rank ends regularly, so that no other rank reports it as lost."""
        self._leaving.set()
        self._thread.join(_ANSWER_SECONDS)
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "1")
            self._store.set(f"seen/{self.rank}", "1")
            self._linger("left" if self.failure is None else "seen")

    def find_failure(self) -> Failure | None:
        """Why a collective of this rank broke: the published failure, or the ranks that do not answer; None if all do."""
        with self._store_may_be_gone():
            self._check_local_peers()
            ping = self._store.add("ping", 1)
            deadline = time.monotonic() + _ANSWER_SECONDS
            while self.failure is None and time.monotonic() < deadline:
                time.sleep(0.05)
            if self.failure is None and (silent := self._silent(ping)):
                self._publish(Failure(f"{self.name(silent)} did not answer: killed, stopped or cut off", EXIT_TRY_AGAIN))
        return self.failure

    def error_for(self, failure: Failure) -> PeerLost:
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
            self._store.add("ping", 1)
            failure = Failure(**json.loads(first))
        self._accept(failure)

    def _accept(self, failure: Failure) -> None:
        """Take it as the job's failure, and end this rank if it still hangs some time later."""
        with self._lock:
            if self.failure is not None:
                return
            self.failure = failure
        end = threading.Timer(
            _HANG_SECONDS, self._end, (f"{self.error_for(failure)} (it still hung {_HANG_SECONDS:g} s later)",)
        )
        end.daemon = True
        end.start()

    @contextlib.contextmanager
    def _store_may_be_gone(self) -> Iterator[None]:
        """Suppress errors of the store. If its process has ended, that is the failure."""
        from torch.distributed import DistNetworkError

        try:
            yield
        except DistNetworkError:
            text = f"{self.name([0])} is gone: killed, or cut off"
            if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
                text = f"the launcher on {os.environ.get('MASTER_ADDR')}, which holds the job's store, is gone"
            self._accept(Failure(text, EXIT_TRY_AGAIN))
        except RuntimeError:
            pass  # too slow an answer

    def _linger(self, what: str) -> None:
        """The rank that holds the store waits until the others have set `what`, or are dead."""
        if not self._holds_store:
            return
        others, deadline = list(range(1, self.ranks)), time.monotonic() + _LINGER_SECONDS
        while others and time.monotonic() < deadline:
            others = [r for r in others if not self._store.check([f"{what}/{r}"]) and not self._is_dead(r)]
            time.sleep(0.01)

    def _is_dead(self, rank: int) -> bool:
        return rank in self._local_peers and not self._peers[rank].alive

    def _silent(self, ping: int) -> list[int]:
        """Ranks that have neither answered a ping nor left."""
        answers = self._store.multi_get([f"ack/{r}" for r in range(self.ranks)])
        silent = [r for r, answer in enumerate(answers) if int(answer) < ping and r != self.rank]
        return [r for r in silent if not self._store.check([f"left/{r}"])]

    # ---- the threads -----------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._leaving.wait(_POLL_SECONDS):
            with self._store_may_be_gone():
                self._answer_ping()
                self._last_contact = time.monotonic()
                self._check_local_peers()

    def _answer_ping(self) -> None:
        ping = self._store.add("ping", 0)
        if ping == self._acknowledged:
            return
        self._store.set(f"ack/{self.rank}", str(ping))
        self._acknowledged = ping
        if self._store.check(["failure"]):
            self._accept(Failure(**json.loads(self._store.get("failure"))))
            self._store.set(f"seen/{self.rank}", "1")

    def _check_local_peers(self) -> None:
        """The death of a process on this machine is certain, and known before any collective breaks."""
        for rank in [r for r in tuple(self._watched) if self._is_dead(r)]:  # two threads may be here
            self._watched.discard(rank)
            # A rank that raised has published that before it ended: then this is not the first failure.
            if not self._store.check([f"left/{rank}"]):
                self._publish(Failure(f"{self.name([rank])} is gone: killed, or out of memory", EXIT_TRY_AGAIN))

    def _time_out(self, seconds: float, what: str, number: int) -> None:
        """Section `number`, called `what`, has not finished in time: name the ranks that did not enter it."""
        text = f"{self.name([0])} did not answer: {what} did not end in {seconds:g} s"
        fired = time.monotonic()
        while self._last_contact < fired and time.monotonic() < fired + _ANSWER_SECONDS:
            time.sleep(0.1)
        if self._last_contact >= fired:  # otherwise the store does not answer, and a request to it would hang as well
            with self._store_may_be_gone():
                ping = self._store.add("ping", 1)
                deadline = time.monotonic() + _ANSWER_SECONDS
                while self.failure is None and (silent := self._silent(ping)) and time.monotonic() < deadline:
                    time.sleep(0.1)
                if self._finished >= number or self.failure is not None:
                    return
                entered = [int(n) for n in self._store.multi_get([f"entered/{r}" for r in range(self.ranks)])]
                # Ranks behind this one but not the last wait for the last ones, in groups that this rank is not in.
                behind = [r for r, n in enumerate(entered) if n == min(entered) < number]
                text = f"{what} did not end in {seconds:g} s, though every rank came to it: is the network between them open?"
                if silent or behind:
                    verb = "did not answer" if silent else "did not come to it"
                    text = f"{self.name(silent or behind)} {verb}: {what} did not end in {seconds:g} s"
                self._publish(Failure(text, EXIT_TRY_AGAIN))
        if self.failure is None:
            self._accept(Failure(text, EXIT_TRY_AGAIN))
        assert self.failure is not None
        self._end(str(self.error_for(self.failure)))

    def _end(self, text: str) -> None:
        """End this process with the failure's status and a last line of text."""
        assert self.failure is not None
        if self._ending.acquire(timeout=_EXIT_SECONDS):  # else the thread that has it hangs on its way out
            with contextlib.suppress(OSError):
                say(f"rim-dist: {text}")
            with contextlib.suppress(RuntimeError):
                self._linger("seen")
        os._exit(self.failure.status)


# A process has one monitor as it has one default process group; the command line needs it wherever an error came from.
_monitors: list[LivenessMonitor] = []


def start_monitor(rank: int, ranks: int, seconds: float) -> LivenessMonitor:
    """The monitor of the default process group, on a store connection of its own."""
    from torch.distributed.distributed_c10d import _get_default_store

    connection = _get_default_store().clone()  # type: ignore[attr-defined]  # missing in torch's stubs
    holds_store = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    _monitors.append(LivenessMonitor(connection, rank, ranks, holds_store, seconds))
    return _monitors[-1]


def current_monitor() -> LivenessMonitor | None:
    return _monitors[-1] if _monitors else None


def stop_monitor() -> None:
    """At the regular end of a command."""
    while _monitors:
        _monitors.pop().leave()
