"""How long a save keeps the step loop waiting: in front and in the background, 2 ranks, ZeRO-3, a random Llama of 135M.

    python benchmarks/save.py [--quick]

Trains a few steps with a checkpoint after each, both ways, and reads the runs' `saves.jsonl`. The first save of a run is
left out: a background save gets its memory then.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from common import ROOT, publish

from rim_dist.table import Table

MODELS = {
    "10M": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 8, "vocab_size": 8192},
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}


def recipe_of(folder: Path, model: str, steps: int, background: bool) -> dict[str, Any]:
    """A few steps, a checkpoint after each."""
    name = "background" if background else "front"
    return {
        "run": {"name": name, "output_dir": str(folder)},
        "model": {
            "config": {"model_type": "llama", "tie_word_embeddings": True, "max_position_embeddings": 512, **MODELS[model]},
            "tokenizer": "synthetic",
        },
        "memory": {"blocks": 2},
        "data": {"synthetic": {"samples": 64, "min_steps": 1, "max_steps": 2}},
        "curriculum": {"stage2": {"samples": 4 * steps}},
        "optimizer": {"global_batch": 4, "micro_batch_tokens": 256},
        "parallel": {"zero_stage": 3},
        "checkpoint": {"every_steps": 1, "keep": 1, "background": background},
        "evaluation": {"at_end": False},
    }


def train(folder: Path, model: str, steps: int, background: bool) -> list[dict[str, Any]]:
    """Run and return the lines of `saves.jsonl`."""
    recipe = recipe_of(folder, model, steps, background)
    name = recipe["run"]["name"]
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "-m", "rim_dist", "train", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    lines = (folder / name / "checkpoints" / "saves.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a 10M model, nothing written")
    parser.add_argument("--steps", type=int, default=6, help="steps, each with a save (6)")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark-save", help="where the runs go; emptied")
    arguments = parser.parse_args()
    model = "10M" if arguments.quick else "135M"
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    saves = {way: train(arguments.folder, model, arguments.steps, way == "background") for way in ("front", "background")}
    blocked = {way: statistics.median(line["blocked_seconds"] for line in lines[1:]) for way, lines in saves.items()}
    share = blocked["background"] / blocked["front"]
    shutil.rmtree(arguments.folder)
    size = saves["front"][-1]["bytes"] / 2**20
    lines = [
        [way, f"{blocked[way]:.2f}", f"{statistics.median(line['write_seconds'] for line in saves[way][1:]):.2f}"]
        for way in saves
    ]
    text = f"A random Llama of {model}, 2 ranks, ZeRO-3, fp32: {size:,.0f} MiB a save, medians of {arguments.steps - 1}.\n\n"
    text += Table(["", "the loop stands still, s", "until it is on disk, s"], lines).markdown()
    text += f"\nIn the background the loop stands still for {100 * share:.1f} % of the time in front.\n"
    figures = {"median_blocked_seconds": blocked, "background_blocks_share_of_front": share, "saves": saves}
    publish("save", "A save and the step loop", text, figures, arguments.quick)
    return 0


if __name__ == "__main__":
    sys.exit(main())
