"""Job scripts and what they ask of the package, without a cluster: rendering, records, restarts, ranks, logs."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from ranks import ROOT, environment, free_port

from rim_dist.checkpoint.store import TrainingState, complete_checkpoints
from rim_dist.cli import main
from rim_dist.cluster import attempts, nodes
from rim_dist.cluster.logs import merged
from rim_dist.cluster.status import describe, job_state
from rim_dist.cluster.sweep import best_run, sweep_overrides
from rim_dist.errors import ConfigError
from rim_dist.files import record_of, write_manifest
from rim_dist.parallel.degrees import fit_degrees
from rim_dist.parallel.environment import RankInfo, cores_of_rank, interface_to
from rim_dist.recipe import load_recipe
from rim_dist.training.folder import check_run_folder

Make = Callable[..., Path]
SCRIPTS = sorted(p for p in (ROOT / "slurm").iterdir() if p.suffix in (".sbatch", ".sh"))
SITES = {
    "account": "RIM_ACCOUNT=p1\nRIM_QOS=long\nRIM_PARTITION=gpu\nRIM_RANKS_PER_NODE=4\nRIM_GPUS_PER_NODE=4\n",
    "container": 'RIM_CONTAINER=(apptainer exec --nv "/images/rim dist.sif")\nRIM_SBATCH_EXTRA=(--mem=0 --exclusive)\n',
    "bare": "",
}


@pytest.fixture(params=sorted(SITES))
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"{request.param}.env"
    path.write_text(SITES[request.param])
    return path


def options_of(script: str) -> tuple[list[str], list[str]]:
    """#SBATCH lines that count, and those that SLURM ignores: after the first command."""
    counted: list[str] = []
    ignored: list[str] = []
    commands = False
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            (ignored if commands else counted).append(line.removeprefix("#SBATCH").strip())
        elif line.strip() and not line.startswith("#"):
            commands = True
    return counted, ignored


