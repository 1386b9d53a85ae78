"""Where the ranks of one start meet: at the head's port, each once, and nobody else."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote, urlparse

from rim_dist.errors import EXIT_TRY_AGAIN, ConfigError, PeerLost, RimError, first_line
from rim_dist.parallel.environment import RankInfo, host_name

_SCHEME = "rim"  # of torch's rendezvous handler


def start_of(info: RankInfo, environment: Mapping[str, str]) -> str:
    """What tells this start from every other on the same hosts and is the same on all of its ranks; empty if nothing does."""
    if "RIM_ATTEMPT" in environment:
        return environment["RIM_ATTEMPT"]
    if info.launcher == "slurm":
        names = {"job": "SLURM_JOB_ID", "step": "SLURM_STEP_ID", "restart": "SLURM_RESTART_COUNT"}
        return f"SLURM {' '.join(f'{word} {environment.get(name) or 0}' for word, name in names.items())}"
    return ""


@contextlib.contextmanager
def meeting(info: RankInfo, seconds: float, start: str) -> Iterator[str]:
    """The `init_method` of a process group that takes only the ranks of this start.

    Raises ConfigError for a port that another process or another start has, and for a rank that comes twice; PeerLost for ranks
    that do not come. Under a job script the next attempt takes another port, so that a taken one ends with 75 as well.
    """
    from torch.distributed import DistError, register_rendezvous_handler

    with contextlib.suppress(RuntimeError):  # it is registered
        register_rendezvous_handler(_SCHEME, _rendezvous)
    head = _head()
    try:
        yield f"{_SCHEME}:///{quote(start, safe='')}"
    except ConfigError as error:
        raise _of_port(error) from None
    except DistError as error:
        if "EADDRINUSE" in str(error):
            taken = f"MASTER_PORT: {head} is taken by another process; export MASTER_PORT with a free port"
            raise _of_port(ConfigError(taken)) from None
        raise PeerLost(
            f"rank {info.rank}: {info.ranks} ranks did not meet at {head} in {seconds:g} s ({first_line(error)}); "
            "start the same command again"
        ) from error


def _head() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _rendezvous(url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
    """torch's own rendezvous by the environment, for the ranks of one start."""
    from torch.distributed import rendezvous

    store, rank, ranks = next(rendezvous("env://", **options))
    _check_in(store, rank, ranks, unquote(urlparse(url).path[1:]), _head())
    yield store, rank, ranks


def _of_port(error: RimError) -> RimError:
    if "RIM_ATTEMPT" in os.environ:
        error.exit_status = EXIT_TRY_AGAIN
    return error


def _check_in(store: Any, rank: int, ranks: int, start: str, head: str) -> None:
    """Compare with what the first rank says of itself before anything else of the store is touched."""
    from torch.distributed import PrefixStore

    desk = PrefixStore("rim_dist/start", store)
    if rank == 0:
        desk.set("first", json.dumps({"start": start, "ranks": ranks, "host": host_name()}))
    first = json.loads(desk.get("first"))
    if first["start"] != start:
        raise ConfigError(
            f"MASTER_PORT: at {head} is the first rank of another start ({first['start'] or 'unknown'} on {first['host']}), "
            f"not of this one ({start or 'unknown'}); export MASTER_PORT with a free port"
        )
    if first["ranks"] != ranks:
        raise ConfigError(f"WORLD_SIZE={ranks}, but {first['ranks']} on the first rank ({first['host']}, {head})")
    if desk.add(f"rank/{rank}", 1) > 1:
        raise ConfigError(f"RANK={rank} ({host_name()}): another process has come to {head} with this rank; start each once")
