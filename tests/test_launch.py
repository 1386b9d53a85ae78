"""What a process sets up when it joins the ranks."""

from __future__ import annotations

import os
import pty
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import run_each
from ranks import LAUNCHER_VARIABLES, ROOT, environment, free_port, run

from rim_dist.cli import main
from rim_dist.errors import ConfigError
from rim_dist.parallel.environment import RankInfo, read_rank_info
from rim_dist.parallel.launch import choose_gpu
from rim_dist.parallel.rendezvous import meeting

Make = Callable[..., Path]

SLURM = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
OPENMPI = {
    f"OMPI_COMM_WORLD_{name}": value for name, value in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "2412", strict=True)
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
HEAD = {"MASTER_ADDR": "n0", "MASTER_PORT": "29500"}
RANK = {"RANK": "3", "WORLD_SIZE": "4", **HEAD}


@pytest.mark.parametrize(
    ("variables", "info"),
    [
        ({}, RankInfo(0, 1, 0, 1, "none")),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, RankInfo(0, 1, 0, 1, "none")),  # a job script, outside of srun
        (SLURM, RankInfo(5, 8, 1, 4, "slurm")),
        ({**RANK, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, RankInfo(3, 4, 1, 2, "torch")),
        ({**RANK, "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, RankInfo(3, 4, 1, 2, "deepspeed")),
        # A launcher a node, each started by srun.
        ({**SLURM, **RANK, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, RankInfo(3, 4, 1, 2, "torch")),
        ({**SLURM, **RANK, "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}, RankInfo(3, 4, 1, 2, "deepspeed")),
        # mpirun's daemon is a task of srun: its SLURM variables are not the rank's.
        ({**SLURM, **OPENMPI}, RankInfo(2, 4, 1, 2, "openmpi")),
        ({**SLURM, **OPENMPI, **RANK, "LOCAL_RANK": "1"}, RankInfo(3, 4, 1, 4, "variables")),
        (HYDRA, RankInfo(2, 4, 0, 2, "hydra")),
        # Kubernetes, Ray, by hand.
        (RANK, RankInfo(3, 4, 0, 1, "variables")),
        ({**RANK, "LOCAL_RANK": "1"}, RankInfo(3, 4, 1, 4, "variables")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, RankInfo(0, 1, 0, 1, "variables")),
        ({**SLURM, **HEAD, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, RankInfo(5, 8, 1, 8, "variables")),
    ],
)
def test_every_launcher_is_mapped(variables: dict[str, str], info: RankInfo) -> None:
    assert read_rank_info(variables) == info


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "1"}, "WORLD_SIZE is not set, though RANK=1 is"),
        ({"WORLD_SIZE": "2"}, "RANK is not set, though WORLD_SIZE=2 is"),
        ({**RANK, "RANK": ""}, "RANK: '' is not allowed"),
        ({**RANK, "WORLD_SIZE": ""}, "WORLD_SIZE: '' is not allowed"),
        ({**RANK, "WORLD_SIZE": "two"}, "WORLD_SIZE: 'two' is not allowed"),
        ({**RANK, "RANK": "-1"}, "RANK: '-1' is not allowed"),
        ({**RANK, "RANK": "4"}, "RANK=4 is not below WORLD_SIZE=4"),
        ({**RANK, "LOCAL_RANK": ""}, "LOCAL_RANK: '' is not allowed"),
        ({**RANK, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2"),
        ({**RANK, "MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n0"}, "MASTER_PORT is not set"),
        ({**SLURM, **RANK, "LOCAL_RANK": "1"}, "RANK=3 and WORLD_SIZE=4 are set, but srun .* task 5 of 8; unset"),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS: '' is not allowed"),
        ({**HYDRA, "PMI_SIZE": ""}, "PMI_SIZE: '' is not allowed"),
    ],
)
def test_half_an_environment_is_refused(variables: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rank_info(variables)


@pytest.mark.parametrize(
    ("variables", "gpus", "index"),
    [
        ({**RANK, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, 2, 1),
        ({**SLURM, "SLURM_LOCALID": "3"}, 4, 3),
        ({**SLURM, "SLURM_LOCALID": "3"}, 1, 0),  # cgroups, --gpus-per-task: each task sees its own
        (RANK, 1, 0),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 8, 0),
        ({}, 8, 0),
        (RANK, 2, "LOCAL_RANK is not set, though WORLD_SIZE=4 is and 2 GPUs are visible"),
        ({**SLURM, "SLURM_LOCALID": "3"}, 2, "LOCAL_RANK=3, but 2 GPUs are visible"),
    ],
)
def test_gpu_is_chosen_among_those_that_are_visible(
    variables: dict[str, str], gpus: int, index: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if isinstance(index, int):
        assert choose_gpu(read_rank_info(variables), gpus) == index
    else:
        with pytest.raises(ConfigError, match=index):
            choose_gpu(read_rank_info(variables), gpus)


def test_ranks_without_a_local_rank_train_together(recipe_file: Make, tmp_path: Path) -> None:
    """As Kubernetes or Ray start them."""
    head = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    target, outputs = ["-m", "rim_dist", "train", str(recipe_file())], [tmp_path / f"rank-{rank}" for rank in range(2)]
    statuses = run_each([(target, environment(**head, RANK=str(rank)), str(outputs[rank])) for rank in range(2)], 200)
    assert statuses == [0, 0], [output.read_text() for output in outputs]
    assert "on 2 rank(s) of cpu" in outputs[0].read_text()
    assert (tmp_path / "runs" / "tiny" / "hf" / "config.json").is_file()


def test_ranks_that_cannot_meet_say_so(recipe_file: Make) -> None:
    """A port that is taken, and a rank that never comes."""
    train = ["-m", "rim_dist", "train", str(recipe_file(parallel={"zero_stage": 1, "timeout_seconds": 3}))]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        head = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        done = run("fork", 1, train, check=False, RANK="0", WORLD_SIZE="2", **head)
    assert done.returncode == 2
    assert f"MASTER_PORT: 127.0.0.1:{head['MASTER_PORT']} is taken by another process" in done.stdout
    done = run("fork", 1, train, check=False, RANK="0", WORLD_SIZE="2", **{**head, "MASTER_PORT": str(free_port())})
    assert done.returncode == 75
    assert "rank 0: 2 ranks did not meet at 127.0.0.1:" in done.stdout
    assert "Traceback" not in done.stdout


def test_rank_of_another_start_is_refused(recipe_file: Make, tmp_path: Path) -> None:
    """Two starts that meet at one port, of which neither can see the other's variables: the first one's ranks train."""
    port, outputs = str(free_port()), {name: tmp_path / name for name in ("first", "stranger", "double", "size", "second")}
    head = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "SLURM_STEP_NUM_NODES": "1"}
    target = ["-m", "rim_dist", "train", str(recipe_file(parallel={"zero_stage": 1, "timeout_seconds": 60}))]

    def step(number: str, rank: str, ranks: str = "2") -> dict[str, str]:
        own = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": ranks, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": number}
        return environment(**head, **own)

    ranks = {
        "first": step("0", "0"),
        "stranger": step("1", "1"),
        "size": step("0", "2", "3"),
        "second": step("0", "1"),
        "double": step("0", "1"),
    }
    statuses = dict(zip(ranks, run_each([(target, ranks[name], str(outputs[name])) for name in ranks], 200), strict=True))
    said = {name: output.read_text() for name, output in outputs.items()}
    twice = "double" if statuses["double"] else "second"  # whichever came later
    assert [name for name, status in statuses.items() if status] == ["stranger", "size", twice], said
    assert set(statuses.values()) == {0, 2}, said
    assert f"at 127.0.0.1:{port} is the first rank of another start (SLURM job 7 step 0 restart 0 on " in said["stranger"]
    assert "not of this one (SLURM job 7 step 1 restart 0); export MASTER_PORT" in said["stranger"]
    assert "WORLD_SIZE=3, but 2 on the first rank" in said["size"]
    assert "RANK=1 (" in said[twice]
    assert "another process has come to" in said[twice]
    assert "Traceback" not in "".join(said.values())
    assert (tmp_path / "runs" / "tiny" / "hf" / "config.json").is_file()


@pytest.mark.parametrize(("variables", "status"), [({}, 2), ({"RIM_ATTEMPT": "/runs/tiny/logs/1"}, 75)])
def test_taken_port_ends_a_job_only_where_nobody_takes_another(
    variables: dict[str, str], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job script's next attempt looks for a free one."""
    from torch.distributed import rendezvous

    monkeypatch.delenv("RIM_ATTEMPT", raising=False)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        head = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in {**head, **variables}.items():
            monkeypatch.setenv(name, value)
        with (
            pytest.raises(ConfigError, match="is taken by another process") as raised,
            meeting(RankInfo(0, 1, 0, 1, "none"), 5, "") as url,
        ):
            next(rendezvous(url))
    assert raised.value.exit_status == status


def test_interactive_shell_of_several_tasks_is_no_launcher() -> None:
    """`srun -n2 --pty bash`: the shell has the variables of its task, the other task starts nothing."""
    code = (
        "import os\n"
        "from rim_dist.parallel import launch\n"
        "launch._set_environment_from_slurm(launch.read_rank_info(os.environ))\n"
    )
    for tasks, status in (("2", 1), ("1", 0)):
        child, terminal = pty.fork()
        if not child:
            step = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": tasks, "SLURM_JOB_ID": "77"}
            os.execve(sys.executable, [sys.executable, "-c", code], environment(**step))
        said = b""
        while True:
            try:
                said += os.read(terminal, 4096)
            except OSError:  # the other end is closed
                break
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == status, said
        assert (b"SLURM_STEP_NUM_TASKS=2 is of the interactive shell" in said) == bool(status), said


def test_mpi_without_mpi4py_is_refused(
    recipe_file: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in LAUNCHER_VARIABLES:  # a run in this process leaves its own
        monkeypatch.delenv(name, raising=False)
    for name, value in HYDRA.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    assert main(["train", str(recipe_file())]) == 2
    assert "PMI_RANK=2 says that MPI started this process, but mpi4py cannot be loaded" in capsys.readouterr().err


def test_error_that_speaks_of_a_time_out_is_no_lost_peer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Alone, nobody was lost: another start would meet the same error."""

    def fail(*_: object) -> None:
        raise RuntimeError("gloo: timeout, connection closed by peer")

    monkeypatch.setattr("rim_dist.recipe.load_recipe", fail)
    assert main(["train", "x.yaml"]) == 1
    assert "this is a bug" in capsys.readouterr().err


@pytest.mark.parametrize(("variables", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "4"}, False)])
def test_freed_memory_is_kept_unless_the_user_has_a_say(variables: dict[str, str], kept: bool) -> None:
    """A block of 256 MiB, freed: it stays with the process, or goes back to the system."""
    code = (
        "import torch\n"
        "from rim_dist.parallel.launch import keep_freed_memory\n"
        "keep_freed_memory()\n"
        "block = torch.ones(2**26)\n"
        "del block\n"
        "print(next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmRSS')))\n"
    )
    bare = {name: value for name, value in environment().items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**bare, **variables}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (int(done.stdout) > 400_000) == kept, done.stderr + done.stdout
