"""Every mix of data, tensor and sequence ranks under ZeRO against one process; writes the table of docs/parallel.md.

python tests/parallel_matrix.py            # the full matrix on 2, 4 and 8 ranks (about ten minutes on two cores)
python tests/parallel_matrix.py --write    # and put its table into docs/parallel.md
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from conftest import partitioned, tiny_recipe
from oracle import train_one_process

from rim_dist.config import Recipe
from rim_dist.recipe import validate_recipe
from rim_dist.table import Table

STEPS = 8
BATCH = 12
TOLERANCE = 1e-5
DOCS = Path(__file__).parents[1] / "docs" / "parallel.md"
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


@dataclass(frozen=True)
class Layout:
    """Degrees, and how sequence ranks share a row."""

    name: str
    tensor: int = 1
    sequence: int = 1
    data: int = 1
    mode: str = "auto"

    @property
    def ranks(self) -> int:
        return self.tensor * self.sequence * self.data


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("DP2", data=2),
        Layout("TP2", tensor=2),
        Layout("SP2 ulysses", sequence=2, mode="ulysses"),
        Layout("SP2 allgather_kv", sequence=2, mode="allgather_kv"),
        Layout("TP2 x DP2", tensor=2, data=2),
        Layout("SP2 x DP2", sequence=2, data=2, mode="ulysses"),
        Layout("TP2 x SP2", tensor=2, sequence=2, mode="allgather_kv"),
        Layout("TP2 x SP2 x DP2", tensor=2, sequence=2, data=2, mode="ulysses"),
    )
}


@dataclass(frozen=True)
class Case:
    """One run of the matrix. Heads are tied where gradients are clipped, untied where they are not."""

    layout: str
    zero: int
    lora: bool
    clip: bool
    stage: str

    @property
    def reference(self) -> str:
        return f"{'lora' if self.lora else 'full'}-{'clip' if self.clip else 'plain'}-{self.stage}"


def all_cases() -> list[Case]:
    return [Case(*c) for c in itertools.product(LAYOUTS, (1, 2, 3), (False, True), (True, False), ("stage1", "stage2"))]


def pairwise_cases() -> list[Case]:
    """A selection in which every pair of values of two dimensions occurs."""
    left = {pair for case in all_cases() for pair in _pairs(case)}
    chosen: list[Case] = []
    while left:
        best = max(all_cases(), key=lambda case: len(left.intersection(_pairs(case))))
        chosen.append(best)
        left.difference_update(_pairs(best))
    return chosen


def _pairs(case: Case) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(asdict(case).items(), 2))


def base_model(folder: Path, tied: bool) -> Path:
    """An HF folder of random weights for adapters to start from."""
    import transformers

    from rim_dist.data.synthetic import synthetic_tokenizer

    path = folder / f"base-{'tied' if tied else 'untied'}"
    if not path.exists():
        torch.manual_seed(0)
        tokenizer = synthetic_tokenizer()
        fields = {k: v for k, v in MODEL.items() if k != "model_type"}
        config = transformers.LlamaConfig(**fields, vocab_size=len(tokenizer), tie_word_embeddings=tied)
        transformers.LlamaForCausalLM(config).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def case_recipe(case: Case, folder: Path) -> Recipe:
    """The recipe of a case. The vocabulary with its memory rows is odd, so that its rows need padding under TP2."""
    layout = LAYOUTS[case.layout]
    length = {"samples": STEPS * BATCH - 3, "learning_rate": 1e-3, "warmup_fraction": 0.5}
    curriculum: dict[str, Any] = {"stage1": {"max_steps": 4}, "stage2": {}}
    curriculum[case.stage] |= length
    model: dict[str, Any] = {"config": {**MODEL, "tie_word_embeddings": case.clip}}
    if case.lora:
        lora = {"rank": 4, "alpha": 8, "target_modules": "all-linear"}
        model = {"config": None, "tokenizer": None, "init_from": str(base_model(folder, case.clip)), "lora": lora}
    parallel: dict[str, Any] = {"zero_stage": case.zero, "tensor": layout.tensor, "sequence": layout.sequence}
    parallel["sequence_mode"] = layout.mode
    if case.zero == 3:
        parallel["deepspeed_config"] = str(folder / "zero3.json")
    return validate_recipe(
        tiny_recipe(
            folder,
            model=model,
            data={"cache_dir": str(folder / "data")},
            curriculum=curriculum,
            optimizer={
                "global_batch": BATCH,
                "micro_batch_tokens": 110,
                "gradient_clipping": 0.5 if case.clip else 0.0,
                "eps": 1e-6,
            },
            parallel=parallel,
        ),
        "case",
    )


def write_references(cases: Iterable[Case], folder: Path) -> None:
    """What one bare process gives: unrolled runs, no DeepSpeed. Losses, norms, first gradients, last parameters."""
    torch.set_num_threads(1)
    partitioned(folder)
    for case in {case.reference: case for case in cases}.values():
        path = folder / f"{case.reference}.pt"
        if path.exists():
            continue
        recipe = case_recipe(Case("DP2", 1, case.lora, case.clip, case.stage), folder)
        trace: dict[str, Any] = {}
        steps = train_one_process(recipe, trace)
        torch.save({"steps": steps, **trace}, path)


@dataclass(frozen=True)
class Difference:
    """Largest relative differences of losses and norms, of a gradient (of the largest entry), of a tensor at the end."""

    loss: float
    norm: float
    gradient: float
    weights: float

    @property
    def worst(self) -> float:
        return max(asdict(self).values())


def run_cases(cases: list[Case], folder: Path, timeout: float = 3600) -> dict[Case, Difference]:
    """Run cases on as many ranks as each needs, those of the same number in one process group."""
    from ranks import run

    write_references(cases, folder)
    results: dict[Case, Difference] = {}
    for ranks in sorted({LAYOUTS[case.layout].ranks for case in cases}):
        mine = [case for case in cases if LAYOUTS[case.layout].ranks == ranks]
        todo, done = folder / f"cases-{ranks}.json", folder / f"results-{ranks}.json"
        todo.write_text(json.dumps([asdict(case) for case in mine]))
        run("fork", ranks, ["tests/workers/parallel_cases.py", str(todo), str(done)], timeout=timeout, OMP_NUM_THREADS="1")
        results |= {case: Difference(**d) for case, d in zip(mine, json.loads(done.read_text()), strict=True)}
    return results


def table(results: dict[Case, Difference]) -> str:
    rows = []
    for name, lora, zero in itertools.product(LAYOUTS, (False, True), (1, 2, 3)):
        found = [d for c, d in results.items() if (c.layout, c.lora, c.zero) == (name, lora, zero)]
        if found:
            worst = [max(getattr(d, field) for d in found) for field in ("loss", "norm", "gradient", "weights")]
            rows.append([name, "LoRA" if lora else "full", zero, *(f"{w:.0e}" for w in worst)])
    head = ["ranks", "trained", "ZeRO", "loss", "gradient norm", "gradients", "parameters"]
    return Table(head, rows, align="l").markdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/parallel.md")
    parser.add_argument("--pairwise", action="store_true", help="only what the tests run")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = run_cases(pairwise_cases() if arguments.pairwise else all_cases(), Path(folder))
    text = table(results)
    print(text)
    worst = max(results.values(), key=lambda d: d.worst)
    print(f"{len(results)} runs; largest difference {worst}")
    if arguments.write:
        before, start, rest = DOCS.read_text().partition("<!-- matrix -->\n")
        _, end, after = rest.partition("<!-- end -->")
        DOCS.write_text(before + start + text + end + after)
    assert worst.worst <= TOLERANCE, "above the tolerance"


if __name__ == "__main__":
    main()