def lint(script: str) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--shell=bash", "-"],
        input=script,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def dry_run(recipe: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert main(["submit", str(recipe), "--dry-run", *flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_scripts_are_clean(script: Path) -> None:
    lint(script.read_text())
    counted, ignored = options_of(script.read_text())
    assert not ignored
    assert bool(counted) == (script.suffix == ".sbatch")
    assert not any("container" in option for option in counted)


def test_submit_renders_for_every_site(site: Path, recipe_file: Make, capsys: pytest.CaptureFixture[str]) -> None:
    script = dry_run(recipe_file(), capsys, "--site", str(site), "--nodes", "2", "--time", "3:00:00", "--launcher", "torchrun")
    lint(script)
    counted, ignored = options_of(script)
    assert not ignored
    assert {"--nodes=2", "--time=3:00:00", "--requeue", "--signal=B:USR1@300"} <= set(counted)
    assert f"export RIM_SITE={site}" in script
    assert "export RIM_LAUNCHER=torchrun" in script
    expected = {
        "account": {"--account=p1", "--qos=long", "--partition=gpu", "--ntasks-per-node=4", "--gpus-per-node=4"},
        "container": {"--mem=0", "--exclusive", "--ntasks-per-node=8"},
        "bare": {"--ntasks-per-node=8", "--gpus-per-node=8"},
    }[site.stem]
    assert expected <= set(counted)
    assert not any("apptainer" in line for line in counted)


def test_submit_writes_nothing_and_says_what_does_not_fit(
    recipe_file: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_file()
    chain = dry_run(recipe, capsys, "--nodes", "1", "--chain", "3", "--sbatch=--mem=8G")
    counted, _ = options_of(chain)
    assert {"--no-requeue", "--mem=8G"} <= set(counted)
    assert "--requeue" not in counted
    assert "export RIM_REQUEUE=0" in chain
    ranks, _ = options_of(dry_run(recipe, capsys, "--nodes", "1", "--gpus-per-node", "4"))
    assert {"--ntasks-per-node=4", "--gpus-per-node=4"} <= set(ranks)
    assert not (tmp_path / "runs").exists()
    for flags, message in (
        (["--nodes", "3"], "optimizer.global_batch: 16 samples cannot be spread over 24 data ranks"),
        (["--nodes", "none"], "--nodes: 'none' is not allowed"),
        (["--chain", "0"], "--chain: 0 is not allowed"),
        (
            ["--ranks-per-node", "8", "--gpus-per-node", "4"],
            "--ntasks-per-node: 8 ranks do not fit --gpus-per-node 4: one a GPU",
        ),
        (["--site", "no.env"], "no.env: no such file"),
    ):
        assert main(["submit", str(recipe), "--dry-run", *flags]) == 2
        assert message in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere:/bin")
    if shutil.which("sbatch") is None:
        assert main(["submit", str(recipe), "--nodes", "1"]) == 2
        assert "sbatch: not found" in capsys.readouterr().err


def test_ranks_must_fit(recipe_file: Make) -> None:
    recipe = load_recipe(recipe_file())
    fit_degrees(recipe, 16)
    with pytest.raises(ConfigError, match="17 data ranks"):
        fit_degrees(recipe, 17)


# ---- ranks, cores, nodes --------------------------------------------------------------------------------


def test_cores_are_divided_where_a_task_holds_several_ranks() -> None:
    cores = set(range(10, 18))
    parts = [cores_of_rank(RankInfo(rank, 4, rank, 4, "torch"), cores) for rank in range(4)]
    assert parts == [{10, 11}, {12, 13}, {14, 15}, {16, 17}]
    assert cores_of_rank(RankInfo(0, 4, 0, 4, "slurm"), cores) == cores
    assert cores_of_rank(RankInfo(0, 16, 0, 16, "torch"), cores) == cores


def test_interface_is_the_one_that_reaches_the_head() -> None:
    assert interface_to("127.0.0.1") is None
    assert interface_to("no-such-host.invalid") is None


def test_port_follows_from_the_job_and_is_free() -> None:
    port = nodes.rendezvous_port(4242)
    assert port == nodes.rendezvous_port(4242) == 24242
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        assert nodes.rendezvous_port(4242) not in (port, nodes.rendezvous_port(4243))


@pytest.mark.parametrize(
    ("missing", "problem", "bad"),
    [
        ((), "", []),
        (("n3",), "", ["n3"]),
        (("n2", "n3", "n4"), "", ["n1"]),
        ((), "sees nothing", ["n2"]),
    ],
)
def test_nodes_report_to_the_head(
    missing: tuple[str, ...], problem: str, bad: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who does not arrive is named; if hardly anybody does, it is the head that is hard to reach."""
    names = ["n1", "n2", "n3", "n4"]
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    (tmp_path / "start.json").write_text("{}")
    port = free_port()

    def report(name: str) -> None:
        deadline = 5.0
        while deadline > 0:
            try:
                with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
                    connection.sendall(f"{name}\n{problem if name == 'n2' else ''}".encode())
                    return
            except OSError:
                threading.Event().wait(0.05)
                deadline -= 0.05

    threads = [threading.Thread(target=report, args=(name,)) for name in names[1:] if name not in missing]
    for thread in threads:
        thread.start()
    status = nodes.check_nodes(tmp_path, "127.0.0.1", port, 0, names, 1.5)
    for thread in threads:
        thread.join()
    assert status == (75 if bad else 0)
    assert attempts.Attempt(tmp_path, {}).suspects() == bad


def test_node_that_cannot_reach_the_head_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nodes.check_nodes(tmp_path, "127.0.0.1", free_port(), 1, ["n1", "n2"], 0.5) == 75
    assert "cannot reach 127.0.0.1" in capsys.readouterr().err


# ---- attempts ----------------------------------------------------------------------------------------------


def begin(recipe: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rim_dist.cluster", "begin", str(recipe)],
        env=environment(**variables, PYTHONPATH=str(ROOT)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_start_is_recorded_without_secrets(recipe_file: Make, tmp_path: Path) -> None:
    secret = "hf_0123456789"
    done = begin(recipe_file(), SLURM_JOB_ID="7", HF_TOKEN=secret, SLURM_JWT=secret, WANDB_API_KEY=secret, RIM_LAUNCHER="srun")
    assert done.returncode == 0, done.stderr
    answer = dict(line.split("=", 1) for line in done.stdout.splitlines())
    start = Path(answer["RIM_ATTEMPT"])
    assert start.parent.parent == Path(answer["RIM_RUN"]) == tmp_path / "runs" / "tiny"
    assert answer["MASTER_PORT"].isdigit()
    record = json.loads((start / "start.json").read_text())
    assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", record["commit"])
    assert record["environment"]["RIM_LAUNCHER"] == "srun"
    assert record["versions"]["torch"]
    assert load_recipe(start / "recipe.yaml") == load_recipe(recipe_file())
    assert not any(secret in path.read_text() for path in start.iterdir())
    # A run whose folder holds nothing but records can still be started.
    check_run_folder(load_recipe(recipe_file()))


@pytest.mark.parametrize(
    ("squeue", "status", "refused"),
    [("RUNNING", "", True), ("PENDING", "75", True), ("COMPLETED", "", False), ("RUNNING", "0", False), ("", "", False)],
)
def test_folder_of_another_job_is_left_to_it(
    squeue: str, status: str, refused: bool, recipe_file: Make, tmp_path: Path
) -> None:
    """Job 7 runs, or waits in the queue to go on; once it has ended the next job may start."""
    first = begin(recipe_file(), SLURM_JOB_ID="7")
    start = Path(dict(line.split("=", 1) for line in first.stdout.splitlines())["RIM_ATTEMPT"])
    if status:
        (start / "status").write_text(f"{status}\n")
    (tmp_path / "squeue").write_text(f"#!/bin/sh\n[ \"$*\" = '--noheader --format=%T --jobs=7' ] && echo {squeue}\n")
    (tmp_path / "squeue").chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    second = begin(recipe_file(), SLURM_JOB_ID="8", PATH=path)
    assert second.returncode == (2 if refused else 0), second.stderr
    if refused:
        assert f"job 7 ({squeue}) runs it; cancel that one (scancel 7), or choose another run.name" in second.stderr
        assert (start.parent / "current").read_text().strip() == start.name
    assert begin(recipe_file(), SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1", PATH=path).returncode == 0


def test_starts_without_progress_are_bounded(recipe_file: Make) -> None:
    for restart in range(2):
        assert begin(recipe_file(), SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restart), RIM_MAX_RESTARTS="1").returncode == 0
    stopped = begin(recipe_file(), SLURM_JOB_ID="7", SLURM_RESTART_COUNT="2", RIM_MAX_RESTARTS="1")
    assert stopped.returncode == 1
    assert "2 starts in a row came no further than step 0" in stopped.stderr
    assert begin(recipe_file(), SLURM_JOB_ID="8", RIM_MAX_RESTARTS="1").returncode == 0, "another job starts counting anew"


def test_chain_ends_where_a_job_of_it_failed(recipe_file: Make) -> None:
    first = begin(recipe_file(), SLURM_JOB_ID="7", RIM_CHAIN="abc")
    start = Path(dict(line.split("=", 1) for line in first.stdout.splitlines())["RIM_ATTEMPT"])
    (start / "status").write_text("75\n")
    assert begin(recipe_file(), SLURM_JOB_ID="8", RIM_CHAIN="abc").returncode == 0
    newest = attempts.attempts_of(start.parent.parent)[-1].folder
    (newest / "status").write_text("2\n")
    refused = begin(recipe_file(), SLURM_JOB_ID="9", RIM_CHAIN="abc")
    assert refused.returncode == 2
    assert "job 8 of this chain ended with 2" in refused.stderr
    assert begin(recipe_file(), SLURM_JOB_ID="10", RIM_CHAIN="def").returncode == 0


def test_rank_is_logged_with_time_host_and_rank_and_without_secrets(tmp_path: Path) -> None:
    """The supervisor of a rank: the wrong recipe's name, which holds a secret, reaches the log without it."""
    (tmp_path / "start.json").write_text(json.dumps({"job": "1"}))
    secret = "hf_0123456789"
    variables = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    done = subprocess.run(
        [sys.executable, "-m", "rim_dist.cluster.rank", "train", f"{secret}.yaml"],
        env={
            **environment(HF_TOKEN=secret, RIM_ATTEMPT=str(tmp_path), SLURMD_NODENAME="n7", PYTHONPATH=str(ROOT)),
            **variables,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    log = (tmp_path / "rank-00003.log").read_text()
    assert log == done.stdout
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z n7 3\| rim-dist: "
    lines = rf"{stamp}rank 3 of 4 is process \d+\n{stamp}\*\*\*\.yaml: no such recipe\n"
    assert re.match(lines, log), log
    ended = json.loads((tmp_path / "ended-2").read_text())
    assert (ended["host"], ended["rank"], ended["status"], ended["suspect"]) == ("n7", 3, 2, False)
    assert not list(tmp_path.glob("stacks-*")), "nothing hung"


@pytest.mark.parametrize("trap", ["trap '' USR1; ", ""], ids=["ignored", "default"])
def test_wish_to_stop_waits_until_the_rank_hears_it(trap: str, recipe_file: Make, tmp_path: Path) -> None:
    """Asked while the rank is still loading, it saves and ends with 75 at last. Launchers differ in what USR1 does."""
    (tmp_path / "start.json").write_text(json.dumps({"job": "1"}))
    (tmp_path / "stop").touch()
    recipe = recipe_file(curriculum={"stage1": {"samples": 16000}, "stage2": {"samples": 0}}, evaluation={"at_end": False})
    command = f"{trap}exec {sys.executable} -m rim_dist.cluster.rank train {recipe}"
    variables = environment(RIM_ATTEMPT=str(tmp_path), SLURMD_NODENAME="n7", PYTHONPATH=str(ROOT))
    done = subprocess.run(["bash", "-c", command], env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stdout
    assert "stopped by a signal after step " in done.stdout
    assert complete_checkpoints(tmp_path / "runs" / "tiny" / "checkpoints")


# ---- counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("job", "expected"),
    [
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}, "16 8"),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}, "16 8"),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "3", "SLURM_NTASKS_PER_NODE": "2"}, "3 2"),
        ({"SLURM_JOB_NUM_NODES": "1", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "8"}, "2 2"),  # a template's 8
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4"}, "4 2"),
        ({}, "1 1"),
        (
            {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "3", "RIM_LAUNCHER": "torchrun"},
            "3 tasks on 2 nodes: RIM_LAUNCHER=torchrun starts equally many on each; use srun",
        ),
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "1"}, "1 tasks leave some of the 2 nodes without one"),
        ({"SLURM_HET_SIZE": "2", "SLURM_NTASKS": "2"}, "SLURM_HET_SIZE=2: heterogeneous jobs are not supported"),
    ],
)
def test_ranks_are_those_that_slurm_counts(job: dict[str, str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho n1\n")
    (tmp_path / "scontrol").chmod(0o755)
    script = f"set -euo pipefail; source {ROOT}/slurm/lib.sh; rim_site; rim_environment; echo $RIM_RANKS $RIM_LOCAL_RANKS"
    site = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "RIM_SITE": "/none",
        "RIM_VENV": "/none",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    done = subprocess.run(["bash", "-c", script], env={**site, **job}, capture_output=True, text=True, check=False)
    refused = ":" in expected or "leave" in expected
    assert done.returncode == (2 if refused else 0), done.stderr
    assert expected in (done.stderr if refused else done.stdout.strip())


# ---- the end of a job --------------------------------------------------------------------------------------

SCONTROL = """#!/usr/bin/env bash
[[ $* == "show hostnames"* ]] && { echo n1; exit; }
echo "$*" >>calls
if [[ $(wc -l <calls) -le ${AWAY:-0} ]]; then
    echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2
    exit 1
fi
[[ $* == *"show job"* ]] && echo "JobId=17 JobState=${STATE:-RUNNING} Reason=None Requeue=1 Restarts=0 ExcNodeList=(null)"
exit 0
"""


def end_of_job(folder: Path, **variables: str) -> tuple[list[str], subprocess.CompletedProcess[str]]:
    """What a job that ends with 75 asks of scontrol, which does not answer the first AWAY times."""
    programs = {"scontrol": SCONTROL, "srun": "#!/bin/sh\necho n2\n", "sinfo": "#!/bin/sh\nprintf 'n1\\nn3\\n'\n"}
    for name, text in {**programs, "sleep": "#!/bin/sh\n"}.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    script = f"set -euo pipefail; source {ROOT}/slurm/lib.sh; rim_site; rim_environment; PATH={folder}:$PATH; rim_end 75"
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_PARTITION": "p"}
    path = {"PATH": f"{folder}:{os.environ['PATH']}", "RIM_SITE": "/none", "RIM_VENV": "/none", "RIM_ATTEMPT": str(folder)}
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**environment(), **path, **job, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    return (folder / "calls").read_text().splitlines(), done


def test_job_goes_back_when_the_controller_answers_again(tmp_path: Path) -> None:
    calls, done = end_of_job(tmp_path, AWAY="2")
    assert done.returncode == 75
    show, exclude = "-o show job 17", "update JobId=17 ExcNodeList=n2"
    assert calls == [show, show, show, "requeue 17", show, exclude]
    assert "kept off n2 from now on" in done.stderr


def test_task_of_an_array_goes_back_alone(tmp_path: Path) -> None:
    """The last task has the array's number as its job id: named by it, scontrol would requeue all tasks."""
    calls, _ = end_of_job(tmp_path, SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID="4")
    assert calls == ["-o show job 17_4", "requeue 17_4", "-o show job 17_4", "update JobId=17_4 ExcNodeList=n2"]


def test_job_that_slurm_has_requeued_already_is_left_alone(tmp_path: Path) -> None:
    calls, done = end_of_job(tmp_path, STATE="COMPLETING")
    assert calls == ["-o show job 17"]
    assert "SLURM has already decided what follows (JobState=COMPLETING Restarts=0 )" in done.stderr


# ---- looking -----------------------------------------------------------------------------------------------


def fake_run(folder: Path) -> Path:
    run = folder / "tiny"
    for number, host in enumerate(("n1", "n2")):
        start = run / "logs" / f"20260101T00000{number}Z-job5-{number}"
        start.mkdir(parents=True)
        (start / "start.json").write_text(json.dumps({"job": "5", "checkpoint_step": 0}))
        for rank in range(2):
            lines = [
                f"2026-01-01T00:00:{10 * number + second:02d}.{rank:03d}Z {host} {rank}| line {second}" for second in (0, 1)
            ]
            (start / f"rank-{rank:05d}.log").write_text("\n".join(lines) + "\n")
        (start / "status").write_text("75\n")
        attempts.record_end(start, 1, 75, "killed by SIGKILL", suspect=True, host=host)
    (run / "plan.json").write_text(json.dumps({"total_steps": 10}))
    (run / "metrics.jsonl").write_text(
        json.dumps({"kind": "train", "stage": "stage1", "step": 4, "loss": 1.5, "seconds": 2.0}) + "\n"
    )
    return run


def test_logs_are_merged_in_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path)
    lines = list(merged(run))
    assert lines == sorted(lines)
    assert len(lines) == 8
    assert main(["logs", str(run), "--rank", "1"]) == 0
    assert all(" 1| " in line for line in capsys.readouterr().out.splitlines())
    assert main(["logs", str(run), "--rank", "9"]) == 2
    assert main(["logs", str(tmp_path)]) == 2
    assert main(["logs", str(run), "--stacks"]) == 2


def test_status_says_where_a_run_stands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = fake_run(tmp_path)
    text = describe(run)
    assert "stage1  step 4/10  loss 1.5000" in text
    assert "restarts 1" in text
    assert "last end 75: n2 rank 1 killed by SIGKILL" in text
    assert main(["status", str(tmp_path)]) == 0
    assert "tiny: " in capsys.readouterr().out
    assert main(["status", str(tmp_path / "nothing")]) == 2
    (tmp_path / "empty").mkdir()
    assert main(["status", str(tmp_path / "empty")]) == 2


def test_state_of_one_task_of_an_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\nprintf '18 RUNNING None N/A\\n17 PENDING BeginTime 2026-01-01T00:00:00\\n'\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert job_state("17") == "PENDING (BeginTime, 2026-01-01T00:00:00)"
    assert job_state("18") == "RUNNING"
    assert job_state("19") is None


def test_sweep_keeps_the_ratio_and_picks_the_best(recipe_file: Make, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file())
    overrides = sweep_overrides(recipe, "2e-3")
    changed = load_recipe(recipe_file(), overrides)
    assert changed.run.name == "tiny-lr2e-3"
    assert changed.curriculum.stage1.learning_rate == 2e-3
    assert changed.curriculum.stage2.learning_rate == pytest.approx(1e-3)
    with pytest.raises(ConfigError, match="learning rate 'fast' is not allowed"):
        sweep_overrides(recipe, "fast")
    for rate, accuracy, loss in (("1e-3", 0.5, 0.9), ("2e-3", 0.5, 0.7), ("4e-3", 0.25, 0.1), ("8e-3", 0.9, float("nan"))):
        run = tmp_path / "runs" / f"tiny-lr{rate}"
        checkpoint = run / "checkpoints" / "step-00000001"
        checkpoint.mkdir(parents=True)
        state = TrainingState("stage2", 1, 1, 1, 0.0, 1, finished=True)
        (checkpoint / "state.json").write_text(json.dumps(asdict(state)))
        write_manifest(checkpoint, {"state.json": record_of(checkpoint / "state.json")})
        lines = [{"kind": "train", "step": 1, "loss": loss}, {"kind": "evaluation", "step": 1, "accuracy": accuracy}]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    answer = best_run(recipe, ["1e-3", "2e-3", "4e-3", "8e-3", "1"])
    assert answer["best"] == "2e-3"
    assert answer["finished"] == 3
    assert json.loads((tmp_path / "runs" / "tiny-sweep.json").read_text())["best"] == "2e-3"


def test_curriculum_shows_its_jobs(recipe_file: Make, tmp_path: Path) -> None:
    site = tmp_path / "site.env"
    site.write_text(SITES["account"])
    command = [str(ROOT / "slurm" / "curriculum.sh"), "--dry-run", "--nodes=2", str(recipe_file())]
    variables = environment(RIM_SITE=str(site), RIM_VENV=sys.prefix)
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    jobs = done.stdout.splitlines()
    assert [re.search(r"--job-name=(\S+)", job)[1] for job in jobs] == [  # type: ignore[index]
        "tiny-stage1",
        "tiny-stage1-evaluate",
        "tiny-stage2",
        "tiny-stage2-evaluate",
        "tiny-export",
    ]
    assert all("--account=p1" in job and "--kill-on-invalid-dep=yes" in job for job in jobs)
    assert ["--ntasks-per-node=4" in job for job in jobs] == [True, False, True, False, False]
    assert ["--nodes=2" in job for job in jobs] == [True, False, True, False, False]
    assert ["--until stage1" in job for job in jobs] == [True, False, False, False, False]
    assert all(f"--dependency=afterok:{number}" in job for number, job in enumerate(jobs[1:]))
    assert not (tmp_path / "runs").exists()
    wrong = subprocess.run(
        [*command[:1], "--nodes", "2"], env=variables, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert wrong.returncode == 2
    assert "write --name=value" in wrong.stderr
    assert os.access(command[0], os.X_OK)
