"""Before the ranks start: does every node reach the head node's port and see the run's folder? Says which one does not."""

from __future__ import annotations

import contextlib
import select
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
    """A port of this machine that follows from the job id and is free now: two jobs of a node start from different ones."""
    for offset in range(_TRIES):
        port = _PORTS.start + (job + 997 * offset) % len(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", port))
            return port
    raise ConfigError(f"no free port among {_TRIES} of {_PORTS.start}..{_PORTS.stop - 1} on {socket.gethostname()}")


def _problem(start: Path) -> str:
    return "" if (start / "start.json").is_file() else f"does not see {start}; run.output_dir must be on a shared file system"


def _receive(server: socket.socket, expected: int, deadline: float) -> dict[str, str]:
    """Problems by node, as they report within the time."""
    found: dict[str, str] = {}
    while len(found) < expected and (left := deadline - time.monotonic()) > 0:
        if not select.select([server], [], [], left)[0]:
            break
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError, UnicodeDecodeError, ValueError):
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            data = b""
            while part := connection.recv(4096):
                data += part
            name, problem = data.decode().split("\n", 1)
            found[name] = problem
    return found


def _report(head: str, port: int, problem: str, deadline: float) -> str:
    """Tell the head node how this node is; returns why it could not."""
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


def check_nodes(start: Path, head: str, port: int, node: int, names: list[str], seconds: float) -> int:
    """Run once a node. The first one listens where the ranks will meet; the others report to it.

    Nodes that do not arrive, or see no run folder, are noted as suspects in the start's record. Most of them missing
    speaks against the head node, or against its name.
    """
    deadline = time.monotonic() + seconds
    problem = _problem(start)
    if node != 0:
        if why := _report(head, port, problem, deadline):
            say(f"rim-dist: {host_name()} cannot reach {head}:{port} ({why})")
            return EXIT_TRY_AGAIN
        return EXIT_DONE
    others = [name for name in names if name != host_name()]
    with socket.create_server(("", port), backlog=max(8, min(4096, len(others)))) as server:
        found = _receive(server, len(others), deadline)
    bad = {name: found[name] for name in others if found.get(name)}
    bad.update({name: f"did not reach {head}:{port} within {seconds:.0f} s" for name in others if name not in found})
    if problem:
        bad[host_name()] = problem
    elif len([name for name in others if name not in found]) > max(1, len(others) // 2):
        bad = {host_name(): f"not reached at {head}:{port} by {', '.join(sorted(bad)[:8])}"}
    for name, why in sorted(bad.items()):
        say(f"rim-dist: {name} {why}")
        record_end(start, -1, EXIT_TRY_AGAIN, f"{name} {why}", suspect=True, host=name)
    return EXIT_TRY_AGAIN if bad else EXIT_DONE
