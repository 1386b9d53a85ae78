"""Lengths of real rows: a sample of GSM8K's training set as the pipeline encodes it, shipped as `gsm8k_lengths.json`.

    RIM_DIST_DATA=... python benchmarks/lengths.py TOKENIZER     # writes the file again

Benchmarks draw rows of these lengths with random tokens, so that they need neither the data nor the tokenizer.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).with_name("gsm8k_lengths.json")
ROWS = 1024


@dataclass(frozen=True)
class Lengths:
    """Tokens of a question (chat template included), of each step and of the answer (end-of-text token included)."""

    question: int
    steps: tuple[int, ...]
    answer: int


def load() -> list[Lengths]:
    return [Lengths(q, tuple(steps), a) for q, steps, a in json.loads(FILE.read_text(encoding="utf-8"))["rows"]]


def main() -> None:
    from rim_dist.recipe import validate_recipe
    from rim_dist.training.trainer import prepare_run

    with tempfile.TemporaryDirectory() as folder:
        tree = {
            "run": {"name": "lengths", "output_dir": folder},
            "model": {"init_from": sys.argv[1]},
            "data": {"source": "gsm8k", "path": f"{os.environ['RIM_DIST_DATA']}/gsm8k/train.jsonl", "on_bad_sample": "skip"},
            "curriculum": {"stage1": {"epochs": 1}, "stage2": {"epochs": 1}},
        }
        _, data = prepare_run(validate_recipe(tree, "lengths"))
        chosen = random.Random(0).sample(range(len(data)), ROWS)
        rows = [
            [len(s.question), [len(step) for step in s.steps], len(s.answer)]
            for i in chosen
            for s in [data.samples(i, i + 1)[0]]
        ]
    about = {
        "source": "GSM8K train.jsonl (MIT licence), a random sample of its rows",
        "tokenizer": "SmolLM2, its chat template around the question",
        "columns": "[question tokens, [tokens of each step], answer tokens]; targets with end-of-text",
    }
    text = json.dumps({**about, "rows": rows}).replace(', "rows": [', ',\n"rows": [\n').replace("], [", "],\n[")
    FILE.write_text(text.replace("]]}", "]\n]}") + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
