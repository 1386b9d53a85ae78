"""Whatever happens to a checkpoint, or while one is written: the last good one is found, or the message says what is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_recipe, write_recipe
from ranks import ROOT, environment, run
from states import read_saves, same_state

from rim_dist.checkpoint import retention, store
from rim_dist.checkpoint.index import index_checkpoint
from rim_dist.checkpoint.resume import agree_on_checkpoint
from rim_dist.checkpoint.snapshot import Snapshotter
from rim_dist.config import CheckpointSection
from rim_dist.data.synthetic import synthetic_tokenizer
from rim_dist.errors import CheckpointError
from rim_dist.files import ChecksumWriter, damage_of, os_errors
from rim_dist.parallel.launch import Process

ALONE = Process(0, 1, "cpu")
KILLS = int(os.environ.get("RIM_DIST_KILLS", "12"))  # 100 behind RIM_DIST_KILLS=100


def make(checkpoints: Path, step: int, stage: str = "stage2", **scores: float) -> Path:
    """A complete checkpoint of two files."""
    partial = store.start_writing(checkpoints, step)
    (partial / "engine").mkdir()
    writer = ChecksumWriter(partial / "engine" / "shard.pt")
    writer.write(bytes([step % 256]) * 5000)
    records = {"engine/shard.pt": writer.close()}
    state = store.TrainingState(stage, step, step, step, 0.0, 1)  # type: ignore[arg-type]
    final = store.announce(partial, state, "recipe: none\n", records)
    if scores:
        retention.note_scores(checkpoints, step, scores)
    return final


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[1234] ^= 1
    file.write_bytes(data)


def test_formats_of_checkpoints(tmp_path: Path) -> None:
    checkpoint = make(tmp_path, 3)
    path = checkpoint / "state.json"
    tree, state = json.loads(path.read_text()), store.read_state(checkpoint)
    assert tree.pop("format") == store.FORMAT
    path.write_text(json.dumps(tree))  # as it was written before checkpoints had a format
    assert store.read_state(checkpoint) == state
    path.write_text(json.dumps({**tree, "format": store.FORMAT + 1, "unheard_of": 1}))
    with pytest.raises(
        CheckpointError, match=f"format {store.FORMAT + 1} is of a newer rim_dist; .* up to format {store.FORMAT}"
    ):
        store.read_state(checkpoint)
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="not a training state"):
        store.read_state(checkpoint)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda c: truncate(c / "engine" / "shard.pt"), "engine/shard.pt has 100 bytes instead of 5000"),
        (lambda c: flip(c / "engine" / "shard.pt"), "engine/shard.pt has other contents than its manifest says"),
        (lambda c: (c / "engine" / "shard.pt").unlink(), "engine/shard.pt is missing"),
        (lambda c: (c / "state.json").unlink(), "state.json is missing"),
        (lambda c: (c / "manifest.json").unlink(), "it has no readable manifest.json"),
        (lambda c: truncate(c / "manifest.json"), "it has no readable manifest.json"),
        (lambda c: (c / "recipe.yaml").write_text("recipe: ours\n"), "recipe.yaml has other contents"),
    ],
)
def test_damaged_newest_is_passed_over_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: Callable[[Path], None], says: str
) -> None:
    good, newest = make(tmp_path, 3), make(tmp_path, 6)
    assert agree_on_checkpoint(tmp_path, ALONE) == newest
    harm(newest)
    assert agree_on_checkpoint(tmp_path, ALONE) == good
    error = capsys.readouterr().err
    assert f"{newest} is damaged and passed over: {says}" in error
    shutil.rmtree(good)
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is intact \(step-00000006\)"):
        agree_on_checkpoint(tmp_path, ALONE)


def test_nothing_there_is_a_fresh_start(tmp_path: Path) -> None:
    assert agree_on_checkpoint(tmp_path / "none", ALONE) is None
    (tmp_path / "step-00000003.partial").mkdir()
    assert agree_on_checkpoint(tmp_path, ALONE) is None


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(tmp_path: Path) -> None:
    make(tmp_path, 3)
    flip(make(tmp_path, 6) / "engine" / "shard.pt")
    assert store.read_state(agree_on_checkpoint(tmp_path, ALONE) or tmp_path).step == 3
    make(tmp_path, 6)
    assert store.read_state(agree_on_checkpoint(tmp_path, ALONE) or tmp_path).step == 6
    assert (tmp_path / "latest").read_text() == "step-00000006\n"
    assert not list(tmp_path.glob("*.partial"))


def kept(checkpoints: Path) -> list[int]:
    return [store.read_state(p).step for p in store.complete_checkpoints(checkpoints)]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ({"keep": 2}, [9, 10]),
        ({"keep": 1, "keep_every_steps": 4}, [4, 8, 10]),
        ({"keep": 1, "keep_stage_ends": True}, [5, 10]),
        ({"keep": 1, "keep_best": 1}, [3, 10]),
        ({"keep": 1, "keep_best": 2, "metric": "loss"}, [9, 10]),
    ],
)
def test_retention(tmp_path: Path, policy: dict, expected: list[int]) -> None:
    accuracy = {2: 0.3, 3: 0.9, 7: 0.5}
    for step in range(1, 11):
        scores = {"loss": 1.0 / step, **({"accuracy": accuracy[step]} if step in accuracy else {})}
        make(tmp_path, step, "stage1" if step <= 5 else "stage2", **scores)
        retention.retain(tmp_path, CheckpointSection(**policy))
    assert kept(tmp_path) == expected
    assert len(retention.read_scores(tmp_path)) <= len(expected) + 1  # a removed one's go with the next save


def test_checkpoint_moved_away_and_linked_back_is_one(tmp_path: Path) -> None:
    """Retention removes the link, and leaves what somebody has moved elsewhere."""
    checkpoints, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for step in (1, 2):
        make(checkpoints, step)
    (checkpoints / "step-00000001").rename(elsewhere)
    (checkpoints / "step-00000001").symlink_to(elsewhere)
    assert agree_on_checkpoint(checkpoints, ALONE) == checkpoints / "step-00000002"
    new = make(checkpoints, 3)
    retention.retain(checkpoints, CheckpointSection(keep=2), good={new})
    assert kept(checkpoints) == [2, 3]
    assert damage_of(elsewhere, checksums=True) == ""


def test_retention_keeps_the_only_good_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        make(tmp_path, step)
    flip(tmp_path / "step-00000003" / "engine" / "shard.pt")
    flip(tmp_path / "step-00000002" / "engine" / "shard.pt")
    assert retention.retain(tmp_path, CheckpointSection(keep=2)) == []
    assert kept(tmp_path) == [1, 2, 3]
    truncate(tmp_path / "step-00000003" / "engine" / "shard.pt")  # no longer counts
    assert retention.retain(tmp_path, CheckpointSection(keep=1)) == []
    new = make(tmp_path, 4)
    assert [p.name for p in retention.retain(tmp_path, CheckpointSection(keep=1), good={new})] == [
        "step-00000001",
        "step-00000002",
    ]


def test_choosing_names_what_there_is(tmp_path: Path) -> None:
    for step in (3, 6):
        make(tmp_path, step, "stage1" if step == 3 else "stage2")
    assert retention.choose(tmp_path, None, 3, False).name == "step-00000003"
    assert retention.choose(tmp_path, 1, None, False).name == "step-00000003"
    assert retention.choose(tmp_path, None, None, False).name == "step-00000006"
    with pytest.raises(CheckpointError, match="no complete checkpoint of step 4; there are step-00000003, step-00000006"):
        retention.choose(tmp_path, None, 4, False)


def loop(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    worker = str(ROOT / "tests" / "workers" / "save_loop.py")
    return subprocess.run(
        [sys.executable, worker, *arguments], env=environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


@pytest.mark.timeout(600)
def test_kills_at_random_moments(tmp_path: Path) -> None:
    """Savers of one and two ranks, in front and in the background, killed; each time the newest one is intact and not older
    than what was announced. RIM_DIST_KILLS=100 for the long version."""
    result = loop("kill", str(tmp_path), str(KILLS), str(os.getpid()))
    assert result.returncode == 0, result.stderr[-3000:]
    outcome = json.loads(result.stdout.splitlines()[-1])
    print(outcome)
    assert outcome["kills"] == KILLS
    assert outcome["moments"].get("in a save", 0) > 0


def _can_mount() -> bool:
    return subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.timeout(300)
@pytest.mark.skipif(not shutil.which("unshare") or not _can_mount(), reason="a small file system needs root")
def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    """On a file system of 100 MiB: refused before writing, with what is missing; and when the disk itself says no."""
    worker = ROOT / "tests" / "workers" / "save_loop.py"
    script = f"mount -t tmpfs -o size=100m tmpfs {tmp_path} && exec {sys.executable} {worker} full {tmp_path}/run"
    command = ["unshare", "-m", "bash", "-c", script]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    refused, full = json.loads(result.stdout.splitlines()[-1])
    assert "cannot be written (not enough space; it takes 31.5 MiB," in refused
    assert "MiB are missing); step-0000000" in refused
    assert "is kept; put that right and start the same command again" in refused
    assert "No space left on device" in full
    assert "is kept" in full


def test_what_a_tokenizer_cannot_write_is_an_error_of_the_disk(tmp_path: Path) -> None:
    """Its Rust writer raises a plain Exception; on the first rank alone that would leave the others waiting."""
    backend = synthetic_tokenizer().backend_tokenizer
    with pytest.raises(OSError, match="No such file or directory"), os_errors(tmp_path):
        backend.save(str(tmp_path / "none" / "tokenizer.json"))
    with pytest.raises(ValueError, match="a bug"), os_errors(tmp_path):
        raise ValueError("a bug")


def test_a_snapshot_is_of_its_moment() -> None:
    """Tensors, views of one storage, lists, and objects that go on changing (fp16's loss scaler)."""
    scaler = SimpleNamespace(cur_scale=2.0**16)
    weights = torch.arange(6.0)
    tree = {"weights": weights, "view": weights[2:4], "loss_scaler": scaler, "groups": [{"lr": 0.1}], "shape": weights.shape}
    (copy,) = Snapshotter().copy({"shard": tree}).values()
    weights.fill_(-1.0)
    scaler.cur_scale = 1.0
    tree["groups"][0]["lr"] = 0.2
    assert copy["weights"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copy["view"].tolist() == [2, 3]
    assert copy["view"].untyped_storage().data_ptr() == copy["weights"].untyped_storage().data_ptr()
    assert (copy["loss_scaler"].cur_scale, copy["groups"], copy["shape"]) == (2.0**16, [{"lr": 0.1}], (6,))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("zero", [1, 3])
def test_background_saves_change_nothing(tmp_path: Path, zero: int) -> None:
    """Two ranks, a save after every step: each checkpoint holds, bit for bit, what the one written in front does."""
    for name in ("front", "background"):
        recipe = tiny_recipe(
            tmp_path,
            run={"name": name},
            parallel={"zero_stage": zero},
            checkpoint={"every_steps": 1, "keep": 20, "background": name == "background"},
            evaluation={"at_end": False},
        )
        write_recipe(tmp_path / f"{name}.yaml", recipe)
    paths = [str(tmp_path / f"{name}.yaml") for name in ("front", "background")]
    run("fork", 2, ["tests/workers/train_many.py", *paths])
    folders = [tmp_path / name / "checkpoints" for name in ("front", "background")]
    assert [read_saves(f)[0]["background"] for f in folders] == [False, True]
    assert [[line["step"] for line in read_saves(f)] for f in folders] == [list(range(1, 9))] * 2
    for front, background in zip(*map(store.complete_checkpoints, folders), strict=True):
        assert not damage_of(background, checksums=True)
        assert store.read_state(front) == store.read_state(background)
        same_state(index_checkpoint(front), index_checkpoint(background))


@pytest.mark.timeout(300)
def test_background_write_that_fails_ends_all_ranks(tmp_path: Path) -> None:
    """One of two ranks may write only small files: both end with its message, a restart goes on."""
    recipe = tiny_recipe(tmp_path, checkpoint={"every_steps": 3, "background": True}, evaluation={"at_end": False})
    path = write_recipe(tmp_path / "r.yaml", recipe)
    result = run("fork", 2, ["tests/workers/small_files.py", str(path)], check=False, RIM_TEST_RANK="1")
    assert result.returncode
    assert len(re.findall(r"cannot be written \(File too large: \S+_states\.pt on rank 1;", result.stdout)) == 2
    assert "Traceback" not in result.stdout
    assert not store.all_checkpoints(tmp_path / "tiny" / "checkpoints")
    run("fork", 2, ["-m", "rim_dist", "train", str(path)])
    assert store.read_state(store.find_checkpoint(tmp_path / "tiny")).finished
