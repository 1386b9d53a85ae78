"""Checks before anything large is built: ranks agree and reach each other, disks have room, a split model computes correctly.

First the ranks compare versions, recipe, data and devices through the job's store: ranks that disagree would wait for each
other in a collective. Then every kind of group sends something, and a tiny model runs split over the mesh. Each check has a
time-out and names the ranks that did not enter it. The result is the run's `preflight.json`.
"""

from __future__ import annotations

import functools
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

import rim_dist
from rim_dist.checkpoint import store
from rim_dist.config import Recipe
from rim_dist.errors import TrainingError
from rim_dist.files import write_atomically
from rim_dist.messages import say
from rim_dist.model.requirements import Requirements
from rim_dist.model.skeleton import skeleton
from rim_dist.parallel.collectives import all_reduce, all_to_all
from rim_dist.parallel.environment import package_versions
from rim_dist.parallel.launch import Process
from rim_dist.parallel.mesh import Mesh
from rim_dist.recipe import flatten
from rim_dist.training.hardware import free_memory_bytes, this_device
from rim_dist.training.parity import check_parity

_PACKAGES = ("torch", "deepspeed", "transformers", "peft")
_STATE_BYTES = 12  # of a trained parameter in a checkpoint: fp32 value and two moments
_SMALL_TIMES, _LARGE_TIMES = 10, 3
_LARGE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}


def versions() -> dict[str, str]:
    """Versions that must be the same on every rank: Python, packages, and on GPUs CUDA and NCCL."""
    found = {"rim_dist": rim_dist.__version__, **package_versions(_PACKAGES)}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def first_difference(values: list[dict[str, Any]], name: Callable[[list[int]], str]) -> str:
    """The first field in which ranks' (nested) values differ, with the values and the ranks that have the rarer ones.

    Empty if there is none. `name` formats ranks for the message.
    """
    flat = [flatten(value) for value in values]
    for field in dict.fromkeys(key for value in flat for key in value):
        by_value: dict[str, list[int]] = {}
        for rank, value in enumerate(flat):
            by_value.setdefault(repr(value.get(field)), []).append(rank)
        if len(by_value) > 1:
            (common, _), *others = sorted(by_value.items(), key=lambda pair: (-len(pair[1]), pair[1]))
            shown = ", ".join(f"{_short(value)} on {name(ranks)}" for value, ranks in others[:3])
            return f"{field} is not the same on every rank: {shown}, {_short(common)} on the others"
    return ""


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


