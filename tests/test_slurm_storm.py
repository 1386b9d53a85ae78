"""A storm: one run, whatever happens to its cluster, started again by SLURM alone, ends as an undisturbed one.

Thorough. `RIM_STORM_MINUTES` (3) of faults drawn with `RIM_STORM_SEED` (1), one at a time and at any moment of the run;
`RIM_STORM_STEPS` (200 a minute) of each stage. With -s, a line for each fault.
"""

from __future__ import annotations

import collections
import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from ranks import environment, run
from slurm_cluster import Cluster, missing
from slurm_jobs import JOB_ENVIRONMENT, complete, job_output, last_step, lost_steps, same_parameters, shape, steps_recipe
from writers import Writers

from rim_dist.cluster.attempts import attempts_of

MINUTES, SEED = float(os.environ.get("RIM_STORM_MINUTES", "3")), int(os.environ.get("RIM_STORM_SEED", "1"))
STEPS = int(os.environ.get("RIM_STORM_STEPS", 200 * MINUTES))
NODES, RANKS, INTERVAL = 2, 2, 20  # the run's nodes, ranks a node, steps between checkpoints

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=f"no SLURM cluster here: {missing()}"),
    pytest.mark.thorough,
    pytest.mark.timeout(60 * (3 * MINUTES + 20)),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of the run's own. Mounted before the nodes take over the mounts of this machine."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", str(folder)], check=True)
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@dataclass
class Storm:
    """The faults. Each returns what ends it (`bool` does nothing), or None where there was nothing to disturb."""

    cluster: Cluster
    job: str
    recipe: Path
    chance: random.Random
    second_jobs: list[str] = field(default_factory=list)
    second_starts: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.recipe.parent / "run"

    def processes(self, **variables: str) -> list[int]:
        """Processes of the newest attempt with these variables, their supervisors included."""
        if not attempts_of(self.run):
            return []
        wanted = {"RIM_ATTEMPT": str(attempts_of(self.run)[-1].folder.resolve()), **variables}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                words = (folder / "environ").read_text().split("\0")
                if all(f"{name}={value}" in words for name, value in wanted.items()):
                    found.append(int(folder.name))
        return found

    def _signal(self, number: int, processes: list[int]) -> bool:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, number)
        return bool(processes)

    def _rank(self) -> list[int]:
        return self.processes(SLURM_PROCID=str(self.chance.randrange(NODES * RANKS)))

    def _node(self) -> str | None:
        """A node of the running job, the batch host included."""
        nodes = self.cluster.client("scontrol", "show", "hostnames", self.cluster.job(self.job).get("NodeList", "")).split()
        return self.chance.choice(nodes) if nodes and nodes != ["(null)"] else None

    def rank_killed(self) -> Callable[[], object] | None:
        return bool if self._signal(signal.SIGKILL, self._rank()[-1:]) else None

    def rank_stopped(self) -> Callable[[], object] | None:
        stopped = self._rank()[-1:]
        return (lambda: self._signal(signal.SIGCONT, stopped)) if self._signal(signal.SIGSTOP, stopped) else None

    def requeued(self) -> Callable[[], object] | None:
        return bool if "error" not in self.cluster.client("scontrol", "requeue", self.job, check=False) else None

    def node_down(self) -> Callable[[], object] | None:
        if (node := self._node()) is None:
            return None
        self.cluster.client("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=storm")
        return self.cluster.mend

    def link_cut(self) -> Callable[[], object] | None:
        if (node := self._node()) is None:
            return None
        self.cluster.cut_link(node)
        return self.cluster.mend

    def node_frozen_and_cut(self) -> Callable[[], object] | None:
        """It thaws when another start has long had the folder, and only then can SLURM end what runs there."""
        if (node := self._node()) is None or not (frozen := self.processes(SLURMD_NODENAME=node)):
            return None
        self._signal(signal.SIGSTOP, frozen)
        self.cluster.cut_link(node)

        def thaw() -> None:
            time.sleep(10)
            self._signal(signal.SIGCONT, frozen)
            time.sleep(5)
            self.cluster.mend()

        return thaw

    def slurmd_killed(self) -> Callable[[], object] | None:
        if (node := self._node()) is None:
            return None
        self.cluster.kill_slurmd(node)
        return self.cluster.mend

    def second_job(self) -> Callable[[], object] | None:
        output = f"--output={self.recipe.parent}/second-%j.out"
        second = self.cluster.sbatch(*shape(1, 1), output, "slurm/train.sbatch", str(self.recipe), **JOB_ENVIRONMENT)
        self.second_jobs.append(second)
        return bool

    def second_start(self) -> Callable[[], object] | None:
        """By hand, beside a job that is training: otherwise it might rightly go on with the run."""
        if not last_step(self.run):
            return None
        train = [sys.executable, "-m", "rim_dist", "train", str(self.recipe)]
        with (self.recipe.parent / "second-start.out").open("ab") as output:
            start = subprocess.Popen(train, env=environment(), stdout=output, stderr=output)
        self.second_starts.append(start)
        return start.wait

    def draw(self) -> tuple[str, Callable[[], object]]:
        """Do one of the faults; its name and what ends it."""
        faults = [
            *(self.rank_killed, self.rank_stopped, self.requeued, self.node_down, self.link_cut),
            *(self.node_frozen_and_cut, self.slurmd_killed, self.second_job, self.second_start),
        ]
        while True:
            fault = self.chance.choice(faults)
            if (end := fault()) is not None:
                return fault.__name__.replace("_", " "), end
            time.sleep(0.5)


