"""The demonstration: RiM against direct answering, from the same base, on the embedded task, on two CPU cores.

    python tools/demo.py [--seed N] [--equal-compute]

Three ordinary `rim-dist train` runs under DeepSpeed ZeRO-3 (a small chain-of-thought base from scratch; RiM; direct answering
at equal samples), with `--equal-compute` a fourth (direct answering at RiM's number of operations, as long again), then
accuracy and latency of the exports, side by side. Every run goes on where it was stopped; a second start only measures again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = 512


def train(recipe: str, name: str, *overrides: str, background: bool = False) -> subprocess.Popen[bytes]:
    """Start a run. One thread each: the model is too small for more, and two runs share the machine."""
    command = [sys.executable, "-m", "rim_dist", "train", f"recipes/{recipe}.yaml", f"run.name={name}", *overrides]
    print(f"$ rim-dist {' '.join(command[3:])}{'  (in the background)' if background else ''}", flush=True)
    log = None
    if background:
        folder = ROOT / "runs" / name / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        log = (folder / "train.log").open("ab")
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=log)


def finish(*runs: subprocess.Popen[bytes]) -> None:
    """Wait for all; end with the status of the first that failed."""
    status = [run.wait() for run in runs]
    if failed := next((s for s in status if s), 0):
        print("demo: a run did not end well; its last lines say why (background runs: runs/*/logs/train.log)", file=sys.stderr)
        sys.exit(failed)


def last_line(name: str, kind: str) -> dict[str, Any]:
    from rim_dist.metrics import read_metrics

    return [line for line in read_metrics(ROOT / "runs" / name / "metrics.jsonl") if line["kind"] == kind][-1]


def measure(name: str, seed: int) -> dict[str, Any]:
    """Accuracy and latency of a run's export in this process."""
    from rim_dist.config import ColumnsSection
    from rim_dist.evaluation.evaluate import evaluate_model, evaluation_samples
    from rim_dist.evaluation.loading import load_for_evaluation
    from rim_dist.model.generation import Decoding

    export = load_for_evaluation(ROOT / "runs" / name / "hf")
    samples = evaluation_samples(f"synthetic:{seed}", "auto", QUESTIONS, ColumnsSection(), export.synthetic_steps)
    result = evaluate_model(export, samples, export.blocks, Decoding(32, QUESTIONS), timed_questions=50)
    line = last_line(name, "train")
    return {
        "accuracy": result.accuracy,
        "per_block": result.per_block,
        "any_block": result.any_block,
        "latency": result.latency,
        "samples": line["samples"],
        "operations": line["operations"],
        "method": export.method,
    }


def train_at_equal_compute(names: dict[str, str], same: tuple[str, ...]) -> None:
    """Direct answering for as many operations as RiM took, shared between the stages as the recipe shares its samples."""
    from rim_dist.recipe import load_recipe

    recipe = load_recipe(ROOT / "recipes" / "demo.yaml")
    ratio = last_line(names["rim"], "train")["operations"] / last_line(names["direct"], "train")["operations"]
    batch = recipe.optimizer.global_batch
    samples = [round((recipe.curriculum.stage(s).samples or 0) * ratio / batch) * batch for s in ("stage1", "stage2")]
    finish(
        train(
            "demo",
            names["compute"],
            "method=direct",
            *same,
            f"curriculum.stage1.samples={samples[0]}",
            f"curriculum.stage2.samples={samples[1]}",
            f"data.synthetic.samples={sum(samples)}",
        )
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, data and order (0)")
    parser.add_argument("--equal-compute", action="store_true", help="direct answering at RiM's number of operations as well")
    options = parser.parse_args()
    seed = options.seed
    suffix = "" if seed == 0 else f"-seed{seed}"
    names = {
        key: f"demo{part}{suffix}"
        for key, part in (("base", "-base"), ("rim", ""), ("direct", "-direct"), ("compute", "-direct-compute"))
    }
    same = (f"run.seed={seed}", f"model.init_from=runs/{names['base']}")

    finish(train("demo-base", names["base"], f"run.seed={seed}"))
    direct = train("demo", names["direct"], "method=direct", *same, background=True)
    finish(train("demo", names["rim"], *same), direct)

    if options.equal_compute:
        train_at_equal_compute(names, same)
    else:
        del names["compute"]
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch

    torch.set_num_threads(1)
    results = {key: measure(name, seed) for key, name in names.items()}
    show_results(results, ROOT / "runs" / names["rim"])
    (ROOT / "runs" / names["rim"] / "report" / "comparison.json").write_text(
        json.dumps(results, indent=1) + "\n", encoding="utf-8"
    )
    from rim_dist.training.grounding import near_guessing, not_learned

    if near_guessing(results["rim"]["accuracy"]):
        print(not_learned("rim", results["rim"]["accuracy"]))
        return 1
    return 0


def show_results(results: dict[str, Any], folder: Path) -> None:
    from rim_dist.table import Table, show

    rows = []
    labels = {
        "rim": "RiM, final block",
        "direct": "direct, equal samples",
        "compute": "direct, equal compute",
        "base": "base: chain of thought",
    }
    for key, label in labels.items():
        if (r := results.get(key)) is None:
            continue
        latency = r["latency"]
        rows.append(
            [
                label,
                f"{100 * r['accuracy']:.1f}",
                f"{r['samples']:,}",
                f"{r['operations'] / 1e12:.2f}",
                f"{1000 * latency['first_token_seconds']:.1f}",
                f"{1000 * latency['answer_seconds']:.1f}",
                f"{latency['new_tokens']:.1f}",
            ]
        )
    head = ["method", "accuracy %", "samples", "10^12 operations", "TTFT ms", "answer ms", "tokens"]
    show(Table(head, rows, f"{QUESTIONS} held-out walks through 5 doors; guessing gets 20 %"))
    blocks = results["rim"]["per_block"]
    print("RiM after block " + ", ".join(f"{k}: {100 * a:.1f} %" for k, a in enumerate(blocks, 1)))
    margin = 100 * (blocks[-1] - results["direct"]["accuracy"])
    print(f"RiM's final block is {margin:+.1f} points against direct answering at equal samples.")
    if "compute" in results:
        print(f"At equal compute: {100 * (blocks[-1] - results['compute']['accuracy']):+.1f} points.")
    question = "From the attic take red blue pink green white."
    print(f'Ask it: .venv/bin/rim-dist generate {folder.relative_to(ROOT)}/hf "{question}" --every-block')


if __name__ == "__main__":
    sys.exit(main())