class Preflight:
    """The checks before a run. Every method is collective and raises the same error on every rank."""

    def __init__(self, recipe: Recipe, process: Process) -> None:
        self._recipe, self._process = recipe, process
        self._seconds = 0.0
        self._path = recipe.folder / "preflight.json"
        self.report: dict[str, Any] = {"ranks": process.ranks}

    def say(self, text: str) -> None:
        if self._process.is_first:
            say(f"preflight: {text}")

    @contextmanager
    def _check(self, what: str) -> Iterator[None]:
        monitor, began = self._process.monitor, time.perf_counter()
        with nullcontext() if monitor is None else monitor.timeout(self._recipe.parallel.preflight_seconds, what):
            yield
        self._seconds += time.perf_counter() - began

    # ---- what must agree, and what each rank has ------------------------------------------------------------

    def compare(self, requirements: Requirements, fingerprint: str, ds_config: dict[str, Any]) -> None:
        """Compare versions, recipe, DeepSpeed configuration, data and devices of all ranks, and check the room on disks.

        Needs no collective, so it can run before the groups of the mesh exist. Raises TrainingError.
        """
        recipe, process = self._recipe, self._process
        existing = next(p for p in (self._path, *self._path.absolute().parents) if p.is_dir())
        must_agree = {
            "versions": versions(),
            **recipe.model_dump(mode="json", exclude={"data": {"cache_dir"}}),  # that may be each node's own disk
            "deepspeed": ds_config,
            "attention": {stage: choice.kernel for stage, choice in requirements.attention.items()},
            "data fingerprint": fingerprint,
            "device": process.device.partition(":")[0],
        }
        own = {
            "device": this_device(),
            "memory_free_bytes": free_memory_bytes(),
            "disk_free_bytes": shutil.disk_usage(existing).free,
        }
        with self._check("the comparison of the ranks"):
            problem, monitor, gathered = "", process.monitor, [[must_agree, own]]
            if monitor is not None:
                gathered = [json.loads(text) for text in monitor.gather(json.dumps(gathered[0]))]
                problem = first_difference([common for common, _ in gathered], monitor.name)
            if process.is_first:
                problem = problem or self._note_hosts([own for _, own in gathered]) or self._disk_problem(requirements)
            if monitor is not None:
                problem = monitor.broadcast(problem)
        if problem:
            raise TrainingError(problem)
        self.report["versions"] = must_agree["versions"]
        same = "versions, recipe and data are the same on all ranks; " if process.ranks > 1 else ""
        self.say(same + self._hosts_in_words())

    def _note_hosts(self, resources: list[dict[str, Any]]) -> str:
        """Put the ranks' devices, memory and disk into the report, by host. Returns a problem if two ranks have one device."""
        hosts: dict[str, dict[str, Any]] = {}
        owners: dict[tuple[str, str], int] = {}
        for rank, (host, own) in enumerate(zip(self._process.hosts, resources, strict=True)):
            device = own.pop("device")
            entry = hosts.setdefault(host, {"ranks": [], "devices": [], **own})
            entry["ranks"].append(rank)
            entry["devices"].append(device)
            identity = device.get("identity")
            if identity and (owner := owners.setdefault((host, identity), rank)) != rank:
                return f"ranks {owner} and {rank} have the same {device['name']} of {host}; start one rank for each device"
        self.report["hosts"] = hosts
        return ""

    def _disk_problem(self, requirements: Requirements) -> str:
        """Returns a problem if a host's disk clearly has no room for its shards of a checkpoint."""
        complete = store.complete_checkpoints(self._recipe.folder / "checkpoints")
        if complete and store.read_state(complete[-1]).finished:
            return ""
        model = skeleton(self._recipe, requirements.config, requirements.tokens)
        needed = _STATE_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
        for host, entry in self.report["hosts"].items():
            count, free = len(entry["ranks"]), entry["disk_free_bytes"]
            if free < (shards := needed * count / self._process.ranks):
                return (
                    f"{self._recipe.folder}: a checkpoint takes at least {_gib(shards)} for the {count} rank(s) on {host}, "
                    f"{_gib(free)} are free; make room and start the same command again"
                )
        return ""

    def _hosts_in_words(self) -> str:
        hosts = self.report.get("hosts", {})  # the first rank's
        shown = (
            f"{host}: {len(entry['ranks'])} x {entry['devices'][0]['name']}, {_gib(entry['memory_free_bytes'])} of memory and "
            f"{_gib(entry['disk_free_bytes'])} of disk free"
            for host, entry in list(hosts.items())[:8]
        )
        return "; ".join(shown) + (f"; and {len(hosts) - 8} more hosts" if len(hosts) > 8 else "")

    # ---- communication ----------------------------------------------------------------------------------------

    def try_links(self, mesh: Mesh) -> None:
        """Time all-reduce and all-to-all in every kind of group; the report has the slowest group of each kind."""
        if self._process.ranks == 1:
            return
        kinds = {"tensor": mesh.tensor_group, "sequence": mesh.sequence_group, "shards": mesh.shard_group}
        groups = {kind: group for kind, group in kinds.items() if group is not None} | {"world": dist.group.WORLD}
        device = self._process.device
        operations: dict[str, Callable[..., Any]] = {"all-reduce": all_reduce, "all-to-all": all_to_all}
        times = []
        for kind, group in groups.items():
            for name, send in operations.items():
                with self._check(f"the {name} of the {kind} group{'s' if kind != 'world' else ''}"):
                    small, large = (_buffer(group, size, device) for size in (4, _LARGE_BYTES[device.partition(":")[0]]))
                    times.append(_median_seconds(functools.partial(send, small, group), device, _SMALL_TIMES))
                    times.append(_median_seconds(functools.partial(send, large, group), device, _LARGE_TIMES) / large.nbytes)
        slowest = torch.tensor(times, dtype=torch.float64, device=device)
        with self._check("the comparison of the times"):
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        found = iter(slowest.tolist())
        links: dict[str, dict[str, Any]] = {}
        for kind, group in groups.items():
            links[kind] = {"ranks": dist.get_world_size(group)}
            shown = []
            for name in operations:
                seconds, rate = next(found), 1 / next(found)
                links[kind][name.replace("-", "_")] = {"seconds": seconds, "bytes_per_second": rate}
                shown.append(f"{name} {1e3 * seconds:.2f} ms, {rate / 1e9:.2f} GB/s")
            self.say(f"{kind} ({links[kind]['ranks']} ranks): {'; '.join(shown)}")
        self.report["links"] = links

    def check_parity(self, requirements: Requirements, mesh: Mesh) -> None:
        """Compare a tiny model of the family, split as the run's model will be, with itself unsplit. Raises ModelError."""
        if mesh.degrees.tensor == mesh.degrees.sequence == 1:
            return
        with self._check("the parity check with a tiny model"):
            found = [
                check_parity(
                    requirements.config,
                    mesh,
                    requirements.sequence_mode,
                    kernel,
                    self._process.device,
                    self._recipe.model.trust_remote_code,
                )
                for kernel in requirements.proof_kernels
            ]
        loss, gradient = max(each.loss for each in found), max(each.gradient for each in found)
        self.report["rehearsal"] = {"loss_difference": loss, "gradient_difference": gradient}
        self.say(
            f"a tiny {requirements.config.model_type} split over tensor {mesh.degrees.tensor} x "
            f"sequence {mesh.degrees.sequence} "
            f"computes what it does whole (loss {loss:.0e}, gradients {gradient:.0e})"
        )

    # ---- the end -----------------------------------------------------------------------------------------------

    def finish(self, tokens: int, seconds: float, loss: float | None, memory_bytes: int) -> None:
        """Add the engine's batch without weight to the report, and write the report into the run's folder (first rank)."""
        self._seconds += seconds
        self.report["dry_batch"] = {"tokens": tokens, "seconds": seconds, "loss": loss, "memory_bytes": memory_bytes}
        self.report["seconds"] = self._seconds
        self.say(
            f"forward and backward of {tokens} tokens in {seconds:.2f} s, {memory_bytes / 2**30:.2f} GiB in use; checks took "
            f"{self._seconds:.2f} s in all"
        )
        if self._process.is_first:
            write_atomically(self._path, json.dumps(self.report, indent=1) + "\n")


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def _buffer(group: Any, size_bytes: int, device: str) -> torch.Tensor:
    """About so many bytes of fp32, as many for every rank of the group."""
    ranks = dist.get_world_size(group)
    return torch.zeros(max(1, size_bytes // 4 // ranks) * ranks, device=device)


def _median_seconds(send: Callable[[], Any], device: str, times: int) -> float:
    def timed() -> float:
        began = time.perf_counter()
        send()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    timed()  # makes the connections
    return statistics.median(timed() for _ in range(times))
