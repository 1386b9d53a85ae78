"""The job scripts on a real cluster of several hosts: every launcher, the chain, sweep, submit.

What takes more than a few minutes is thorough.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import tiny_recipe, write_recipe
from ranks import ROOT, run
from slurm_cluster import Cluster, missing
from slurm_jobs import JOB_ENVIRONMENT, complete, demo_cut, last_step, losses, shape, steps_recipe, until

from rim_dist.cluster.attempts import attempts_of
from rim_dist.cluster.status import describe

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"no SLURM cluster here: {missing()}"),
    pytest.mark.timeout(600),
]
long = pytest.mark.thorough


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with Cluster(4) as running:
        yield running


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[str]], list[tuple[str, int, float]]]:
    """The losses of one process with the overrides given."""
    folder = tmp_path_factory.mktemp("one")

    @functools.cache
    def train(cut: tuple[str, ...]) -> list[tuple[str, int, float]]:
        name = f"one-{len(list(folder.iterdir()))}"
        own = [f"run.output_dir={folder}", f"run.name={name}"]
        run("fork", 1, ["-m", "rim_dist", "train", "recipes/demo.yaml", *cut, *own])
        return losses(folder / name)

    return lambda cut: train(tuple(cut))


@pytest.mark.parametrize(
    ("launcher", "nodes", "ranks", "steps"),
    [
        ("srun", 2, 1, 5),
        pytest.param("srun", 2, 2, 20, marks=long),
        pytest.param("mpi", 2, 2, 20, marks=long),
        pytest.param("torchrun", 2, 2, 20, marks=long),
        pytest.param("deepspeed", 2, 2, 20, marks=long),
        pytest.param("mpirun", 2, 2, 20, marks=long),
        pytest.param("srun", 4, 1, 20, marks=long),
    ],
)
def test_every_launcher_equals_one_process(
    launcher: str,
    nodes: int,
    ranks: int,
    steps: int,
    cluster: Cluster,
    tmp_path: Path,
    one_process: Callable[[list[str]], list[tuple[str, int, float]]],
) -> None:
    """The demo's recipe cut to some steps a stage."""
    cut = demo_cut(steps)
    began = time.monotonic()
    script = "slurm/mpi.sbatch" if launcher.startswith("mpi") else "slurm/train.sbatch"
    job = cluster.sbatch(
        *shape(nodes, ranks),
        f"--output={tmp_path}/slurm-%j.out",
        script,
        "recipes/demo.yaml",
        *cut,
        f"run.output_dir={tmp_path}",
        "run.name=several",
        **JOB_ENVIRONMENT,
        RIM_LAUNCHER=launcher,
    )
    complete(cluster, job, tmp_path / "several", 300)
    found, expected = losses(tmp_path / "several"), one_process(cut)
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    assert len(found) == 2 * steps
    worst = max(abs(a[2] / b[2] - 1) for a, b in zip(found, expected, strict=True))
    print(f"\n| {launcher} | {nodes} x {ranks} | {worst:.1e} | {time.monotonic() - began:.0f} |", flush=True)
    assert worst <= 1e-5
    (start,) = attempts_of(tmp_path / "several")
    assert start.status == 0
    # Every rank has its log, and says from which host.
    hosts = [(start.folder / f"rank-{rank:05d}.log").read_text().split(" ", 2)[1] for rank in range(nodes * ranks)]
    assert hosts == [f"n{1 + rank // ranks}" for rank in range(nodes * ranks)]
    assert not list(start.folder.glob("ended-*"))


def curriculum(cluster: Cluster, recipe: Path, *overrides: str, **environment: str) -> list[str]:
    """Start the chain; returns its job ids."""
    command = ["slurm/curriculum.sh", *shape(2, 1), str(recipe), *overrides]
    site = str(recipe.parent / "site.env")
    output = cluster.client(*command, **JOB_ENVIRONMENT, **environment, RIM_SITE=site)
    assert "to cancel: scancel" in output
    return output.split("scancel ")[1].split()


