"""Checkpoints of 2 ranks go on at 1, 2 and 4, and come back: parameters and optimizer state equal, then the next 8 losses."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_recipe, write_recipe
from ranks import ROOT, run
from safetensors.torch import load_file
from states import same_state

from rim_dist.checkpoint import safetensors_files
from rim_dist.checkpoint.index import index_checkpoint
from rim_dist.checkpoint.store import find_checkpoint, folder_of, read_state
from rim_dist.checkpoint.stored_tensors import read_tensor
from rim_dist.cli import main
from rim_dist.metrics import read_metrics
from rim_dist.recipe import load_recipe

SAVED = 4
STEPS = 12
KINDS = ("zero0", "zero1", "zero2", "zero3", "lora1", "lora3", "bf16zero3", "bf16zero1")
# Runs of 2 ranks that share matrices or rows, and the degrees (tensor, sequence, data) each goes on at.
SHARED = {"tp2-zero1": (2, 1), "tp2-zero3": (2, 1), "tp2-lora1": (2, 1), "tp2-lora3": (2, 1), "sp2-zero3": (1, 2)}
MOVES = {
    1: {"tp2-zero3": (1, 1, 1), "tp2-lora1": (1, 1, 1), "sp2-zero3": (1, 1, 1)},
    2: {"tp2-zero1": (1, 2, 1), "tp2-zero3": (2, 1, 1), "tp2-lora3": (1, 1, 2), "sp2-zero3": (2, 1, 1), "lora3": (2, 1, 1)},
    4: {"tp2-zero3": (2, 2, 1), "tp2-lora3": (2, 1, 2), "zero3": (2, 2, 1)},
}
Move = tuple[str, tuple[int, int, int]]


def moves_to(ranks: int) -> list[Move]:
    """Every kind with as many data ranks, and the moves above."""
    return [(k, (1, 1, ranks)) for k in KINDS if ranks == 2 or not k.startswith("bf16")] + list(MOVES[ranks].items())


# Rows and matrices of every kind, cut anew: ZeRO-1 to sequence ranks, sequence ranks to tensor ranks, adapters to tensor ranks;
# and two that stay as they are, without ZeRO and in bf16.
QUICK: list[Move] = [
    ("zero0", (1, 1, 2)),
    ("bf16zero3", (1, 1, 2)),
    ("tp2-zero1", (1, 2, 1)),
    ("sp2-zero3", (2, 1, 1)),
    ("lora3", (2, 1, 1)),
]


def recipe_of(folder: Path, kind: str, base: str = "") -> dict:
    """12 steps of one stage without dropout, saved after 4; weight decay makes two parameter groups."""
    model: dict = {"config": {**tiny_recipe(folder)["model"]["config"], "hidden_size": 36, "head_dim": 8}}
    if "lora" in kind:
        model = {"config": None, "tokenizer": None, "init_from": base, "lora": {"rank": 4, "alpha": 8}}
    tensor, sequence = SHARED.get(kind, (1, 1))
    own = folder / f"{kind}.json"
    tree = json.loads((ROOT / "ds_configs" / f"zero{kind[-1]}.json").read_text())
    if kind[-1] == "3":  # several sub-groups, and even tiny parameters partitioned
        tree["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "sub_group_size": 5000}
    own.write_text(json.dumps(tree))
    return tiny_recipe(
        folder,
        run={"name": kind},
        model={**model, "dtype": "bf16" if kind.startswith("bf16") else "fp32"},
        curriculum={"stage1": {"samples": 16 * STEPS, "learning_rate": 1e-3, "max_steps": 4}, "stage2": {"samples": 0}},
        optimizer={"weight_decay": 0.1, "gradient_clipping": 1.0},
        parallel={"zero_stage": int(kind[-1]), "deepspeed_config": str(own), "tensor": tensor, "sequence": sequence},
        checkpoint={"every_steps": SAVED, "keep": 3},
        evaluation={"at_end": False},
    )


@pytest.fixture(scope="module")
def train(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Kinds trained on 2 ranks without a break, each once; returns the folder of all."""
    folder = tmp_path_factory.mktemp("reshape")

    def make(*kinds: str) -> Path:
        needed = [*(["zero1"] if any("lora" in kind for kind in kinds) else []), *kinds]  # adapters start from its export
        missing = [kind for kind in dict.fromkeys(needed) if not (folder / kind).exists()]
        base = str(folder / "zero1" / "hf")
        paths = [str(write_recipe(folder / f"{kind}.yaml", recipe_of(folder, kind, base))) for kind in missing]
        if paths:
            run("fork", 2, ["tests/workers/train_many.py", *paths], timeout=400)
        return folder

    return make


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "moves"),
    [
        pytest.param(2, QUICK, id="2"),
        pytest.param(2, [move for move in moves_to(2) if move not in QUICK], marks=pytest.mark.thorough, id="2-more"),
        pytest.param(4, moves_to(4), marks=pytest.mark.thorough, id="4"),
        pytest.param(1, moves_to(1), marks=pytest.mark.thorough, id="1"),
    ],
)
def test_goes_on_at_other_ranks(train: Callable[..., Path], tmp_path: Path, ranks: int, moves: list[Move]) -> None:
    runs, targets = train(*(kind for kind, _ in moves)), []
    for kind, (tensor, sequence, data) in moves:
        source, target = folder_of(runs / kind / "checkpoints", SAVED), tmp_path / f"{kind}-{tensor}-{sequence}"
        degrees = ["--tensor", str(tensor), "--sequence", str(sequence), "--data", str(data)]
        assert main(["convert", "reshape", str(source), str(target), *degrees]) == 0
        same_state(index_checkpoint(source), index_checkpoint(find_checkpoint(target)))
        state = read_state(find_checkpoint(target))
        assert state == replace(read_state(source), ranks=ranks)
        targets.append(target)
    run("fork", ranks, ["tests/workers/resave_and_train.py", *map(str, targets)], timeout=800)
    for (kind, degrees), target in zip(moves, targets, strict=True):
        source = folder_of(runs / kind / "checkpoints", SAVED)
        resaved = find_checkpoint(target / "resaved")
        same_state(index_checkpoint(source), index_checkpoint(resaved))  # sharded by these ranks, and read back
        back = tmp_path / f"{target.name}-back"
        assert main(["convert", "reshape", str(resaved), str(back), "--data", "2"]) == 0
        same_state(index_checkpoint(source), index_checkpoint(find_checkpoint(back)))
        expected, found = losses(runs / kind), losses(target)
        assert len(expected) == len(found) == STEPS
        worst = max(abs(a / b - 1) for a, b in zip(found[SAVED:], expected[SAVED:], strict=True))
        print(f"{kind} -> {degrees}: largest relative difference of the next {STEPS - SAVED} losses {worst:.1e}")
        assert found[:SAVED] == expected[:SAVED]
        if degrees[:2] == SHARED.get(kind, (1, 1)) and ranks == 2:
            assert found == expected, kind
        assert worst <= 1e-5, (kind, degrees)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "17"], "17 ranks share a global batch of 16 samples"),
        (["--data", "0"], "--data: 0 is not allowed"),
        (["--data", "1", "--tensor", "8"], "parallel.tensor: 8 ranks cannot share 4 attention heads"),
        (["--data", "1", "--sequence", "0"], "--sequence: 0 is not allowed"),
    ],
)
def test_impossible_degrees(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["convert", "reshape", str(train("zero1") / "zero1"), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_reshape_that_fails_can_be_tried_again(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = ["convert", "reshape", str(train("zero1") / "zero1"), str(tmp_path / "out"), "--data", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_files, "write_all", full)
        assert main(arguments) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0


def test_other_ranks_name_the_command(train: Callable[..., Path], tmp_path: Path) -> None:
    runs = train("zero0")
    recipe = load_recipe(runs / "zero0.yaml")
    (runs / "zero0" / "hf" / "rim_dist.json").unlink()
    result = run("fork", 1, ["-m", "rim_dist", "train", str(runs / "zero0.yaml")], check=False)
    assert result.returncode == 2
    assert "saved by 2 ranks, this run has 1" in result.stdout
    assert (
        f"rim-dist convert reshape {recipe.folder}/checkpoints/step-00000012 OUT --tensor 1 --sequence 1 --data 1"
        in result.stdout
    )


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "kind", ["tp2-zero3", *(pytest.param(kind, marks=pytest.mark.thorough) for kind in ("zero3", "lora3", "sp2-zero3"))]
)
def test_to_hf_from_hf_to_hf(train: Callable[..., Path], tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Bit for bit in fp32; and the run that starts from it trains the weights of the folder, its memory rows kept."""
    runs = train(kind)
    first, start, second = tmp_path / "first", tmp_path / "start", tmp_path / "second"
    assert main(["export", str(folder_of(runs / kind / "checkpoints", STEPS)), str(first), "--dtype", "fp32"]) == 0
    tensor, sequence = SHARED.get(kind, (1, 1))
    data = 2 // (tensor * sequence)
    degrees = ["--tensor", str(tensor), "--sequence", str(sequence), "--data", str(data)]
    assert main(["convert", "from-hf", str(first), str(start), *degrees]) == 0
    assert main(["export", str(start), str(second), "--dtype", "fp32"]) == 0
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    capsys.readouterr()
    assert main(["convert", "diff", str(first), str(start)]) == 1
    assert all(line.startswith("recipe.") for line in capsys.readouterr().out.splitlines())
    assert main(["convert", "diff", str(first), str(second)]) == 1  # the recipe again; no tensor
    state = read_state(find_checkpoint(start))
    assert (state.stage, state.step, state.ranks) == ("stage1", 0, 2)
    run("fork", 2, ["-m", "rim_dist", "train", str(start / "recipe.yaml")])
    by_hand = recipe_of(tmp_path, kind)
    by_hand |= {"run": {**by_hand["run"], "name": "by-hand"}}
    by_hand["model"] = {
        **by_hand["model"],
        "config": None,
        "tokenizer": None,
        "init_from": str(first),
    }
    run("fork", 2, ["-m", "rim_dist", "train", str(write_recipe(tmp_path / "by-hand.yaml", by_hand))])
    assert losses(start) == losses(tmp_path / "by-hand")


@pytest.mark.timeout(300)
def test_from_a_plain_model_into_a_stage(
    train: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder without memory rows gets them as training would make them; the second stage begins at its own place."""
    from transformers import AutoModelForCausalLM

    from rim_dist.data.synthetic import synthetic_tokenizer

    plain = tmp_path / "plain"
    model = AutoModelForCausalLM.from_pretrained(train("zero1") / "zero1" / "hf")
    model.resize_token_embeddings(model.get_input_embeddings().weight.shape[0] - 3)
    model.save_pretrained(plain)
    synthetic_tokenizer().save_pretrained(plain)
    recipe = recipe_of(tmp_path, "zero1")
    recipe["curriculum"]["stage2"] = {"samples": 32, "learning_rate": 1e-3}
    path = write_recipe(tmp_path / "r.yaml", recipe)
    assert main(["convert", "from-hf", str(plain), str(tmp_path / "s")]) == 2
    assert "give one with --recipe" in capsys.readouterr().err
    assert main(["convert", "from-hf", str(plain), str(tmp_path / "s"), "--recipe", str(path), "--stage", "2"]) == 0
    state = read_state(find_checkpoint(tmp_path / "s"))
    assert (state.stage, state.step, state.samples) == ("stage2", STEPS, 16 * STEPS)
    rows = read_tensor(index_checkpoint(find_checkpoint(tmp_path / "s")).module["model.embed_tokens.weight"])
    assert torch.equal(rows[:-3], model.get_input_embeddings().weight)
    assert rows[-3:].any(dim=1).all()
    run("fork", 1, ["-m", "rim_dist", "train", str(tmp_path / "s" / "recipe.yaml")])
    assert [line["step"] for line in read_metrics(tmp_path / "s" / "metrics.jsonl")] == [STEPS + 1, STEPS + 2]
