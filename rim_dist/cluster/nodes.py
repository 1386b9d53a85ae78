"""Check before the ranks start that every node reaches the head node's port and sees the run's folder."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

from rim_dist.cluster.attempts import record_end
from rim_dist.errors import EXIT_DONE, EXIT_TRY_AGAIN, ConfigError
from rim_dist.messages import say
from rim_dist.parallel.environment import host_name

_PORTS = range(20000, 32000)  # below the ports that Linux gives to outgoing connections (from 32768)
_TRIES = 64


def rendezvous_port(job: int) -> int:
    """A free port of this machine. The search begins at a port computed from the job id, so that two jobs of a node differ."""
    for offset in range(_TRIES):
        port = _PORTS.start + (job + 997 * offset) % len(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return port
    raise ConfigError(f"no free port among {_TRIES} of {_PORTS.start}..{_PORTS.stop - 1} on {socket.gethostname()}")


def _receive(server: socket.socket, expected: int, deadline: float) -> dict[str, str]:
    """Problems of the nodes that report in time, by node; empty for a node without one."""
    found: dict[str, str] = {}
    with contextlib.suppress(TimeoutError):
        while len(found) < expected and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError, ValueError):
                connection.settimeout(max(0.1, deadline - time.monotonic()))
                name, problem = connection.makefile(encoding="utf-8").read().split("\n", 1)
                found[name] = problem
    return found


def _report(head: str, port: int, problem: str, deadline: float) -> str:
    """Send this node's problem, or none, to the head node. Returns why that was not possible."""
    why = "no time"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((head, port), timeout=max(0.1, deadline - time.monotonic())) as connection:
                connection.sendall(f"{host_name()}\n{problem}".encode())
                return ""
        except OSError as error:
            why = str(error)
            time.sleep(0.2)
    return why


def check_nodes(attempt: Path, head: str, port: int, node: int, names: list[str], seconds: float) -> int:
    """Run once on every node; returns an exit status. Node 0 listens where the ranks will meet, the others report to it.

    Nodes that do not report, or do not see the run's folder, are recorded as suspects of the attempt. If most of them do not
    report, the head node, or its name, is the likely cause and is recorded instead.
    """
    deadline, here = time.monotonic() + seconds, host_name()
    sees = (attempt / "start.json").is_file()
    problem = "" if sees else f"does not see {attempt}; run.output_dir must be on a shared file system"
    if node != 0:
        if why := _report(head, port, problem, deadline):
            say(f"rim-dist: {here} cannot reach {head}:{port} ({why})")
            return EXIT_TRY_AGAIN
        return EXIT_DONE
    others = [name for name in names if name != here]
    with socket.create_server(("", port), backlog=max(8, min(4096, len(others)))) as server:
        found = _receive(server, len(others), deadline)
    silent = [name for name in others if name not in found]
    bad = {name: found[name] for name in others if found.get(name)}
    bad.update(dict.fromkeys(silent, f"did not reach {head}:{port} within {seconds:.0f} s"))
    if problem:
        bad[here] = problem
    elif len(silent) > max(1, len(others) // 2):
        bad = {here: f"not reached at {head}:{port} by {', '.join(sorted(bad)[:8])}"}
    for name, why in sorted(bad.items()):
        say(f"rim-dist: {name} {why}")
        record_end(attempt, -1, EXIT_TRY_AGAIN, f"{name} {why}", suspect=True, host=name)
    return EXIT_TRY_AGAIN if bad else EXIT_DONE