def chain_recipe(folder: Path) -> Path:
    # A container is a command in front of python: here one that leaves a mark in the environment.
    settings = "RIM_PARTITION=batch\nRIM_CONTAINER=(env RIM_IN_CONTAINER=1)\nRIM_HANG_MINUTES=7\nRIM_LAUNCHER=torchrun\n"
    (folder / "site.env").write_text(settings)
    return write_recipe(folder / "recipe.yaml", tiny_recipe(folder, run={"name": "chain"}, parallel={"zero_stage": 1}))


@long
def test_chain_goes_from_nothing_to_an_export_that_answers(cluster: Cluster, tmp_path: Path) -> None:
    began = time.monotonic()
    jobs = curriculum(cluster, chain_recipe(tmp_path), RIM_LAUNCHER="srun")
    folder = tmp_path / "chain"
    assert len(jobs) == 5
    for job in jobs:
        complete(cluster, job, folder, 200)
    print(f"\nchain of 5 jobs: {time.monotonic() - began:.0f} s", flush=True)
    times = [cluster.job(job)[name] for job in jobs for name in ("StartTime", "EndTime")]
    assert times == sorted(times), "each job began after the one before it"
    assert sorted(path.name for path in (folder / "report").glob("evaluation-*")) == [
        "evaluation-step-00000004",
        "evaluation-step-00000008",
    ]
    for step in ("00000004", "00000008"):
        report = json.loads((folder / "report" / f"evaluation-step-{step}" / "evaluation.json").read_text())
        assert len(report["per_block"]) == 3
    done = run("python", 1, ["-m", "rim_dist", "generate", str(folder / "exports" / "final"), "From the attic take red."])
    assert done.stdout.endswith("\n")  # whatever so short a training answers
    # Two jobs trained what one run trains: the second stage began where the first job had saved.
    assert "resumed from" in (attempts_of(folder)[1].folder / "rank-00000.log").read_text()
    assert describe(folder).startswith(f"{folder.name}: finished\n")
    for start in attempts_of(folder):
        seen = {name: start.record["environment"][f"RIM_{name}"] for name in ("IN_CONTAINER", "HANG_MINUTES", "LAUNCHER")}
        # What was set for the job goes before the site's.
        assert seen == {"IN_CONTAINER": "1", "HANG_MINUTES": "7", "LAUNCHER": "srun"}


@long
def test_failing_stage_leaves_nothing_in_the_queue(cluster: Cluster, tmp_path: Path) -> None:
    no_data = ["data.source=jsonl", f"data.path={tmp_path}/none.jsonl", "evaluation.data=synthetic"]
    jobs = curriculum(cluster, chain_recipe(tmp_path), *no_data)
    cluster.wait(jobs[0], "FAILED", 120)
    until(lambda: not cluster.client("squeue", "-h", "-j", ",".join(jobs)).strip(), 30, "an empty queue")
    assert [cluster.job(job)["JobState"] for job in jobs[1:]] == ["CANCELLED"] * 4
    output = (tmp_path / "chain" / "logs" / f"slurm-{jobs[0]}.out").read_text()
    assert "none.jsonl" in output
    assert "ended with 2" in output
    assert cluster.job(jobs[0])["ExitCode"] == "2:0"


def test_templates_are_accepted_as_rendered_for_every_site(cluster: Cluster, tmp_path: Path) -> None:
    """sbatch --test-only: the controller says whether it would run them."""
    from test_slurm_scripts import SITES

    recipe = chain_recipe(tmp_path)
    for name, text in SITES.items():
        site = tmp_path / f"{name}.env"
        # This cluster has one account for all and partitions of its own.
        site.write_text(text.replace("RIM_PARTITION=gpu", "RIM_PARTITION=high"))
        script = cluster.client(
            sys.executable, "-m", "rim_dist", "submit", str(recipe), "--dry-run", "--nodes=2", f"--site={site}"
        )
        (tmp_path / "job.sbatch").write_text(script)
        cluster.client("sbatch", "--test-only", str(tmp_path / "job.sbatch"))
        command = "source slurm/lib.sh && rim_site && rim_site_arguments"
        arguments = cluster.client("bash", "-c", command, RIM_SITE=str(site)).splitlines()
        for template in sorted((ROOT / "slurm").glob("*.sbatch")):
            cluster.client("sbatch", "--test-only", *arguments, str(template))
    refused = cluster.client("sbatch", "--test-only", "--partition=none", "slurm/train.sbatch", check=False)
    assert "invalid partition" in refused, "the check itself can fail"


