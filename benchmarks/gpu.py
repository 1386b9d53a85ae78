"""A check of the trainer on one NVIDIA GPU: does every path compute the same there, and how fast is it?

    python benchmarks/gpu.py [--sections abcdef] [--budget 475] [--publish]
    python benchmarks/gpu.py --cpu-smoke

One prepared run of less than eight minutes on an H100. Sections, each with a time limit of its own:

- a: versions, the order of SDPA's kernels, the two ceilings (copy, bf16 matrix product);
- b: the dense, split and flex paths against unrolled runs, fp32 (TF32 off) and bf16, loss and gradients; recompilations;
- c: step time of a 135M, a 1B and an 8B shape by flex, split and padded rows: MFU, memory, kernels, gaps between them;
- d: K = 64, M = 1024 (65k memory tokens) by flex;
- e: time to the first token: question and blocks, a plain prompt, a chain of thought;
- f: the command line under ZeRO-0, 2 and 3 in bf16 and fp16 against fp32, started beside b.

The result is `gpu.json` in the folder that OUT names, or here; it is written again after every section. `--publish` also leaves
it in `results/`. Exit status: 0; 1 if anything failed, differs from the unrolled runs, or was left out for lack of time; 2
without a GPU. cut-cross-entropy is measured where it is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

if TYPE_CHECKING:  # it imports torch: see `prepare_environment`
    from gpu_context import Context

ROOT = Path(__file__).parents[1]
FINISH_SECONDS = 60.0


class Section(NamedTuple):
    """A part of the check. `seconds`: its limit on a GPU and in a smoke run. `least`: it starts only with more seconds left."""

    letter: str
    name: str
    run: Callable[[Context, dict[str, Any]], None]
    seconds: tuple[float, float]
    least: float | None = None


def prepare_environment(smoke: bool) -> None:
    """Variables that torch, transformers and deepspeed read while they are imported, so before that; runs of f inherit them."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    if smoke:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    warnings.simplefilter("ignore")


def sections_in_order(runs: CommandLine) -> list[Section]:
    import gpu_sections

    return [
        Section("a", "a versions", gpu_sections.versions, (30, 30)),
        Section("f", "f start", runs.start, (20, 600)),
        Section("b", "b oracle", gpu_sections.oracle, (110, 400)),
        Section("f", "f CLI", runs.finish, (FINISH_SECONDS, FINISH_SECONDS)),
        Section("c", "c steps", gpu_sections.steps, (220, 400), least=30),
        Section("e", "e first token", gpu_sections.first_token, (40, 200), least=15),
        Section("d", "d long memory", gpu_sections.long_memory, (60, 200), least=20),
    ]


def run_sections(cx: Context, wanted: set[str]) -> None:
    runs = CommandLine(cx.smoke)
    try:
        for section in sections_in_order(runs):
            if section.letter not in wanted:
                continue
            if section.least is not None and cx.left() <= section.least:
                cx.leave_out(section.name)
                continue
            with cx.guard(section.name, section.seconds[cx.smoke]) as entry:
                section.run(cx, entry)
    finally:
        runs.stop()


def failures(result: dict[str, Any]) -> list[str]:
    """What failed, wherever it stands in the result: an error, or a comparison with the unrolled runs that is not ok."""
    found = []

    def look(place: str, value: Any) -> None:
        if isinstance(value, dict):
            if "error" in value or not value.get("ok", True):
                found.append(place)
            for key, inner in value.items():
                look(f"{place}: {key}", inner)

    for name, entry in result["sections"].items():
        look(name, entry)
    return found


def publish_result(cx: Context) -> None:
    import torch
    from common import publish

    card = torch.cuda.get_device_name(cx.device)
    slug = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    figures = json.loads(json.dumps(cx.result, default=str))
    publish(f"gpu-{slug}", f"One GPU: {card}", "```\n" + "\n".join(cx.rows) + "\n```\n", figures, quick=False)


# ---- f ------------------------------------------------------------------------------------------------------------


