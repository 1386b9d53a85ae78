"""Rate of the data pipeline against the rate at which the demo's trainer consumes it, on one core; time to the first step.

python benchmarks/data_pipeline.py [--quick]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from common import ROOT, publish

from rim_dist.table import Table


def demo_recipe(folder: str, steps: int) -> dict[str, Any]:
    """The demo's RiM run from random weights, a few steps of each stage."""
    tree = yaml.safe_load((ROOT / "recipes" / "demo.yaml").read_text(encoding="utf-8"))
    base = yaml.safe_load((ROOT / "recipes" / "demo-base.yaml").read_text(encoding="utf-8"))
    tree["model"] = base["model"]
    tree["run"] = {"name": "pipeline", "output_dir": folder}
    for stage in ("stage1", "stage2"):
        tree["curriculum"][stage]["samples"] = steps * tree["optimizer"]["global_batch"]
    tree["checkpoint"] = {"every_steps": 0}
    tree["evaluation"] = {"at_end": False}
    return tree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, nothing written")
    options = parser.parse_args()
    steps = 20 if options.quick else 100
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(yaml.safe_dump(demo_recipe(folder, steps)), encoding="utf-8")
        started = time.time()
        subprocess.run([sys.executable, "-m", "rim_dist", "train", str(path)], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)

        from rim_dist.data.loader import BatchLoader, plan_stages
        from rim_dist.metrics import read_metrics
        from rim_dist.recipe import load_recipe
        from rim_dist.training.trainer import prepare_run

        recipe = load_recipe(path)
        metrics = [m for m in read_metrics(recipe.folder / "metrics.jsonl") if m["kind"] == "train"]
        first = (recipe.folder / "ds_config.json").stat().st_mtime - started
        requirements, data = prepare_run(recipe)
        loader = BatchLoader(recipe, data, requirements.tokens, 0, 1)
        figures: dict[str, Any] = {"seconds_to_engine": first}
        lines = []
        for plan in plan_stages(recipe, len(data)):
            consumed = statistics.median(m["samples_per_second"] for m in metrics[5:] if m["stage"] == plan.name)
            times = []
            for step in range(plan.steps):
                start = time.perf_counter()
                rank_batch = loader.rank_batch(plan, step)
                times.append(time.perf_counter() - start)
            rate = sum(map(len, rank_batch.samples)) / statistics.median(times)
            figures[plan.name] = {"consumed": consumed, "pipeline": rate}
            lines.append([plan.name, f"{consumed:.0f}", f"{rate:.0f}", f"{rate / consumed:.1f}x"])
        first_step = metrics[0]["seconds"]
    text = Table(["stage", "trainer, samples/s", "pipeline, samples/s", "ratio"], lines).markdown()
    text += f"\nFrom the command to the engine's start {first:.1f} s, the first step {first_step:.2f} s more.\n"
    publish("data-pipeline", "Data pipeline of the demo on one core", text, figures, options.quick)


if __name__ == "__main__":
    main()