@long
def test_submit_chain_goes_on_from_job_to_job(cluster: Cluster, tmp_path: Path) -> None:
    """Three jobs, none requeued: the first is asked to stop, the second finishes, the third has nothing to do."""
    recipe = steps_recipe(tmp_path, "run")
    command = [sys.executable, "-m", "rim_dist", "submit", str(recipe), "--nodes=2", "--ranks-per-node=1", "--cpus-per-rank=1"]
    output = cluster.client(*command, "--gpus-per-node=0", "--chain=3", **JOB_ENVIRONMENT)
    jobs = output.split("scancel ")[1].split()
    folder = tmp_path / "run"
    until(lambda: last_step(folder) >= 30, 120, "30 steps")
    text = cluster.client(sys.executable, "-m", "rim_dist", "status", str(folder))
    assert f"job {jobs[0]} RUNNING" in text
    assert "ETA 0:" in text
    cluster.client("scancel", "--batch", "--signal=USR1", jobs[0])
    cluster.wait(jobs[0], "FAILED", 60)
    assert cluster.job(jobs[0])["ExitCode"] == "75:0"
    cluster.wait(jobs[1], "COMPLETED", 180)
    cluster.wait(jobs[2], "COMPLETED", 60)
    assert [start.status for start in attempts_of(folder)] == [75, 0, 0]


@long
def test_sweep_picks_the_best(cluster: Cluster, tmp_path: Path) -> None:
    recipe = chain_recipe(tmp_path)
    job = cluster.sbatch(
        "--array=0-1",
        *shape(1, 1),
        f"--output={tmp_path}/slurm-%A_%a.out",
        "slurm/sweep.sbatch",
        str(recipe),
        **JOB_ENVIRONMENT,
        RIM_LEARNING_RATES="1e-3 1e-9",
    )
    for task in range(2):
        cluster.wait(f"{job}_{task}", "COMPLETED", 200)
    answer = json.loads((tmp_path / "chain-sweep.json").read_text())
    assert answer["finished"] == 2
    assert answer["best"] == "1e-3"


@long
def test_task_of_a_sweep_is_requeued_alone(cluster: Cluster, tmp_path: Path) -> None:
    """The task whose job id is the array's number stops and goes back into the queue; the other one goes on undisturbed."""
    job = cluster.sbatch(
        "--array=0-1",
        *shape(1, 1),
        f"--output={tmp_path}/slurm-%A_%a.out",
        "slurm/sweep.sbatch",
        str(steps_recipe(tmp_path, "run")),
        **JOB_ENVIRONMENT,
        RIM_LEARNING_RATES="1e-3 2e-3",
    )
    for task in range(2):
        cluster.wait(f"{job}_{task}", "RUNNING", 30)
    ids = {cluster.job(f"{job}_{task}")["JobId"]: task for task in range(2)}
    own = ids[job]
    folders = [tmp_path / f"run-lr{rate}" for rate in ("1e-3", "2e-3")]
    until(lambda: last_step(folders[own]) >= 30, 120, "30 steps")
    cluster.client("scancel", "--batch", "--signal=USR1", f"{job}_{own}")
    for task in range(2):
        cluster.wait(f"{job}_{task}", "COMPLETED", 200)
    assert [cluster.job(f"{job}_{task}")["Restarts"] for task in (own, 1 - own)] == ["1", "0"]
    assert [start.status for start in attempts_of(folders[own])] == [75, 0]
    assert [start.status for start in attempts_of(folders[1 - own])] == [0]
