"""ZeRO-0..3 on 1, 2 and 4 real ranks against one bare process: the first 20 steps of each stage."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from conftest import TINY_MODEL, partitioned, tiny_recipe, write_recipe
from oracle import train_one_process
from ranks import run

from rim_dist.config import STAGE_NAMES
from rim_dist.metrics import read_metrics
from rim_dist.recipe import load_recipe

pytestmark = pytest.mark.untraced
# A model like the demo's (recipes/demo-base.yaml), of fewer layers, on the demo's task.
DEMO_MODEL = {
    **TINY_MODEL,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
STEPS = 20
BATCH = 16
ALL = list(itertools.product((0, 1, 2, 3), STAGE_NAMES))
LAUNCHED = [(1, "stage1"), (3, "stage2")]  # what the quick tier starts with torchrun and with deepspeed


def demo_like(folder: Path, stage: str, **parallel: object) -> dict:
    """The first 20 of 800 steps of one of the demo's stages (its warm-up takes 32 steps), the last batch not full.

    Each stage starts from the same weights: rounding grows from step to step (docs/numerics.md), and 20 steps is how
    far it stays below the tolerance.
    """
    section = {"samples": STEPS * BATCH - 3, "learning_rate": 1e-3 * STEPS / 32, "warmup_fraction": 0.999}
    return tiny_recipe(
        folder,
        run={"name": f"{stage}-zero{parallel.get('zero_stage', '')}"},
        model={"config": dict(DEMO_MODEL)},
        memory={"blocks": 5},
        data={"synthetic": {"samples": 500, "min_steps": 3, "max_steps": 5}},
        curriculum={
            "stage1": {"max_steps": 5},
            "stage2": {},
            stage: {**section, **({"max_steps": 5} if stage == "stage1" else {})},
        },
        optimizer={"global_batch": BATCH, "micro_batch_tokens": 150, "gradient_clipping": 1.0},
        parallel={"timeout_seconds": 120, **parallel},
        checkpoint={"every_steps": 0},
        evaluation={"at_end": False},
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[float, float]]]:
    folder = tmp_path_factory.mktemp("reference")
    return {s: train_one_process(load_recipe(write_recipe(folder / "r.yaml", demo_like(folder, s)))) for s in STAGE_NAMES}


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("launcher", "ranks", "runs"),
    [
        ("fork", 2, [run for run in ALL if run not in LAUNCHED]),
        ("torchrun", 2, LAUNCHED[:1]),
        ("deepspeed", 2, LAUNCHED[1:]),
        pytest.param("fork", 2, LAUNCHED, marks=pytest.mark.thorough),
        pytest.param("fork", 1, ALL, marks=pytest.mark.thorough),
        pytest.param("fork", 4, ALL, marks=pytest.mark.thorough),
        pytest.param("torchrun", 2, [run for run in ALL if run != LAUNCHED[0]], marks=pytest.mark.thorough),
        pytest.param("deepspeed", 2, [run for run in ALL if run != LAUNCHED[1]], marks=pytest.mark.thorough),
    ],
)
def test_zero_equals_one_process(
    launcher: str,
    ranks: int,
    runs: list[tuple[int, str]],
    tmp_path: Path,
    reference: dict[str, list[tuple[float, float]]],
) -> None:
    """`runs`: ZeRO stages, and the stage of the curriculum."""
    recipes = []
    for zero, stage in runs:
        extra = {"deepspeed_config": partitioned(tmp_path)} if zero == 3 else {}
        recipe = demo_like(tmp_path, stage, zero_stage=zero, **extra)
        recipes.append(str(write_recipe(tmp_path / f"{stage}-{zero}.yaml", recipe)))
    run(launcher, ranks, ["tests/workers/train_many.py", *recipes], timeout=800)
    for zero, stage in runs:
        lines = read_metrics(tmp_path / f"{stage}-zero{zero}" / "metrics.jsonl")
        assert [(m["stage"], m["step"]) for m in lines] == [(stage, step) for step in range(1, STEPS + 1)]
        worst = {"loss": 0.0, "grad_norm": 0.0}
        for line, expected in zip(lines, reference[stage], strict=True):
            for name, value in zip(worst, expected, strict=True):
                worst[name] = max(worst[name], abs(line[name] / value - 1))
        print(f"{launcher} x {ranks}, ZeRO-{zero}, {stage}: largest relative difference {worst}")
        assert max(worst.values()) <= 1e-5, f"ZeRO-{zero}, {stage}: {worst}"
