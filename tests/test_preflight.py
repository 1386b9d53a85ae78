"""Checks before a run: what ranks must agree on, room, links and their time-out, a split tiny model, a batch without weight."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from conftest import TINY_MODEL, partitioned, tiny_recipe, write_recipe
from families import FAMILIES
from forked import Job, start_forked
from ranks import environment, run

from rim_dist.data.prepared import PreparedData
from rim_dist.errors import ModelError, TrainingError
from rim_dist.metrics import read_metrics
from rim_dist.parallel import liveness
from rim_dist.parallel.launch import Process
from rim_dist.parallel.mesh import Degrees, make_mesh
from rim_dist.parallel.zero import compose
from rim_dist.recipe import load_recipe, validate_recipe
from rim_dist.training import parity
from rim_dist.training.preflight import Preflight, first_difference, versions
from rim_dist.training.trainer import prepare_run

Make = Callable[..., Path]


def test_first_difference_names_the_field_and_the_ranks() -> None:
    def name(ranks: list[int]) -> str:
        return f"ranks {ranks}"

    same = {"versions": {"torch": "2.13.0"}, "optimizer": {"betas": [0.9, 0.95]}, "empty": {}}
    assert first_difference([same, dict(same)], name) == ""
    assert first_difference([same], name) == ""
    other = {**same, "versions": {"torch": "2.12.1"}, "optimizer": {"betas": [0.9, 0.99]}}
    found = first_difference([same, same, other, same, other], name)
    assert found == "versions.torch is not the same on every rank: '2.12.1' on ranks [2, 4], '2.13.0' on the others"
    found = first_difference([{**same, "x": 1}, same, same], name)
    assert found == "x is not the same on every rank: 1 on ranks [0], None on the others"
    assert first_difference([same, {**same, "empty": {"y": "z" * 99}}], name).startswith("empty is not the same on every rank")


def test_versions_are_those_that_run() -> None:
    assert versions()["torch"] == torch.__version__
    assert {"rim_dist", "python", "deepspeed", "transformers", "peft"} <= versions().keys()


def test_data_of_one_name_and_other_content_is_told_apart(recipe_file: Make, tmp_path: Path) -> None:
    recipe = load_recipe(recipe_file(data={"cache_dir": str(tmp_path / "a")}))
    _, data = prepare_run(recipe)
    assert isinstance(data, PreparedData)
    (folder,) = (p for p in (tmp_path / "a").iterdir() if p.is_dir())
    copy = tmp_path / "b" / folder.name
    shutil.copytree(folder, copy)
    assert PreparedData(copy, 0).fingerprint == data.fingerprint
    tokens = numpy.load(copy / "tokens.npy")
    tokens[0] += 1
    numpy.save(copy / "tokens.npy", tokens)
    assert PreparedData(copy, 0).fingerprint != data.fingerprint


def test_room_for_a_checkpoint(recipe_file: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least a checkpoint takes is below what one takes, and refused where even that is not there."""
    recipe = load_recipe(recipe_file())
    requirements, data = prepare_run(recipe)
    run("fork", 1, ["-m", "rim_dist", "train", str(recipe_file()), "run.name=other", "--until", "stage1"])
    (checkpoint,) = (tmp_path / "runs" / "other" / "checkpoints").glob("step-00000004")
    taken = sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file())

    def check(free: int) -> dict[str, Any]:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
        preflight = Preflight(recipe, Process(0, 1, "cpu"))
        preflight.compare(requirements, data.fingerprint, compose(recipe, 32))
        return preflight.report

    (host,) = check(taken)["hosts"].values()
    assert (host["ranks"], host["disk_free_bytes"]) == ([0], taken)
    assert 0 < host["memory_free_bytes"] < 2**50
    with pytest.raises(TrainingError, match=r"tiny: a checkpoint takes at least 0.0 GiB for the 1 rank\(s\) on .*; make room"):
        check(taken // 10)


def test_two_ranks_on_one_device_are_refused(recipe_file: Make) -> None:
    recipe = load_recipe(recipe_file())

    def facts(identity: str) -> dict[str, Any]:
        device = {"name": "H100", "identity": identity, "memory_bytes": 80, "free_bytes": 79}
        return {"device": device, "memory_free_bytes": 1, "disk_free_bytes": 1}

    def note(hosts: list[str], identities: list[str]) -> tuple[str, dict[str, Any]]:
        preflight = Preflight(recipe, Process(0, len(hosts), "cpu", SimpleNamespace(hosts=hosts)))  # type: ignore[arg-type]
        return preflight._note_hosts([facts(identity) for identity in identities]), preflight.report

    refusal, _ = note(["a", "a"], ["x", "x"])
    assert refusal == "ranks 0 and 1 have the same H100 of a; start one rank for each device"
    refusal, report = note(["a", "a", "b"], ["x", "y", "x"])
    assert refusal == ""
    assert {host: entry["ranks"] for host, entry in report["hosts"].items()} == {"a": [0, 1], "b": [2]}
    assert note(["a", "a"], ["", ""])[0] == ""  # ranks share a CPU


# ---- with ranks, without deepspeed ---------------------------------------------------------------------------


def _join(store: Any, rank: int, ranks: int) -> liveness.LivenessMonitor:
    torch.set_num_threads(1)
    liveness._HANG_SECONDS = 3.0
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    return liveness.LivenessMonitor(store.clone(), rank, ranks, holds_store=rank == 0, seconds=60)


def _try_links(store: Any, rank: int, ranks: int, folder: str, absent: bool) -> None:
    monitor = _join(store, rank, ranks)
    seconds = 2 if absent else 60
    recipe = validate_recipe(tiny_recipe(Path(folder), parallel={"preflight_seconds": seconds}), "")
    preflight = Preflight(recipe, Process(rank, ranks, "cpu", monitor))
    mesh = make_mesh(Degrees(tensor=2, sequence=2), rank, "cpu")
    if absent and rank == 3:
        time.sleep(60)
    try:
        preflight.try_links(mesh)
    except RuntimeError:  # its peer in the group has ended
        failure = monitor.find_failure()
        assert failure is not None
        print(monitor.error_for(failure), file=sys.stderr, flush=True)
        monitor.claim_exit()
        monitor.leave()
        os._exit(failure.status)
    links = preflight.report["links"]
    assert {kind: link["ranks"] for kind, link in links.items()} == {"tensor": 2, "sequence": 2, "shards": 2, "world": 4}
    for link in links.values():
        for name in ("all_reduce", "all_to_all"):
            assert 0 < link[name]["seconds"] < 60
            assert 1e3 < link[name]["bytes_per_second"] < 1e12
    monitor.leave()


def test_links_of_every_kind_of_group_are_timed(tmp_path: Path) -> None:
    job = Job(_try_links, 4, tmp_path, str(tmp_path), False)
    assert job.statuses == [0] * 4, job.said
    assert [line.split(":")[1] for line in job.said[0].splitlines()] == [
        " tensor (2 ranks)",
        " sequence (2 ranks)",
        " shards (2 ranks)",
        " world (4 ranks)",
    ]
    assert not any(job.said[1:])


def test_rank_that_does_not_come_to_a_link_is_named(tmp_path: Path) -> None:
    """Also by ranks that wait in a later check for a rank of its tensor group, which waits for it."""
    job = Job(_try_links, 4, tmp_path, str(tmp_path), True)
    assert job.statuses[:3] == [75] * 3, job.said
    for rank in range(3):
        assert f"rank {rank}: lost a peer: rank 3 (host n3) did not come to it: the all-reduce of the" in job.said[rank]


PARITY_FAMILIES = ("Llama", "Llama, tied head", "Qwen3", "Gemma 2", "Granite", "GPT-2")


def _check_parity(store: Any, rank: int, ranks: int, broken: bool) -> None:
    _join(store, rank, ranks)
    if broken:  # as if a plan forgot that ranks see a part of these gradients each
        parity.sum_shared_gradients = lambda _: None
        mesh = make_mesh(Degrees(tensor=2, data=2), rank, "cpu")
        with pytest.raises(ModelError, match=r"a tiny model of it split over .* differs from the same model"):
            parity.check_parity(FAMILIES["Qwen3"], mesh, "ulysses", "split", "cpu")
        return
    for degrees in (Degrees(tensor=4), Degrees(tensor=2, sequence=2), Degrees(sequence=4), Degrees(sequence=2, data=2)):
        mesh = make_mesh(degrees, rank, "cpu")
        for family in PARITY_FAMILIES:
            if family == "GPT-2" and degrees.tensor > 1:
                continue  # transformers has no tensor plan for it
            for mode in ("ulysses", "allgather_kv") if degrees.sequence > 1 else ("ulysses",):
                found = parity.check_parity(FAMILIES[family], mesh, mode, "dense", "cpu")
                assert max(found.loss, found.gradient) < 1e-5, (family, degrees, mode, found)


@pytest.mark.parametrize("broken", [False, True], ids=["right", "wrong"])
def test_parity_check(broken: bool, tmp_path: Path) -> None:
    """Split over the mesh a tiny model of every family computes what it does whole; a wrong split is refused on all ranks."""
    job = Job(_check_parity, 4, tmp_path, broken)
    assert job.statuses == [0] * 4, job.said


# ---- whole runs ----------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_ranks_of_different_recipes_are_refused(recipe_file: Make, tmp_path: Path) -> None:
    """Before any group is made: with another tensor degree the ranks would wait for each other without end."""
    path, outputs = recipe_file(), [tmp_path / f"rank-{rank}" for rank in range(2)]
    targets = [["-m", "rim_dist", "train", str(path), f"parallel.tensor={rank + 1}"] for rank in range(2)]
    processes = start_forked(targets, environment(), [str(output) for output in outputs])
    for process in processes:
        process.join(200)
        process.kill()
    said, host = [output.read_text() for output in outputs], os.uname().nodename
    for text in said:
        assert f"rim-dist: parallel.tensor is not the same on every rank: 2 on rank 1 (host {host}), 1 on the others" in text, (
            said
        )
    assert [process.exitcode for process in processes] == [1, 1]
    assert not (tmp_path / "runs" / "tiny" / "recipe.yaml").exists()


CASES: dict[str, dict[str, Any]] = {
    "zero0": {"parallel": {"zero_stage": 0}},
    "zero1": {"parallel": {"zero_stage": 1}},
    "zero2": {"parallel": {"zero_stage": 2}},
    "zero3": {"parallel": {"zero_stage": 3, "deepspeed_config": "zero3.json"}},
    "zero2-bf16": {"parallel": {"zero_stage": 2}, "model": {"dtype": "bf16"}},
    "zero3-tensor2": {"parallel": {"zero_stage": 3, "tensor": 2, "deepspeed_config": "zero3.json"}},
    "zero1-sequence2": {"parallel": {"zero_stage": 1, "sequence": 2}},
}
QUICK = ["zero2-bf16", "zero3-tensor2", "zero1-sequence2"]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("names", [QUICK, pytest.param([n for n in CASES if n not in QUICK], marks=pytest.mark.thorough)])
def test_the_batch_without_weight_changes_no_bit(names: list[str], tmp_path: Path) -> None:
    """Two ranks, accumulation, dropout: losses, norms and weights of runs with the preflight and without are the same."""
    partitioned(tmp_path)
    paths = []
    for name in names:
        sections = CASES[name]
        parallel = dict(sections["parallel"])
        if "deepspeed_config" in parallel:
            parallel["deepspeed_config"] = str(tmp_path / "zero3.json")
        for preflight in (True, False):
            recipe = tiny_recipe(
                tmp_path,
                run={"name": f"{name}-{preflight}"},
                model={"config": {**TINY_MODEL, "num_key_value_heads": 4}, **sections.get("model", {})},
                memory={"inside_block": "bidirectional"},  # nothing to export
                data={"cache_dir": str(tmp_path / "data")},
                curriculum={
                    "stage1": {"samples": 48, "learning_rate": 1e-3, "max_steps": 4, "attention_dropout": 0.1},
                    "stage2": {"samples": 16, "learning_rate": 1e-3, "attention_dropout": 0.1},
                },
                optimizer={"micro_batch_tokens": 110},
                parallel={**parallel, "preflight": preflight},
                checkpoint={"every_steps": 0},
                evaluation={"at_end": False},
            )
            paths.append(str(write_recipe(tmp_path / f"{len(paths)}.yaml", recipe)))
    run("fork", 2, ["tests/workers/train_many.py", *paths], timeout=500)
    for name in names:
        with_it, without = (tmp_path / f"{name}-{preflight}" for preflight in (True, False))
        steps = [
            [(line["loss"], line["grad_norm"]) for line in read_metrics(folder / "metrics.jsonl")]
            for folder in (with_it, without)
        ]
        assert len(steps[0]) == 4
        assert steps[0] == steps[1], name
        states = [_shards(folder) for folder in (with_it, without)]
        assert states[0].keys() == states[1].keys()
        for key, value in states[0].items():
            assert torch.equal(value, states[1][key]), (name, key)
        report = json.loads((with_it / "preflight.json").read_text())
        assert report["dry_batch"]["tokens"] > 0
        assert 1 < report["dry_batch"]["loss"] < 10
        assert ("rehearsal" in report) == ("tensor" in name or "sequence" in name)
        assert not (without / "preflight.json").exists()
        print(f"{name}: preflight took {report['seconds']:.2f} s")


def _shards(run_folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's last checkpoint by file and place."""
    (engine,) = (run_folder / "checkpoints").glob("step-00000004/engine")
    found: dict[str, torch.Tensor] = {}

    def collect(tree: Any, where: str) -> None:
        if torch.is_tensor(tree):
            found[where] = tree
        elif isinstance(tree, dict):
            for key, value in tree.items():
                collect(value, f"{where}.{key}")
        elif isinstance(tree, list | tuple):
            for key, value in enumerate(tree):
                collect(value, f"{where}.{key}")

    for file in engine.iterdir():
        collect(torch.load(file, weights_only=False), file.name)
    assert found
    return found
