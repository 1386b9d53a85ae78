"""What the benchmarks share: rows of real lengths, timing side by side, and results with machine and commit."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).parents[1]

from lengths import Lengths, load  # noqa: E402

from rim_dist.config import Recipe, StageName  # noqa: E402
from rim_dist.data.samples import EncodedSample, Row  # noqa: E402
from rim_dist.methods import method_of  # noqa: E402
from rim_dist.methods.base import StageProgress  # noqa: E402

SMOLLM2_135M = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
VOCABULARIES = {"49k": 49_155, "128k": 128_259}


def llama(vocabulary: int, **changes: Any) -> transformers.PreTrainedModel:
    """A Llama of SmolLM2-135M's shape with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMOLLM2_135M, "vocab_size": vocabulary, **changes})
    return transformers.AutoModelForCausalLM.from_config(config).float()


def block_ids(vocabulary: int, tokens_per_block: int) -> list[int]:
    return [vocabulary - 3, *[vocabulary - 2] * tokens_per_block, vocabulary - 1]


def real_rows(count: int, stage: StageName, blocks: int, block_size: int, vocabulary: int, seed: int) -> list[Row]:
    """Rows of one stage, at its start, with GSM8K's own lengths and step counts, drawn at random; tokens are random."""
    pick = random.Random(seed)
    recipe = {
        "model": {"config": {"model_type": "llama"}, "tokenizer": "synthetic"},
        "memory": {"blocks": blocks, "tokens_per_block": block_size - 2},
        "curriculum": {"stage1": {"samples": 1}, "stage2": {"samples": 1}},
    }
    method = method_of(Recipe.model_validate(recipe))

    def tokens(number: int) -> list[int]:
        return [pick.randrange(vocabulary - 3) for _ in range(number)]

    def row(lengths: Lengths) -> Row:
        question, steps, answer = tokens(lengths.question), [tokens(n) for n in lengths.steps], tokens(lengths.answer)
        return method.row(EncodedSample(question, steps, answer, 0), StageProgress(stage))

    return [row(lengths) for lengths in pick.sample(load(), count)]


def side_by_side(candidates: dict[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, so that a slow spell of the machine hits all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warmup + rounds):
        for name, run in candidates.items():
            gc.collect()
            start = time.perf_counter()
            run()
            if number >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def machine() -> dict[str, str]:
    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        except FileNotFoundError:  # a machine without git measures as well
            return ""

    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        names = [
            line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
        ]
        processor = names[0] if names else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    changed = " with changes" if git("status", "--porcelain", "--", "rim_dist", "benchmarks/*.py") else ""
    return {
        "machine": f"{processor}, {torch.get_num_threads()} threads, {memory:.0f} GiB",
        "software": f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}",
        "commit": (git("rev-parse", "--short", "HEAD") or "unknown") + changed,
        "date": datetime.date.today().isoformat(),
    }


_ABOUT = machine()  # before anything is measured: the code may change while a long benchmark runs


def results_stem(name: str) -> Path:
    """Path of a result's files in `benchmarks/results/`, without their suffix."""
    return ROOT / "benchmarks" / "results" / f"{_ABOUT['date']}-{name}"


def publish(name: str, title: str, text: str, figures: Any, quick: bool) -> None:
    """Print a result; a full run also leaves it in `benchmarks/results/`, as a page and as JSON."""
    about = _ABOUT
    page = f"# {title}\n\n" + "".join(f"- {key}: {value}\n" for key, value in about.items()) + f"\n{text}"
    print(page)
    if not quick:
        stem = results_stem(name)
        stem.parent.mkdir(exist_ok=True)
        stem.with_suffix(".md").write_text(page, encoding="utf-8")
        stem.with_suffix(".json").write_text(json.dumps({**about, "figures": figures}, indent=1) + "\n", encoding="utf-8")
