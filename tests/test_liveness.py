"""The liveness monitor alone, without collectives: who is named when a rank raises, dies, stops or does not come."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from forked import Job
from ranks import free_port

from rim_dist.errors import PeerLost
from rim_dist.parallel import liveness

Body = Callable[[liveness.LivenessMonitor], None]
HANG_SECONDS, SEARCH_SECONDS, LIMIT_SECONDS = 3.0, 2.0, 1.0


def _monitored(store: Any, rank: int, ranks: int, body: Body) -> None:
    liveness._POLL_SECONDS, liveness._HANG_SECONDS, liveness._ANSWER_SECONDS = 0.1, HANG_SECONDS, SEARCH_SECONDS
    monitor = liveness.LivenessMonitor(store, rank, ranks, holds_store=rank == 0, seconds=30)
    assert monitor.hosts == [f"n{r}" for r in range(ranks)]
    monitor.gather("")
    monitor.broadcast("")
    monitor._store.set(f"ready/{rank}", "1")
    while rank == 0 and not monitor._store.check([f"ready/{r}" for r in range(ranks)]):
        time.sleep(0.01)  # the store's rank goes on when nobody is still reading; others may have failed by then
    body(monitor)


def job_of(body: Body, folder: Path, stopped: int | None = None) -> Job:
    return Job(_monitored, 3, folder, body, stopped=stopped)


def _report(monitor: liveness.LivenessMonitor) -> None:
    """What a rank does whose collective broke."""
    failure = monitor.find_failure()
    assert failure is not None
    print(monitor.error_for(failure), file=sys.stderr, flush=True)
    monitor.claim_exit()
    monitor.leave()
    os._exit(failure.status)


def _collective(monitor: liveness.LivenessMonitor, lost: int) -> None:
    """A collective that breaks when its peer is gone."""
    while monitor._peers[lost].alive:
        time.sleep(0.01)
    _report(monitor)


# ---- failures ------------------------------------------------------------------------------------------------


def _killed(monitor: liveness.LivenessMonitor) -> None:
    if monitor.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    _collective(monitor, 1)


def test_killed_rank_is_named(tmp_path: Path) -> None:
    job = job_of(_killed, tmp_path)
    assert job.statuses == [75, -signal.SIGKILL, 75]
    for rank in (0, 2):
        assert f"rank {rank}: lost a peer: rank 1 (host n1) is gone: killed, or out of memory;" in job.said[rank]


def _store_killed(monitor: liveness.LivenessMonitor) -> None:
    if monitor.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    _collective(monitor, 0)


def test_killed_rank_that_held_the_store_is_named(tmp_path: Path) -> None:
    job = job_of(_store_killed, tmp_path)
    assert job.statuses == [-signal.SIGKILL, 75, 75]
    assert all(f"rank {rank}: lost a peer: rank 0 (host n0) is gone: killed" in job.said[rank] for rank in (1, 2))


def _raises(monitor: liveness.LivenessMonitor, culprit: int) -> None:
    if monitor.rank == culprit:
        print("first", file=sys.stderr, flush=True)
        monitor.claim_exit()
        monitor.fail("ValueError: boom", 1)
        os._exit(1)
    if monitor.rank == 2:
        time.sleep(60)  # hangs where nothing breaks
    _collective(monitor, culprit)


def _raises_1(monitor: liveness.LivenessMonitor) -> None:
    _raises(monitor, 1)


def _raises_0(monitor: liveness.LivenessMonitor) -> None:
    _raises(monitor, 0)


@pytest.mark.parametrize(("body", "culprit"), [(_raises_1, 1), (_raises_0, 0)], ids=["rank 1", "rank 0"])
def test_rank_that_raises_ends_all_with_its_status(body: Body, culprit: int, tmp_path: Path) -> None:
    """Also one that hangs, some time later, and also if the store ends with the rank that raised."""
    job = job_of(body, tmp_path)
    assert job.statuses == [1, 1, 1]
    assert job.said[culprit] == "first\n"
    loss = f"lost a peer: rank {culprit} (host n{culprit}) failed: ValueError: boom"
    assert job.said[1 - culprit] == f"rank {1 - culprit}: {loss}\n"
    assert job.said[2] == f"rim-dist: rank 2: {loss} (it still hung {HANG_SECONDS:g} s later)\n"


def _follow(monitor: liveness.LivenessMonitor) -> None:
    """The first rank takes longer than the others wait at a time, and fails the second time."""
    liveness._FOLLOW_SECONDS = 0.1

    def write() -> None:
        time.sleep(0.5)
        print("written", file=sys.stderr, flush=True)

    def fail() -> None:
        time.sleep(0.2)
        monitor.claim_exit()
        monitor.fail("OSError: full", 1)
        os._exit(1)

    began = time.monotonic()
    monitor.follow_first(write)
    assert time.monotonic() - began >= 0.4
    try:
        monitor.follow_first(fail)
    except PeerLost as error:
        print(error, file=sys.stderr, flush=True)
        monitor.claim_exit()
        monitor.leave()
        os._exit(error.exit_status)


def test_ranks_wait_for_the_first_one_as_long_as_it_lives(tmp_path: Path) -> None:
    job = job_of(_follow, tmp_path)
    assert job.statuses == [1, 1, 1]
    assert job.said[0] == "written\n"
    assert job.said[1:] == [f"rank {rank}: lost a peer: rank 0 (host n0) failed: OSError: full\n" for rank in (1, 2)]


def _share(monitor: liveness.LivenessMonitor) -> None:
    """Each rank in its turn is the late one; then one fails instead of coming."""
    for late in range(monitor.ranks):
        began = time.monotonic()
        if monitor.rank == late:
            time.sleep(0.4)
        assert monitor.share(f"{late} of {monitor.rank}") == [f"{late} of {r}" for r in range(monitor.ranks)]
        assert time.monotonic() - began >= 0.3
    if monitor.rank == 2:
        monitor.claim_exit()
        monitor.fail("a reason", 2)
        os._exit(2)
    try:
        monitor.share("")
    except PeerLost as error:
        monitor.claim_exit()
        monitor.leave()
        os._exit(error.exit_status)


def test_ranks_share_what_each_found_however_long_one_takes(tmp_path: Path) -> None:
    assert job_of(_share, tmp_path).statuses == [2, 2, 2]


def _stopped(monitor: liveness.LivenessMonitor) -> None:
    """A rank that neither ends nor answers: a node that is cut off looks like this to the others."""
    if monitor.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    _report(monitor)


def test_rank_that_does_not_answer_is_named(tmp_path: Path) -> None:
    job = job_of(_stopped, tmp_path, stopped=1)
    assert [job.statuses[rank] for rank in (0, 2)] == [75, 75]
    assert all("rank 1 (host n1) did not answer: killed, stopped or cut off;" in job.said[rank] for rank in (0, 2))


def _nobody_lost(monitor: liveness.LivenessMonitor) -> None:
    if monitor.rank == 0:
        assert monitor.find_failure() is None
    else:
        time.sleep(SEARCH_SECONDS + 1)
    monitor.leave()


def test_nobody_is_accused_who_answers_or_left_as_he_should(tmp_path: Path) -> None:
    job = job_of(_nobody_lost, tmp_path)
    assert (job.statuses, job.said) == ([0, 0, 0], ["", "", ""])


def _ends_twice(monitor: liveness.LivenessMonitor) -> None:
    """Main threads on their way out, and the thread of a time limit. `os._exit` takes a while, as coverage's."""
    really_exit = os._exit

    def slow_exit(status: int) -> NoReturn:
        print(f"exit by {threading.current_thread().name}", file=sys.stderr, flush=True)
        time.sleep(1)
        really_exit(status)

    liveness._EXIT_SECONDS = 8.0  # longer than the store lingers
    os._exit = slow_exit
    monitor.failure = liveness.Failure("a reason", 7)
    limit = threading.Thread(target=monitor._end, args=("too late",), name="limit")
    if monitor.rank == 0:
        limit.start()
        time.sleep(0.2)
    monitor.claim_exit()
    if monitor.rank == 1:
        limit.start()
    if monitor.rank == 2:
        limit.start()
        time.sleep(60)  # hangs on its way out
    os._exit(3)


