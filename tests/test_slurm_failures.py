"""What goes wrong on a cluster, done to a real one: each run finishes by itself and ends as an undisturbed run does.

All are thorough. With -s, a line of figures each.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, missing
from slurm_jobs import (
    JOB_ENVIRONMENT,
    complete,
    job_output,
    last_step,
    lost_steps,
    rank_processes,
    same_parameters,
    shape,
    steps_recipe,
    train_job,
    until,
    wait_for_step,
)

from rim_dist.checkpoint.store import complete_checkpoints, find_checkpoint, read_state
from rim_dist.cluster.attempts import attempts_of

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"no SLURM cluster here: {missing()}"),
    pytest.mark.timeout(600),
]
long = pytest.mark.thorough
SMALL_BYTES = 48 * 2**20


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system that is soon full. Mounted before the nodes take over the mounts of this machine."""
    folder = tmp_path_factory.mktemp("small")
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def cluster(small: Path) -> Iterator[Cluster]:
    with Cluster(3) as running:
        yield running


@pytest.fixture(autouse=True)
def healthy(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.client("scancel", "--user=root", check=False)
    cluster.heal()


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    complete(cluster, train_job(cluster, steps_recipe(folder, "run")), folder / "run", 240)
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed_long(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twice as many steps, for what SLURM takes half a minute to notice."""
    folder = tmp_path_factory.mktemp("long")
    complete(cluster, train_job(cluster, steps_recipe(folder, "run", steps=300)), folder / "run", 240)
    return folder / "run"


def finish(cluster: Cluster, job: str, run: Path, undisturbed: Path, what: str, began: float, seconds: float = 300) -> None:
    """The job completes, the parameters are those of the undisturbed run, and little was done twice."""
    complete(cluster, job, run, seconds)
    lost, starts = lost_steps(run), attempts_of(run)
    print(f"\n| {what} | {len(starts) - 1} | {max(lost, default=0)} | {time.monotonic() - began:.0f} |", flush=True)
    assert len(starts) >= 2, "the run was not disturbed"
    assert all(steps <= 20 for steps in lost), lost
    same_parameters(run, undisturbed)
    assert (run / "hf" / "config.json").is_file()


Disturb = Callable[[Cluster, str, Path], None]


def requeue(cluster: Cluster, job: str, run: Path) -> None:
    cluster.client("scontrol", "requeue", job)


def preempt(cluster: Cluster, job: str, run: Path) -> None:
    cluster.sbatch("--partition=high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap=sleep 5")


def node_down(cluster: Cluster, job: str, run: Path) -> None:
    cluster.client("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")


def link_cut(cluster: Cluster, job: str, run: Path) -> None:
    cluster.cut_link("n2")


def rank_killed(cluster: Cluster, job: str, run: Path) -> None:
    for process in rank_processes(run, 1):
        os.kill(process, signal.SIGKILL)


def rank_stopped(cluster: Cluster, job: str, run: Path) -> None:
    processes = rank_processes(run, 1)
    assert processes, "rank 1 not found"
    for process in processes:
        os.kill(process, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("disturb", "flags"),
    [
        pytest.param(rank_killed, [], marks=long),
        pytest.param(requeue, [], marks=long),
        pytest.param(preempt, ["--partition=low"], marks=long),
        pytest.param(node_down, [], marks=long),
        pytest.param(link_cut, [], marks=long),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_disturbed_run_ends_like_an_undisturbed_one(
    disturb: Disturb, flags: list[str], cluster: Cluster, undisturbed: Path, tmp_path: Path
) -> None:
    job = train_job(cluster, steps_recipe(tmp_path, "run"), *flags)
    run = tmp_path / "run"
    wait_for_step(cluster, job, run, 50)
    began = time.monotonic()
    disturb(cluster, job, run)
    finish(cluster, job, run, undisturbed, disturb.__name__.replace("_", " "), began)
    if disturb is rank_killed:
        # n2 is left out, since n3 can take its place, and said why in the record.
        assert cluster.job(job)["ExcNodeList"] == "n2"
        assert attempts_of(run)[1].record["nodes"] == "n[1,3]"
        assert any(end["why"] == "killed by SIGKILL" and end["host"] == "n2" for end in attempts_of(run)[0].ended())


@long
def test_slurmd_killed_on_the_batch_host(cluster: Cluster, undisturbed_long: Path, tmp_path: Path) -> None:
    """What the node runs goes on after SLURM has given it up: script and ranks must leave the folder to the next start."""
    job = train_job(cluster, steps_recipe(tmp_path, "run", steps=300))
    run = tmp_path / "run"
    wait_for_step(cluster, job, run, 50)
    began = time.monotonic()
    cluster.kill_slurmd("n1")
    until(lambda: len(attempts_of(run)) == 2, 120, "a second start")
    finish(cluster, job, run, undisturbed_long, "slurmd killed on the batch host", began)
    assert len(attempts_of(run)) == 2
    assert attempts_of(run)[1].record["nodes"] == "n[2-3]"
    first = (attempts_of(run)[0].folder / "rank-00000.log").read_text()
    assert "has taken over" in first or "ended with 75" in first


@long
@pytest.mark.parametrize("when", ["before the first step", "in the middle"])
def test_second_job_of_a_run_leaves_it_alone(when: str, cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """The same sbatch twice, in any phase of the first: the second ends with 2, and the first is not disturbed."""
    recipe, run = steps_recipe(tmp_path, "run"), tmp_path / "run"
    first = train_job(cluster, recipe)
    if when == "in the middle":
        wait_for_step(cluster, first, run, 50)
    else:
        until(lambda: len(attempts_of(run)) == 1, 60, "the first start")
    second = train_job(cluster, recipe, "--nodes=1")
    cluster.wait(second, "FAILED", 60)
    assert cluster.job(second)["ExitCode"] == "2:0"
    assert f"job {first} (RUNNING) runs it; cancel that one (scancel {first})" in job_output(run)
    complete(cluster, first, run, 240)
    assert len(attempts_of(run)) == 1
    same_parameters(run, undisturbed)


@long
def test_second_step_of_a_job_leaves_the_first_alone(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """Two srun in one allocation: the second takes another port, sees the owner and ends with 2."""
    recipe, run = steps_recipe(tmp_path, "run"), tmp_path / "run"
    train = f"srun --overlap --nodes=1 --ntasks=1 {sys.executable} -m rim_dist train {recipe}"
    wrap = f"--wrap={train} & sleep 15; {train}; echo second ended with $?; wait"
    job = cluster.sbatch(*shape(1, 2), f"--output={tmp_path}/slurm-%j.out", wrap, **JOB_ENVIRONMENT)
    complete(cluster, job, run, 240)
    said = job_output(run)
    assert "runs it; stop that one, or choose another run.name" in said
    assert "second ended with 2" in said
    assert (run / "hf" / "config.json").is_file()


@long
@pytest.mark.parametrize(
    ("flags", "ranks"),
    [(["--nodes=2", "--ntasks=3", "--ntasks-per-node=2"], 3), (["--nodes=1", "--ntasks=2", "--ntasks-per-node=8"], 2)],
)
def test_as_many_ranks_as_slurm_counts(flags: list[str], ranks: int, cluster: Cluster, tmp_path: Path) -> None:
    """Uneven nodes, and fewer tasks than the template's for a node."""
    recipe, run = steps_recipe(tmp_path, "run", steps=10), tmp_path / "run"
    job = train_job(cluster, recipe, *flags)
    complete(cluster, job, run, 240)
    assert read_state(find_checkpoint(run)).ranks == ranks


@long
def test_hang_is_seen_and_ends(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """A rank that stops in the middle: the others' stack traces are written, the job goes on without the silent node."""
    job = train_job(cluster, steps_recipe(tmp_path, "run"), RIM_HANG_MINUTES="0.2")
    run = tmp_path / "run"
    wait_for_step(cluster, job, run, 50)
    began = time.monotonic()
    rank_stopped(cluster, job, run)
    finish(cluster, job, run, undisturbed, "hang", began)
    first = attempts_of(run)[0]
    stacks = (first.folder / "stacks-rank-00000.txt").read_text()
    assert "trainer.py" in stacks, stacks
    assert "does not answer" in (first.folder / "rank-00001.log").read_text()
    assert [end["host"] for end in first.ended() if end["suspect"]] == ["n2"]
    assert cluster.job(job)["ExcNodeList"] == "n2"


@long
def test_time_limit_is_seen_coming(cluster: Cluster, undisturbed_long: Path, tmp_path: Path) -> None:
    """SLURM looks every 30 s, so the signal comes up to 30 s early: here 10 to 40 s after each start."""
    began = time.monotonic()
    recipe = steps_recipe(tmp_path, "run", steps=300)
    job = train_job(cluster, recipe, "--time=2", "--signal=B:USR1@80")
    finish(cluster, job, tmp_path / "run", undisturbed_long, "time limit", began, 500)
    assert lost_steps(tmp_path / "run")
    assert max(lost_steps(tmp_path / "run")) == 0
    assert all(start.status in (0, 75) for start in attempts_of(tmp_path / "run"))


@long
def test_full_file_system_ends_the_job_and_keeps_the_last_checkpoint(cluster: Cluster, undisturbed: Path, small: Path) -> None:
    recipe = steps_recipe(small, "run")
    run = small / "run"
    job = train_job(cluster, recipe)
    wait_for_step(cluster, job, run, 50)
    began = time.monotonic()
    filler = small / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    cluster.wait(job, "FAILED", 120)
    assert cluster.job(job)["ExitCode"] == "1:0"
    state = read_state(find_checkpoint(run))
    assert 40 <= state.step < 300
    filler.unlink()
    again = train_job(cluster, recipe)
    finish(cluster, again, run, undisturbed, "file system full, then room made", began)


@long
def test_node_without_the_shared_folder_is_left_out(cluster: Cluster, undisturbed: Path, tmp_path: Path) -> None:
    """One node does not see the run's folder: it is named before the ranks start, and the job goes on without it."""
    recipe = steps_recipe(tmp_path, "run")
    slurmd = cluster.pid("n2")
    enter = ["nsenter", f"--target={slurmd}", "--mount"]
    subprocess.run([*enter, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=True)
    try:
        began = time.monotonic()
        job = train_job(cluster, recipe)
        finish(cluster, job, tmp_path / "run", undisturbed, "node without the shared folder", began)
    finally:
        subprocess.run([*enter, "umount", "--lazy", str(tmp_path)], check=True)
    assert cluster.job(job)["ExcNodeList"] == "n2"
    assert "n2 does not see" in job_output(tmp_path / "run")


@long
def test_no_progress_ends_the_job_with_a_reason(cluster: Cluster, tmp_path: Path) -> None:
    """Killed in every start before a checkpoint: after the restarts allowed it stops, with the reason in its output."""
    job = train_job(cluster, steps_recipe(tmp_path, "run"), RIM_MAX_RESTARTS="1")
    run = tmp_path / "run"
    for start in (1, 2):
        until(lambda: len(attempts_of(run)) == start and last_step(run) >= 1, 120, f"start {start}")  # noqa: B023
        rank_killed(cluster, job, run)
    cluster.wait(job, "FAILED", 120)
    assert cluster.job(job)["ExitCode"] == "1:0"
    assert not complete_checkpoints(run / "checkpoints")
    assert "2 starts in a row came no further than step 0" in job_output(run)
    assert "killed by SIGKILL" in job_output(run)