class CommandLine:
    """Trainings by the real command, beside each other on the one GPU; in a smoke run one after the other."""

    def __init__(self, smoke: bool) -> None:
        self._smoke = smoke
        self._folder: Path | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._runs: dict[str, tuple[int, str, str | None]] = {"zero2 fp32": (2, "fp32", None), "zero2 bf16": (2, "bf16", None)}
        if not smoke:
            self._runs |= {
                "zero0 bf16": (0, "bf16", None),
                "zero3 bf16": (3, "bf16", None),
                "zero2 fp16": (2, "fp16", None),
                "zero2 bf16 split": (2, "bf16", "model.attention=split"),
                "zero2 bf16 recompute": (2, "bf16", "model.activation_checkpointing=true"),
            }

    def _recipe(self) -> dict[str, Any]:
        """The demo from scratch, a few steps of each stage."""
        demo, base = (yaml.safe_load((ROOT / "recipes" / name).read_text()) for name in ("demo.yaml", "demo-base.yaml"))
        stage1, stage2 = (3, 2) if self._smoke else (30, 12)
        hidden, inner = (64, 160) if self._smoke else (256, 704)
        batch = demo["optimizer"]["global_batch"]
        demo["model"] = base["model"]
        demo["model"]["config"].update(hidden_size=hidden, intermediate_size=inner, num_key_value_heads=2)
        demo["data"]["synthetic"]["samples"] = 4096
        demo["curriculum"]["stage1"].update(samples=stage1 * batch)
        demo["curriculum"]["stage2"].update(samples=stage2 * batch)
        demo["optimizer"].update(micro_batch_tokens=1024)
        demo["evaluation"].update(samples=16 if self._smoke else 64, every_steps=0)
        demo["checkpoint"] = {"every_steps": 0}
        demo["logging"] = {"every_steps": 10}
        return demo

    def start(self, _cx: Context, _entry: dict[str, Any]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="rim_gpu_"))
        recipe = self._folder / "demo.yaml"
        recipe.write_text(yaml.safe_dump(self._recipe()))
        path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            environment.pop(name, None)
        for name, (zero, dtype, more) in self._runs.items():
            tag = name.replace(" ", "-")
            settings = [
                f"run.name={tag}",
                f"run.output_dir={self._folder}",
                f"parallel.zero_stage={zero}",
                f"model.dtype={dtype}",
            ]
            command = [sys.executable, "-m", "rim_dist", "train", str(recipe), *settings, *([more] if more else [])]
            with (self._folder / f"{tag}.log").open("wb") as log:
                process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
            self._processes[name] = process
            if self._smoke:
                process.wait(timeout=240)

    def finish(self, cx: Context, entry: dict[str, Any]) -> None:
        """Wait for the runs, so long that what is late can still be told, and compare their losses with those in fp32."""
        deadline = time.perf_counter() + max(0.0, min(FINISH_SECONDS, cx.left()) - 3)
        for name, process in self._processes.items():
            try:
                process.wait(timeout=max(0.0, deadline - time.perf_counter()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            entry[name] = self._outcome(name, process.returncode)
        truth = entry.get("zero2 fp32", {}).get("losses", [])
        for name in self._processes:
            run = entry[name]
            losses = run["losses"]
            gap = max((abs(a - b) for a, b in zip(losses, truth, strict=False)), default=None)
            run["largest_loss_difference_from_fp32"] = gap
            cx.row(self._row(name, run, gap))

    def _row(self, name: str, run: dict[str, Any], gap: float | None) -> str:
        losses = run["losses"]
        text = f"f  {name:22s} rc {run['rc']} steps {run['steps']:3d}"
        if losses:
            text += f" loss {losses[0]:.3f} -> {losses[-1]:.3f}, {run['step_ms']:.0f} ms/step"
        if gap is not None:
            text += f", off fp32 by {gap:.3f}"
        if "error" in run:
            last = run["log_tail"].strip().splitlines()[-1:]
            text += f"  FAILED: {run['error']}; LOG: {''.join(last)[:120]}"
        return text

    def _outcome(self, name: str, status: int) -> dict[str, Any]:
        assert self._folder is not None
        tag = name.replace(" ", "-")
        log = (self._folder / f"{tag}.log").read_text(errors="replace")
        metrics = self._folder / tag / "metrics.jsonl"
        written = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
        lines = [json.loads(line) for line in written if line.endswith("\n")]  # a run that was ended leaves half of one
        train = [line for line in lines if line["kind"] == "train"]
        late = [line["seconds"] for line in train[len(train) // 2 :]]
        outcome = {
            "rc": status,
            "steps": len(train),
            "losses": [line["loss"] for line in train],
            "norms": [line["grad_norm"] for line in train],
            "step_ms": 1e3 * statistics.median(late) if late else None,
            "memory": train[-1].get("memory_bytes") if train else None,
            "mfu": train[-1].get("mfu") if train else None,
            "path": next((line for line in log.splitlines() if "attention" in line), "")[-160:],
            "log_tail": log[-1500:] if status else log[-200:],
        }
        if status or not train:
            outcome["error"] = f"exit status {status}, {len(train)} steps"
        return outcome

    def stop(self) -> None:
        """End what still runs, and delete the runs."""
        for process in self._processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", default="abcdef", help="letters of the sections to run (all)")
    parser.add_argument(
        "--budget", type=float, default=475, help="seconds in all; sections that would not fit are left out (475)"
    )
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny sizes on the CPU: tests the check itself")
    parser.add_argument("--publish", action="store_true", help="leave the result in benchmarks/results/ as well")
    options = parser.parse_args(arguments)
    wanted = set(options.sections)
    if not wanted <= set("abcdef"):
        parser.error(f"--sections {options.sections}: letters of abcdef")
    if options.publish and options.cpu_smoke:
        parser.error("--publish: the figures of a smoke run say nothing of a GPU")
    prepare_environment(options.cpu_smoke)
    import torch
    from common import machine
    from gpu_context import open_context

    if not options.cpu_smoke and not torch.cuda.is_available():
        print("no GPU here: --cpu-smoke tests the check itself")
        return 2
    cx = open_context(options.cpu_smoke, options.budget, Path(os.environ.get("OUT", ".")) / "gpu.json", began)
    cx.result["about"] = machine()
    run_sections(cx, wanted)
    cx.save()
    print("\n" + "\n".join(cx.rows))
    print("seconds:", {name: x.get("seconds") for name, x in cx.result["sections"].items()}, "in all", round(cx.elapsed(), 1))
    if options.publish:
        publish_result(cx)
    failed = failures(cx.result)
    print("failed: " + "; ".join(failed) if failed else "nothing failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