def test_one_thread_ends_a_rank(tmp_path: Path) -> None:
    job = job_of(_ends_twice, tmp_path)
    assert job.statuses == [7, 3, 7]
    assert job.said == ["rim-dist: too late\nexit by limit\n", "exit by MainThread\n", "exit by limit\n"]


# ---- limits and exchanges ------------------------------------------------------------------------------------


def _does_not_come(monitor: liveness.LivenessMonitor) -> None:
    if monitor.rank == 1:
        time.sleep(60)
    with monitor.timeout(LIMIT_SECONDS, "the all-reduce"):
        time.sleep(60)


def _holder_stops(monitor: liveness.LivenessMonitor) -> None:
    if monitor.rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    with monitor.timeout(LIMIT_SECONDS, "the all-reduce"):
        monitor.broadcast("")


def _all_come(monitor: liveness.LivenessMonitor) -> None:
    with monitor.timeout(LIMIT_SECONDS, "the all-reduce"):
        time.sleep(60)


@pytest.mark.parametrize(
    ("body", "stopped", "message"),
    [
        (_does_not_come, None, "rank 1 (host n1) did not come to it: the all-reduce did not end in 1 s"),
        (_holder_stops, 0, "rank 0 (host n0) did not answer: the all-reduce did not end in 1 s"),
        (_all_come, None, "the all-reduce did not end in 1 s, though every rank came to it"),
    ],
    ids=["does not come", "is stopped", "all come"],
)
def test_limit_names_who_does_not_come(body: Body, stopped: int | None, message: str, tmp_path: Path) -> None:
    job = job_of(body, tmp_path, stopped)
    for rank in {0, 1, 2} - {stopped}:
        assert job.statuses[rank] == 75
        assert f"rim-dist: rank {rank}: lost a peer: {message}" in job.said[rank]


