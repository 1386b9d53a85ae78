"""Before anything large is built: do ranks agree, do they reach each other, is there room, does a split model compute right?

First the ranks compare what they are and have through the job's store, since ranks that disagree would wait for each other in
a collective. Then every kind of group sends something, and a tiny model runs split over them. Each check has a time-out and
names who did not come to it. The result is the run's `preflight.json`.
"""

from __future__ import annotations

import functools
import json
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib import metadata
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
from rim_dist.parallel.launch import Process
from rim_dist.parallel.mesh import Mesh
from rim_dist.training.hardware import free_memory_bytes, this_device
from rim_dist.training.parity import check_parity

_PACKAGES = ("torch", "deepspeed", "transformers", "peft")
_STATE_BYTES = 12  # of a trained parameter in a checkpoint: fp32 value and two moments
_SMALL_TIMES, _LARGE_TIMES = 10, 3
_LARGE_BYTES = {"cpu": 1 << 20, "cuda": 1 << 26}


def versions() -> dict[str, str]:
    """What must be the same everywhere: Python, packages, and on GPUs CUDA and NCCL."""
    found = {"rim_dist": rim_dist.__version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in _PACKAGES}
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    return found


def first_difference(values: list[dict[str, Any]], name: Callable[[list[int]], str]) -> str:
    """The first field in which ranks' (nested) values differ, with both values and the ranks that have the rarer one.

    Empty if there is none. `name`: ranks in words.
    """
    flat = [_flat(value) for value in values]
    for field in dict.fromkeys(key for value in flat for key in value):
        by_value: dict[str, list[int]] = {}
        for rank, value in enumerate(flat):
            by_value.setdefault(repr(value.get(field)), []).append(rank)
        if len(by_value) > 1:
            (common, _), *others = sorted(by_value.items(), key=lambda pair: (-len(pair[1]), pair[1]))
            shown = ", ".join(f"{_short(value)} on {name(ranks)}" for value, ranks in others[:3])
            return f"{field} is not the same on every rank: {shown}, {_short(common)} on the others"
    return ""


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {name: leaf for key, value in tree.items() for name, leaf in _flat(value, f"{prefix}.{key}".lstrip(".")).items()}


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