def next_moment(writers: Writers, chance: random.Random) -> str:
    """Some time later; at half of the times the next save. The last save of stage 1 and the export are never waited past."""
    rare = {"stage switch": rf"run/checkpoints/step-{STEPS:08}\.partial/", "export": r"run/hf\.partial/"}

    def wait(pattern: str, seconds: float) -> str | None:
        path = writers.wait("|".join((*rare.values(), pattern)), seconds)
        return path and next((name for name, its in rare.items() if re.match(its, path)), "save")

    at_save = chance.random() < 0.5
    return wait("$", chance.uniform(5, 30)) or (at_save and wait(r"run/checkpoints/[^/]*\.partial/", 30)) or "any"


def test_storm(disk: Path, tmp_path: Path) -> None:
    options = {"steps": STEPS, "evaluation": {"every_steps": 100, "samples": 16}}
    calm = steps_recipe(tmp_path, "run", **options)  # type: ignore[arg-type]
    run("fork", NODES * RANKS, ["-m", "rim_dist", "train", str(calm)], timeout=60 * (MINUTES + 5), OMP_NUM_THREADS="1")
    recipe = steps_recipe(disk, "run", **options)  # type: ignore[arg-type]
    counts: collections.Counter[str] = collections.Counter()
    with Cluster(4) as cluster, Writers(disk, "RIM_ATTEMPT") as writers:
        job = cluster.sbatch(
            *shape(NODES, RANKS),
            f"--output={disk}/slurm-%j.out",
            "slurm/train.sbatch",
            str(recipe),
            **JOB_ENVIRONMENT,
            RIM_HANG_MINUTES="0.2",
            RIM_MAX_RESTARTS="20",
        )
        storm = Storm(cluster, job, recipe, random.Random(SEED))
        end = time.monotonic() + 60 * MINUTES
        moment = "tokenising" if writers.wait("run/data/", 120) else "any"
        while time.monotonic() < end and not (disk / "run" / "hf").exists():
            step = last_step(storm.run)
            what, calm_down = storm.draw()
            counts[f"{what} ({moment})"] += 1
            print(f"{time.strftime('%H:%M:%S')} step {step}, moment {moment}: {what}", flush=True)
            time.sleep(storm.chance.uniform(5, 25))
            calm_down()
            cluster.mend()
            moment = next_moment(writers, storm.chance)
        for _ in range(10):  # SLURM takes a while to see what happened to a node, and that it is back
            cluster.mend()
            time.sleep(3)
        complete(cluster, job, storm.run, 60 * (MINUTES + 10))
        for second in storm.second_jobs:
            cluster.wait(second, "FAILED", 120)
            assert cluster.job(second)["ExitCode"] == "2:0", (disk / f"second-{second}.out").read_text()
    lost = lost_steps(storm.run)
    print(f"\n{sum(counts.values())} faults {dict(counts)}, {len(attempts_of(storm.run)) - 1} restarts, lost steps {lost}")
    assert [start.returncode for start in storm.second_starts] == [2] * len(storm.second_starts)
    assert len(attempts_of(storm.run)) >= 2, "the run was not disturbed"
    assert all(steps <= INTERVAL for steps in lost), lost
    same_parameters(storm.run, tmp_path / "run")
    # An attempt never writes after a later one has. Each has a folder of its own in logs/.
    names = [start.folder.name for start in attempts_of(storm.run)]
    wrote = [
        (Path(who).name, path) for who, path in writers.seen if path.startswith("run/") and not path.startswith("run/logs/")
    ]
    assert {who for who, _ in wrote} <= set(names), [entry for entry in wrote if entry[0] not in names][:20]
    order = [names.index(who) for who, _ in wrote]
    assert order == sorted(order), [wrote[i : i + 2] for i in range(len(order) - 1) if order[i] > order[i + 1]][:20]
    assert not (storm.run / "hf.partial").exists(), job_output(storm.run)
