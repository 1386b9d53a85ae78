"""benchmarks/gpu.py without a GPU: a smoke run of its sections, and that nothing that fails passes for a result."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import ROOT, run

sys.path.insert(0, str(ROOT / "benchmarks"))

import common
import gpu
import gpu_context
from gpu_context import Context

from rim_dist.attention.kernels import kernel_names

FAMILIES = ("llama d64", "qwen3 d128", "gemma2 d64")


@pytest.fixture
def cx(tmp_path: Path) -> Context:
    return Context(torch.device("cpu"), smoke=True, budget=60, path=tmp_path / "gpu.json")


def smoke_run(folder: Path, letters: str) -> dict[str, Any]:
    run("fork", 1, ["benchmarks/gpu.py", "--cpu-smoke", "--sections", letters], timeout=300, OUT=str(folder))
    result = json.loads((folder / "gpu.json").read_text())
    assert all("error" not in entry for entry in result["sections"].values())
    assert not any(row.startswith("c") for row in result["table"])
    return result["sections"]


@pytest.mark.thorough
def test_smoke_run_of_the_oracle(tmp_path: Path) -> None:
    sections = smoke_run(tmp_path, "b")
    assert list(sections) == ["b oracle"]
    oracle = sections["b oracle"]
    compared = {key for key, value in oracle.items() if isinstance(value, dict)}
    dtypes, kernels = ("float32", "bfloat16"), kernel_names()
    assert compared == {f"{family} {dtype} {kernel}" for family in FAMILIES for dtype in dtypes for kernel in kernels}
    assert all(oracle[key]["ok"] is True for key in compared)
    for dtype, largest in (("float32", 0.0), ("bfloat16", 0.1)):
        assert all(oracle[f"{family} {dtype} unrolled"][1] <= largest for family in FAMILIES)


def test_smoke_run(tmp_path: Path) -> None:
    sections = smoke_run(tmp_path, "ade")
    assert list(sections) == ["a versions", "e first token", "d long memory"]
    assert all(sections["d long memory"][shape]["seconds"] > 0 for shape in ("135M", "1B"))
    assert all(sections["e first token"][shape]["cot 37 + 1"] > 0 for shape in ("135M", "1B"))


def fails(_cx: Context, _entry: dict[str, Any]) -> None:
    raise ValueError("no kernel image\nfor this card")


def hangs(_cx: Context, _entry: dict[str, Any]) -> None:
    time.sleep(20)


def wrong(_cx: Context, entry: dict[str, Any]) -> None:
    entry["llama dense"] = {"ok": False}


def partly(cx: Context, entry: dict[str, Any]) -> None:
    with cx.attempt(entry, "flex", "c  flex"):
        raise MemoryError
    entry["split"] = {"seconds": 1.0}


def works(_cx: Context, entry: dict[str, Any]) -> None:
    entry["llama dense"] = {"ok": True}


@pytest.mark.parametrize(
    ("run", "status", "failed"),
    [
        (works, 0, None),
        (fails, 1, "a first"),
        (hangs, 1, "a first"),
        (wrong, 1, "a first: llama dense"),
        (partly, 1, "a first: flex"),
    ],
)
def test_exit_status(
    run: Callable[[Context, dict[str, Any]], None],
    status: int,
    failed: str | None,
    cx: Context,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A section that fails leaves its error and makes the status 1; the one after it still runs, or is told to lack time."""
    order = [gpu.Section("a", "a first", run, (0.2, 0.2)), gpu.Section("b", "b next", works, (5, 5))]
    monkeypatch.setattr(gpu, "prepare_environment", lambda _smoke: None)
    monkeypatch.setattr(gpu, "sections_in_order", lambda _runs: order)
    monkeypatch.setattr(gpu_context, "open_context", lambda *_arguments: cx)
    assert gpu.main(["--cpu-smoke", "--sections", "ab"]) == status
    assert ("failed: " + failed if failed else "nothing failed") == capsys.readouterr().out.splitlines()[-1]
    sections = json.loads(cx.path.read_text())["sections"]
    assert sections["b next"]["llama dense"] == {"ok": True}
    if run is fails:
        assert sections["a first"]["error"] == "ValueError: no kernel image\nfor this card"
        assert "in fails" in sections["a first"]["trace"]
    if run is hangs:
        assert sections["a first"]["error"] == "stopped after 0 s"
        assert sections["a first"]["seconds"] < 10


def test_sections_without_time_are_failures(cx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "sections_in_order", lambda _runs: [gpu.Section("c", "c steps", works, (5, 5), least=61)])
    gpu.run_sections(cx, {"c"})
    assert cx.result["sections"]["c steps"]["error"].startswith("left out")
    assert gpu.failures(cx.result) == ["c steps"]


def test_alarm_leaves_the_one_around_it() -> None:
    rang = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(time.perf_counter()))
    outer = signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(gpu_context.OutOfTime), gpu_context.alarm(0.1):
            time.sleep(20)
        assert not rang
        time.sleep(1)
        assert len(rang) == 1
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *outer)


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "prepare_environment", lambda _smoke: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no GPU here" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--cpu-smoke", "--publish"], ["--sections", "ag"]])
def test_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu.main(arguments)
    assert ended.value.code == 2


def test_publish(cx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    published: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(common, "publish", lambda *a, **k: published.append((a, k)))
    cx.row("d  135M: 0.1 s")
    cx.save()
    gpu.publish_result(cx)
    ((name, title, text, figures), how) = published[0]
    assert (name, title, how) == ("gpu-nvidia-h100-80gb-hbm3", "One GPU: NVIDIA H100 80GB HBM3", {"quick": False})
    assert "\nd  135M: 0.1 s\n" in text
    assert figures["table"] == cx.rows