class Preflight:
    """The checks of one start. Every method is collective and raises the same error on every rank."""

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

    # ---- what ranks are and have ---------------------------------------------------------------------------

    def compare(self, requirements: Requirements, fingerprint: str, ds_config: dict[str, Any]) -> None:
        """Versions, recipe, DeepSpeed configuration, data and devices must fit together, and a checkpoint on the disk.

        Needs no collective, so that it comes before the groups of the mesh. Raises TrainingError.
        """
        recipe, process = self._recipe, self._process
        existing = next(p for p in (self._path, *self._path.absolute().parents) if p.is_dir())
        must_agree = {
            "versions": versions(),
            **recipe.model_dump(mode="json", exclude={"data": {"cache_dir"}}),  # that may be each node's own disk
            "deepspeed": ds_config,
            "attention": requirements.attention.path,
            "data fingerprint": fingerprint,
            "device": process.device.partition(":")[0],
        }
        own = {
            "device": asdict(this_device()),
            "memory_free_bytes": free_memory_bytes(),
            "disk_free_bytes": shutil.disk_usage(existing).free,
        }
        with self._check("the comparison of the ranks"):
            if (monitor := process.monitor) is None:
                verdict = self._note_hosts([own]) or self._lacking_room(requirements)
            else:
                verdict = ""
                gathered = [json.loads(text) for text in monitor.gather(json.dumps([must_agree, own]))]
                if process.is_first:
                    verdict = (
                        first_difference([fact[0] for fact in gathered], monitor.name)
                        or self._note_hosts([fact[1] for fact in gathered])
                        or self._lacking_room(requirements)
                    )
                verdict = monitor.broadcast(verdict)
        if verdict:
            raise TrainingError(verdict)
        self.report["versions"] = must_agree["versions"]
        same = "versions, recipe and data are the same on all ranks; " if process.ranks > 1 else ""
        self.say(same + self._room())

    def _note_hosts(self, facts: list[dict[str, Any]]) -> str:
        """Take what the ranks have, host by host, into the report. Says so if two ranks have the same device."""
        hosts: dict[str, dict[str, Any]] = {}
        owners: dict[tuple[str, str], int] = {}
        for rank, (host, fact) in enumerate(zip(self._process.hosts, facts, strict=True)):
            device = fact.pop("device")
            entry = hosts.setdefault(host, {"ranks": [], "devices": [], **fact})
            entry["ranks"].append(rank)
            entry["devices"].append({key: value for key, value in device.items() if value})
            owner = owners.setdefault((host, device["identity"]), rank)
            if device["identity"] and owner != rank:
                return f"ranks {owner} and {rank} have the same {device['name']} of {host}; start one rank for each device"
        self.report["hosts"] = hosts
        return ""

    def _lacking_room(self, requirements: Requirements) -> str:
        """Says so if a host's disk clearly cannot take its part of a checkpoint."""
        complete = store.complete_checkpoints(self._recipe.folder / "checkpoints")
        if complete and store.read_state(complete[-1]).finished:
            return ""
        model = skeleton(self._recipe, requirements.config, requirements.tokens)
        needed = _STATE_BYTES * sum(p.numel() for p in model.parameters() if p.requires_grad)
        for host, entry in self.report["hosts"].items():
            count, free = len(entry["ranks"]), entry["disk_free_bytes"]
            if free < (share := needed * count / self._process.ranks):
                return (
                    f"{self._recipe.folder}: a checkpoint takes at least {_gib(share)} for the {count} rank(s) on {host}, "
                    f"{_gib(free)} are free; make room and start the same command again"
                )
        return ""

    def _room(self) -> str:
        hosts = self.report.get("hosts", {})  # the first rank's
        shown = (
            f"{host}: {len(entry['ranks'])} x {entry['devices'][0]['name']}, {_gib(entry['memory_free_bytes'])} of memory and "
            f"{_gib(entry['disk_free_bytes'])} of disk free"
            for host, entry in list(hosts.items())[:8]
        )
        return "; ".join(shown) + (f"; and {len(hosts) - 8} more hosts" if len(hosts) > 8 else "")

    # ---- what ranks send each other --------------------------------------------------------------------------

    def try_links(self, mesh: Mesh) -> None:
        """Time all-reduce and all-to-all in every kind of group; the report has the slowest group of each kind."""
        if self._process.ranks == 1:
            return
        kinds = {"tensor": mesh.tensor_group, "sequence": mesh.sequence_group, "shards": mesh.shard_group}
        groups = {kind: group for kind, group in kinds.items() if group is not None} | {"world": dist.group.WORLD}
        device = self._process.device
        times = []
        for kind, group in groups.items():
            for name, send in (("all-reduce", _all_reduce), ("all-to-all", _all_to_all)):
                with self._check(f"the {name} of the {kind} group{'s' if kind != 'world' else ''}"):
                    small, large = (_buffer(group, size, device) for size in (4, _LARGE_BYTES[device.partition(":")[0]]))
                    times.append(_median_seconds(functools.partial(send, small, group), device, _SMALL_TIMES))
                    times.append(_median_seconds(functools.partial(send, large, group), device, _LARGE_TIMES) / large.nbytes)
        slowest = torch.tensor(times, dtype=torch.float64, device=device)
        with self._check("the comparison of the times"):
            dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        found = iter(slowest.tolist())
        links: dict[str, Any] = {}
        for kind, group in groups.items():
            links[kind] = {"ranks": dist.get_world_size(group)}
            for name in ("all_reduce", "all_to_all"):
                links[kind][name] = {"seconds": next(found), "bytes_per_second": 1 / next(found)}
            shown = (
                f"{name.replace('_', '-')} {1e3 * links[kind][name]['seconds']:.2f} ms, "
                f"{links[kind][name]['bytes_per_second'] / 1e9:.2f} GB/s"
                for name in ("all_reduce", "all_to_all")
            )
            self.say(f"{kind} ({links[kind]['ranks']} ranks): {'; '.join(shown)}")
        self.report["links"] = links

    def check_parity(self, requirements: Requirements, mesh: Mesh) -> None:
        """A tiny model of the family, split as the run's will be, against itself whole. Raises ModelError."""
        if mesh.degrees.tensor == mesh.degrees.sequence == 1:
            return
        with self._check("the rehearsal with a tiny model"):
            found = check_parity(
                requirements.config,
                mesh,
                requirements.sequence_mode,
                requirements.attention.path,
                self._process.device,
                self._recipe.model.trust_remote_code,
            )
        self.report["rehearsal"] = {"loss_difference": found.loss, "gradient_difference": found.gradient}
        self.say(
            f"a tiny {requirements.config.model_type} split over tensor {mesh.degrees.tensor} x "
            f"sequence {mesh.degrees.sequence} "
            f"computes what it does whole (loss {found.loss:.0e}, gradients {found.gradient:.0e})"
        )

    # ---- the end -----------------------------------------------------------------------------------------------

    def finish(self, tokens: int, seconds: float, loss: float | None, memory_bytes: int) -> None:
        """Note the batch that the engine ran without weight, and put all that is known into the run's folder (first rank)."""
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


def _all_reduce(buffer: torch.Tensor, group: Any) -> None:
    dist.all_reduce(buffer, group=group)


def _all_to_all(buffer: torch.Tensor, group: Any) -> None:
    dist.all_to_all_single(torch.empty_like(buffer), buffer, group=group)


def _median_seconds(send: Callable[[], None], device: str, times: int) -> float:
    def timed() -> float:
        began = time.perf_counter()
        send()
        if device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    timed()  # makes the connections
    return statistics.median(timed() for _ in range(times))
