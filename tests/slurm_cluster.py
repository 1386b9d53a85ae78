"""A real SLURM cluster for tests: a controller and several nodes on this machine, each node a host of its own.

Every node is a slurmd in its own network, UTS and mount namespace: own address, own loopback, own host name, own
/etc/hosts. A wrong MASTER_ADDR, a port taken from the loopback or a host name nobody can resolve fails here as it does
between machines. Needs root, slurmctld, slurmd, munged and ip; `missing()` says what is not there.

    python tests/slurm_cluster.py [NODES]     # a cluster to try things on, until Ctrl-C; prints SLURM_CONF
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ranks import LAUNCHER_VARIABLES

PREFIX = "rimtest"  # of network namespaces
BRIDGE = "rimtest0"
SUBNET = "10.177.23"
PORT = 17230  # the controller's; node i listens on PORT + i, each in its own namespace
CPUS, GPUS = 64, 8  # of a node, on paper: SLURM is told not to look
FINAL = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


def missing() -> str:
    """What a cluster needs and this machine lacks; empty if it can be started."""
    if os.getuid() != 0:
        return "not root"
    programs = [p for p in ("slurmctld", "slurmd", "munged", "ip", "nsenter", "unshare") if shutil.which(p) is None]
    return f"not installed: {', '.join(programs)}" if programs else ""


def _die_with_parent() -> None:
    """The daemon goes when the test process does, however that ends."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def _ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, capture_output=not check)


