"""A disk that is slow, or that fails for one file: one message, and the next start ends with the bits of an undisturbed run.

The faults come from a library preloaded into real processes (workers/faulty_disk.c), between them and the kernel.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_recipe, write_recipe
from ranks import ROOT, environment, free_port, run

from rim_dist.metrics import read_metrics

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("disk") / "faulty_disk.so"
    source = str(Path(__file__).parent / "workers" / "faulty_disk.c")
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", str(library), source, "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    run("fork", 1, ["-m", "rim_dist", "train", str(recipe(folder))])
    return folder / "run"


def recipe(folder: Path, **sections: object) -> Path:
    return write_recipe(folder / "r.yaml", tiny_recipe(folder, run={"name": "run"}, **sections))


def start(path: Path, *options: str, ranks: int = 1, **variables: str) -> list[tuple[int, str]]:
    """Status and output of each rank of a start."""
    head = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if ranks > 1 else {}
    command = [sys.executable, "-m", "rim_dist", "train", str(path), *options]
    processes = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment(**head, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}), **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    return [(process.returncode, text) for process in processes for text in [process.communicate(timeout=200)[0]]]


def ends_like(folder: Path, undisturbed: Path) -> None:
    assert (folder / "hf" / "model.safetensors").read_bytes() == (undisturbed / "hf" / "model.safetensors").read_bytes()
    steps = [line["step"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize(
    ("file", "number"),
    [
        ("metrics.jsonl", errno.EIO),
        pytest.param("metrics.jsonl", errno.ESTALE, marks=pytest.mark.thorough),
        pytest.param("saves.jsonl", errno.EIO, marks=pytest.mark.thorough),
        pytest.param("engine/", errno.EIO, marks=pytest.mark.thorough),
        pytest.param("inputs.json", errno.ENOSPC, marks=pytest.mark.thorough),
        pytest.param("owner.json", errno.ESTALE, marks=pytest.mark.thorough),
        pytest.param("plan.json", errno.EROFS, marks=pytest.mark.thorough),
        pytest.param("hf.partial/", errno.EIO, marks=pytest.mark.thorough),
        pytest.param("report/", errno.EIO, marks=pytest.mark.thorough),
        pytest.param("data/", errno.ENOSPC, marks=pytest.mark.thorough),
    ],
)
def test_file_that_cannot_be_written_is_named(file: str, number: int, disk: Path, undisturbed: Path, tmp_path: Path) -> None:
    """In the middle of a run whose stage 1 is done; where the run does not come to the file, in a new one."""
    path = recipe(tmp_path)
    if file != "data/":
        assert start(path, "--until", "stage1")[0][0] == 0
    faults = {"LD_PRELOAD": str(disk), "FAULT_CALL": "write", "FAULT_PATH": file, "FAULT_ERRNO": str(number)}
    [(status, said)] = start(path, **faults)
    assert status in (1, 2), said
    message = said[said.index("rim-dist: ") :]
    assert os.strerror(number) in message
    assert file.rstrip("/").removesuffix(".partial") in message
    assert "Traceback" not in said
    assert len(message.splitlines()) <= 3, message
    assert start(path)[0][0] == 0
    ends_like(tmp_path / "run", undisturbed)