def _exchange(monitor: liveness.LivenessMonitor) -> None:
    for number in range(3):
        with monitor.timeout(30, "the exchange"):
            gathered = monitor.gather(f"{number}/{monitor.rank}")
            assert gathered == ([f"{number}/{r}" for r in range(monitor.ranks)] if monitor.rank == 0 else [])
            assert monitor.broadcast(f"{number}/{monitor.rank}") == f"{number}/0"
    if monitor.rank == 2:
        monitor.claim_exit()
        monitor.fail("a reason", 2)
        os._exit(2)
    try:
        monitor.gather("")
        monitor.broadcast("")
    except PeerLost as error:
        print(error, file=sys.stderr, flush=True)
        monitor.claim_exit()
        monitor.leave()
        os._exit(error.exit_status)


def test_exchange_and_a_rank_that_fails_in_it(tmp_path: Path) -> None:
    job = job_of(_exchange, tmp_path)
    assert job.statuses == [2, 2, 2]
    assert job.said[:2] == [f"rank {rank}: lost a peer: rank 2 (host n2) failed: a reason\n" for rank in (0, 1)]


def test_rank_that_joined_and_says_nothing_is_named(tmp_path: Path) -> None:
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", free_port(), 3, is_master=True, wait_for_workers=False)
    with pytest.raises(PeerLost, match=r"^ranks 1, 2 joined and did not answer in 0.1 s"):
        liveness.LivenessMonitor(store, 0, 3, holds_store=True, seconds=0.1)