class Cluster:
    """`with Cluster(3) as cluster: cluster.sbatch(...)`. Nodes are n1, n2, ..."""

    def __init__(self, nodes: int, kill_wait: int = 20, slurmd_timeout: int = 10) -> None:
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self._kill_wait, self._slurmd_timeout = kill_wait, slurmd_timeout
        self.base = Path(tempfile.mkdtemp(prefix="rimslurm-"))  # short: it holds sockets
        self.conf = self.base / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._mine = False

    # ---- up and down ---------------------------------------------------------------------------------

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._claim = open(f"/tmp/{PREFIX}.lock", "w")  # noqa: SIM115  # held until the end
        try:
            fcntl.flock(self._claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError("another test cluster runs on this machine; its names and addresses are taken") from None
        self._mine = True
        for folder in ("log", "munge", "state", "dev"):
            (self.base / folder).mkdir()
        self._remove_network()
        self._network()
        self._configuration()
        key = self.base / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        paths = [f"--{name}={self.base}/munge/{name.split('-')[0]}" for name in ("key-file", "socket", "pid-file", "seed-file")]
        self._spawn("munged", ["munged", "--foreground", "--force", *paths, f"--log-file={self.base}/log/munged.log"])
        self._wait((self.base / "munge" / "socket").exists, 20, "munged")
        self._spawn("slurmctld", self._inside(["slurmctld", "-D", "-f", str(self.conf)]))
        for node in self.nodes:
            self.start_slurmd(node)
        self._wait(lambda: set(self.node_states().values()) == {"idle"}, 60, "idle nodes")

    def close(self) -> None:
        """Cancel what runs, end the daemons, remove the network and the files."""
        if "slurmctld" in self._daemons:
            self.client("scancel", "--user=root", "--full", check=False)
            self.client("scancel", "--user=root", "--signal=KILL", check=False)
            deadline = time.monotonic() + 15
            while time.monotonic() < deadline and self.client("squeue", "-h", check=False).strip():
                time.sleep(0.2)
        for name in ("slurmctld", *self.nodes, "munged"):
            self._end(name, signal.SIGTERM)
        if self._mine:
            self._remove_network()
            self._claim.close()
        shutil.rmtree(self.base, ignore_errors=True)

    @staticmethod
    def _wait_until_gone(link: str) -> None:
        """The kernel takes the links of an earlier cluster down some time after their network space went."""
        deadline = time.monotonic() + 60
        while Path("/sys/class/net", link).exists() and time.monotonic() < deadline:
            time.sleep(0.2)

    def _network(self) -> None:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{SUBNET}.1/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for i, node in enumerate(self.nodes, 1):
            space = f"{PREFIX}-{node}"
            _ip("netns", "add", space)
            self._wait_until_gone(f"{PREFIX}v{i}")
            _ip("link", "add", f"{PREFIX}v{i}", "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", f"{PREFIX}v{i}", "master", BRIDGE, "up")
            _ip("-n", space, "addr", "add", f"{SUBNET}.{10 + i}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")

    def _remove_network(self) -> None:
        for space in Path("/run/netns").glob(f"{PREFIX}-*"):
            _ip("netns", "del", space.name, check=False)
        if Path(f"/sys/class/net/{BRIDGE}").exists():
            _ip("link", "del", BRIDGE, check=False)

    def _configuration(self) -> None:
        lines = [f"127.0.0.1 localhost\n{SUBNET}.1 controller\n"]
        lines += [f"{SUBNET}.{10 + i} {node}\n" for i, node in enumerate(self.nodes, 1)]
        (self.base / "hosts").write_text("".join(lines))
        for gpu in range(GPUS):  # device files that are there and do nothing
            os.mknod(self.base / "dev" / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        every = ",".join(self.nodes)
        nodes = "".join(
            f"NodeName={node} NodeAddr={SUBNET}.{10 + i} Port={PORT + i} CPUs={CPUS} Boards=1 SocketsPerBoard=1 "
            f"CoresPerSocket={CPUS} ThreadsPerCore=1 RealMemory=65536 Gres=gpu:{GPUS}\n"
            for i, node in enumerate(self.nodes, 1)
        )
        (self.base / "gres.conf").write_text(f"NodeName={every} Name=gpu File={self.base}/dev/gpu[0-{GPUS - 1}]\n")
        # All nodes share this machine's /tmp, where two of them would make the same PMIx folder.
        (self.base / "mpi.conf").write_text(f"PMIxCliTmpDirBase={self.base}/pmix\n")
        (self.base / "pmix").mkdir()
        self.conf.write_text(f"""\
ClusterName=rimtest
SlurmctldHost=controller({SUBNET}.1)
SlurmctldPort={PORT}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until its old credential is surely void: 5 instead of 120 seconds.
AuthInfo=socket={self.base}/munge/socket,cred_expire=5
StateSaveLocation={self.base}/state/controller
SlurmdSpoolDir={self.base}/state/%n
SlurmctldPidFile={self.base}/slurmctld.pid
SlurmdPidFile={self.base}/%n.pid
SlurmctldLogFile={self.base}/log/slurmctld.log
SlurmdLogFile={self.base}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
EnforcePartLimits=ALL
ReturnToService=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdTimeout={self._slurmd_timeout}
SlurmctldTimeout=10
KillWait={self._kill_wait}
MinJobAge=3600
InactiveLimit=0
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
{nodes}PartitionName=batch Nodes={every} Default=YES MaxTime=24:00:00 PriorityTier=10
PartitionName=low Nodes={every} MaxTime=24:00:00 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes={every} MaxTime=24:00:00 PriorityTier=100 PreemptMode=OFF
""")

    def _inside(self, command: Sequence[str], node: str = "") -> list[str]:
        """The command with the cluster's own /etc/hosts; on a node also in its network, with its name and PMIx folder."""
        script = f"mount --bind {self.base}/hosts /etc/hosts"
        enter: list[str] = []
        if node:
            (self.base / "state" / node / "pmix").mkdir(parents=True, exist_ok=True)
            script += f" && hostname {node} && mount --bind {self.base}/state/{node}/pmix {self.base}/pmix"
            enter = ["nsenter", f"--net=/run/netns/{PREFIX}-{node}"]
        else:
            script += " && hostname controller"
        return [*enter, "unshare", "--uts", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh", *command]

    def _spawn(self, name: str, command: Sequence[str]) -> None:
        with (self.base / "log" / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "SLURM_CONF": str(self.conf)},
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509  # this process has no threads
            )

    def _end(self, name: str, number: int) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        daemon.send_signal(number)
        try:
            daemon.wait(20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _wait(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not after {seconds:.0f} s\n{self.logs()}")
            time.sleep(0.1)

    # ---- what can go wrong with a node ---------------------------------------------------------------

    def start_slurmd(self, node: str) -> None:
        self._spawn(node, self._inside(["slurmd", "-D", "-f", str(self.conf), "-N", node], node))

    def pid(self, node: str) -> int:
        """The process id of a node's slurmd."""
        return self._daemons[node].pid

    def kill_slurmd(self, node: str) -> None:
        """What the node runs goes on; SLURM finds out when the node does not answer any more."""
        self._end(node, signal.SIGKILL)

    def cut_link(self, node: str) -> None:
        _ip("link", "set", f"{PREFIX}v{node[1:]}", "down")

    def mend_link(self, node: str) -> None:
        _ip("link", "set", f"{PREFIX}v{node[1:]}", "up")

    def mend(self) -> None:
        """Undo what was done to nodes, as far as SLURM has noticed it."""
        for node in self.nodes:
            self.mend_link(node)
            if node not in self._daemons:
                self.start_slurmd(node)
        for node, state in self.node_states().items():
            if state.startswith(("down", "drain")) and "*" not in state:
                self.client("scontrol", "update", f"NodeName={node}", "State=RESUME", check=False)

    def heal(self) -> None:
        """Every node back to idle, whatever was done to it."""

        def healthy() -> bool:
            self.mend()
            return set(self.node_states().values()) == {"idle"}

        self._wait(healthy, 90, "idle nodes")

    # ---- talking to it -------------------------------------------------------------------------------

    def environment(self, **extra: str) -> dict[str, str]:
        """Without what another launcher or another SLURM left in ours."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "RIM_", "PMI", "OMPI_"))}
        for name in LAUNCHER_VARIABLES:
            kept.pop(name, None)
        return {**kept, "SLURM_CONF": str(self.conf), **extra}

    def client(self, *command: str, check: bool = True, **extra: str) -> str:
        done = subprocess.run(
            command,
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            cwd=Path(__file__).parents[1],
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.stdout + ("" if check else done.stderr)

    def node_states(self) -> dict[str, str]:
        lines = self.client("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %t", check=False).splitlines()
        return dict(line.split() for line in lines if len(line.split()) == 2)

    def sbatch(self, *arguments: str, **extra: str) -> str:
        """Submit from the checkout; returns the job id."""
        return self.client("sbatch", "--parsable", *arguments, **extra).strip().split(";")[0]

    def job(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a dictionary."""
        text = self.client("scontrol", "-o", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text.splitlines()[0]))

    def wait(self, job: str, states: str | set[str] = FINAL, seconds: float = 300, every: float = 0.2) -> str:
        """Until the job is in one of the states; returns it."""
        wanted = {states} if isinstance(states, str) else states
        deadline = time.monotonic() + seconds
        while (state := self.job(job)["JobState"]) not in wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state} after {seconds:.0f} s, not {wanted}\n{self.logs()}")
            if state in FINAL:
                raise AssertionError(f"job {job} ended as {state}, not {wanted}")
            time.sleep(every)
        return state

    def logs(self, lines: int = 15) -> str:
        ends = {p.name: p.read_text(errors="replace").splitlines()[-lines:] for p in (self.base / "log").glob("*.log")}
        return "\n".join(line for name in sorted(ends) for line in (f"--- {name}", *ends[name]))


if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"no cluster: {reason}")
    with Cluster(int(sys.argv[1]) if len(sys.argv) > 1 else 2) as cluster:
        print(f"export SLURM_CONF={cluster.conf}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
