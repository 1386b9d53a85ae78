"""Attention kernels: which one a run gets and why, what is refused, and a new one in one file from recipe to report."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY_MODEL
from families import FAMILIES, build, pack_samples, random_samples
from ranks import ROOT, run

import rim_dist.attention.kernels
from rim_dist.attention.choice import choose_kernel
from rim_dist.attention.kernels import kernel_names, kernel_of, proof_kernel
from rim_dist.attention.kernels.base import Demands, Kernel
from rim_dist.attention.registration import use_rim_attention
from rim_dist.cli import main
from rim_dist.errors import ConfigError, ModelError
from rim_dist.metrics import read_metrics
from rim_dist.objective.forward import install_readout_loss, run_batch
from rim_dist.planning.memory import Buckets, Setup, attention_masks
from rim_dist.planning.workload import Workload
from rim_dist.recipe import load_recipe
from rim_dist.training.trainer import prepare_run

DEMANDS = Demands("llama", 64, None, None, "cuda", "bf16", 0.0, False, None, 8192)
DROPOUT = "it has no dropout, and attention_dropout is 0.1"
FP32 = "it computes in bf16, fp16, and model.dtype is fp32"
CPU = "it has no backward pass on cpu"
SMALL_HEADS = "its kernels need heads of at least 16 channels, llama has 12 here"
# Device, channels of a head, attention dropout: why flex cannot be used, and empty where it can.
FLEX_IS_OUT = {
    ("cuda", 128, 0.0): "",
    ("cuda", 16, 0.0): "",
    ("cuda", 12, 0.0): SMALL_HEADS,
    ("cuda", 128, 0.1): DROPOUT,
    ("cuda", 16, 0.1): DROPOUT,
    ("cuda", 12, 0.1): DROPOUT,
    ("cpu", 128, 0.0): CPU,
    ("cpu", 16, 0.0): CPU,
    ("cpu", 12, 0.0): CPU,
    ("cpu", 128, 0.1): DROPOUT,
    ("cpu", 16, 0.1): DROPOUT,
    ("cpu", 12, 0.1): DROPOUT,
}


def choice(wanted: str, **demands: Any) -> tuple[str, str]:
    found = choose_kernel(wanted, replace(DEMANDS, **demands))
    return found.kernel, found.reason


# ---- the choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "head_dim", "dropout"), FLEX_IS_OUT)
def test_choices(device: str, head_dim: int, dropout: float) -> None:
    """Every dtype, window, softcap, sequence mode and kind of block gets the same kernel."""
    half = FLEX_IS_OUT[device, head_dim, dropout]
    for more in (
        *({"dtype": dtype} for dtype in ("fp32", "bf16", "fp16")),
        *({"sequence_mode": mode} for mode in ("ulysses", "allgather_kv")),
        {"sliding_window": 9},
        {"softcap": 50.0},
        {"bidirectional": True},
    ):
        reason = FP32 if more.get("dtype") == "fp32" and half in ("", SMALL_HEADS) else half  # the first reason is told
        large = ("split", f"flex is out: {reason}") if reason else ("flex", "one kernel for the whole row on cuda")
        given = {"device": device, "head_dim": head_dim, "dropout": dropout, **more}
        for tokens in (1, 256):
            expected = ("dense", "micro-batches of at most 256 tokens")
            assert choice("auto", micro_batch_tokens=tokens, **given) == expected
        for tokens in (257, 8192):
            assert choice("auto", micro_batch_tokens=tokens, **given) == large
        for tokens in (1, 256, 257, 8192):
            for wanted in ("dense", "split"):
                assert choice(wanted, micro_batch_tokens=tokens, **given) == (wanted, "the recipe asks for it")
            if not reason:
                assert choice("flex", micro_batch_tokens=tokens, **given) == ("flex", "the recipe asks for it")
                continue
            with pytest.raises(ConfigError) as refused:
                choice("flex", micro_batch_tokens=tokens, **given)
            message = f"model.attention: flex cannot be used: {reason}; allowed: auto, split, dense"
            assert str(refused.value) == message


def test_demands_of_a_recipe(recipe_file: Callable[..., Path]) -> None:
    """The attention dropout of a stage, or the largest of those that are trained, and what a family's configuration says."""
    recipe = load_recipe(
        recipe_file(
            curriculum={
                "stage1": {"samples": 0, "attention_dropout": 0.3},
                "stage2": {"samples": 9, "attention_dropout": 0.1, "residual_dropout": 0.2},
            },
            memory={"blocks": 2, "inside_block": "bidirectional"},
            parallel={"sequence": 2},
        )
    )
    found = Demands.of(recipe, FAMILIES["Gemma 2"], "cpu", "ulysses")
    assert found == Demands("gemma2", 12, 9, 5.0, "cpu", "fp32", 0.1, True, "ulysses", 300)
    assert Demands.of(recipe, FAMILIES["Gemma 2"], "cpu", "ulysses", "stage2") == found
    assert Demands.of(recipe, FAMILIES["Gemma 2"], "cpu", "ulysses", "stage1").dropout == 0.3
    with pytest.raises(ConfigError, match=r"memory.inside_block: bidirectional .* window \(9\) of gemma2; allowed: causal"):
        choose_kernel("auto", found)
    whole = load_recipe(recipe_file())
    qwen = Demands.of(
        whole, transformers.Qwen2Config(sliding_window=9, use_sliding_window=False), "cuda", "ulysses", local=True
    )
    assert (qwen.sliding_window, qwen.softcap, qwen.sequence_mode, qwen.local) == (None, None, None, True)
    assert choose_kernel("auto", Demands.of(whole, FAMILIES["Llama"], "cuda", "ulysses")).reason == f"flex is out: {FP32}"


def test_a_gpu_has_its_kernel_in_every_stage_that_drops_no_attention(
    recipe_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout of adapters and hidden states is no matter of the attention; that of one stage is none of the other's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(type(kernel_of("flex")), "packages", ())
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    wide = {**TINY_MODEL, "hidden_size": 64}
    stages = {"stage1": {"samples": 9, "learning_rate": 1e-3, "residual_dropout": 0.1}, "stage2": {"samples": 9}}
    path = recipe_file(model={"config": wide, "dtype": "auto"}, curriculum=stages, parallel={"zero_stage": 0})
    assert prepare_run(load_recipe(path))[0].attention_in_words == "flex (one kernel for the whole row on cuda)"
    found = prepare_run(load_recipe(path, ["curriculum.stage2.attention_dropout=0.1"]))[0]
    assert {stage: choice.kernel for stage, choice in found.attention.items()} == {"stage1": "flex", "stage2": "split"}
    assert found.attention_in_words == (
        f"flex (one kernel for the whole row on cuda) in stage1, split (flex is out: {DROPOUT}) in stage2"
    )


def test_packages_count_where_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a kernel's packages plans with it, and does not train with it."""
    monkeypatch.setattr(type(kernel_of("flex")), "packages", ("no_such_package",))
    assert choice("auto") == ("flex", "one kernel for the whole row on cuda")
    missing = "it needs packages that are not installed: no_such_package"
    assert choice("auto", local=True) == ("split", f"flex is out: {missing}")
    with pytest.raises(ConfigError, match=f"flex cannot be used: {missing}; allowed: auto, split, dense"):
        choice("flex", local=True)


@pytest.mark.parametrize(
    ("demand", "reason"),
    [
        ({"dropout": 0.25}, "it has no dropout, and attention_dropout is 0.25"),
        ({"device": "cpu"}, "it has no backward pass on cpu"),
        ({"dtype": "fp16"}, "it computes in bf16, and model.dtype is fp16"),
        ({"head_dim": 63}, "its kernels need heads of at least 64 channels, llama has 63 here"),
        ({"head_dim": 129}, "its kernels take heads of at most 128 channels, llama has 129 here"),
        ({"sliding_window": 9}, "it has no sliding window, and llama has one of 9 tokens"),
        ({"softcap": 5.0}, "it has no softcap, and llama caps scores at 5.0"),
        ({"bidirectional": True}, "its blocks are causal inside, and memory.inside_block is bidirectional"),
        ({"sequence_mode": "ulysses"}, "it cannot run under parallel.sequence_mode ulysses"),
    ],
)
def test_what_is_not_declared_is_refused(demand: dict[str, Any], reason: str) -> None:
    class Bare(Kernel):
        devices, dtypes, head_dims = ("cuda",), ("bf16",), (64, 128)

    assert Bare().refusal(DEMANDS) is None
    assert Bare().refusal(replace(DEMANDS, **demand)) == reason


# ---- documentation ---------------------------------------------------------------------------------------------


def test_pages_name_every_kernel() -> None:
    """What each computes, in docs/architecture.md; how exact it is, in docs/families.md; docs/configuration.md is generated."""
    attention = (
        (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").partition("\n## Attention\n")[2].partition("\n## ")[0]
    )
    assert re.findall(r"^- `(\w+)`: ", attention, flags=re.MULTILINE) == kernel_names()
    heads = re.findall(
        r"^\| family \| (.*) \|$", (ROOT / "docs" / "families.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert [head.removesuffix(" (forward)") for head in heads[0].split(" | ")] == kernel_names()


# ---- a new kernel ----------------------------------------------------------------------------------------------

NEW_KERNEL = '''
from rim_dist.attention.kernels.base import Kernel


class Copied(Kernel):
    """Dense under another name."""

    devices = ("cpu",)
    dtypes = ("fp32",)
    head_dims = (4, 8)
    joins_outputs = True

    def mask_bytes(self, load, entry, device, dropout, gathered):
        return 7 * load.tokens


def attend(query, key, value, layout, rule):
    from rim_dist.attention.dense import attend

    return attend(query, key, value, layout, rule)


KERNEL = Copied()
'''
LEAKY_KERNEL = (
    NEW_KERNEL.replace("Copied", "Leaky")
    .replace("from rim_dist.attention.dense import attend", "from torch.nn.functional import scaled_dot_product_attention")
    .replace(
        "attend(query, key, value, layout, rule)\n\n\nKERNEL",
        "scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)\n\n\nKERNEL",
    )
)


@pytest.fixture
def new_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of kernels beside the package's own: `copied`, and `leaky`, which forgets the mask."""
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "copied.py").write_text(NEW_KERNEL)
    (folder / "leaky.py").write_text(LEAKY_KERNEL)
    monkeypatch.setattr(rim_dist.attention.kernels, "__path__", [*rim_dist.attention.kernels.__path__, str(folder)])
    return folder


def test_a_new_kernel_is_one_file(
    tmp_path: Path, new_kernels: Path, recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A file in `rim_dist/attention/kernels` is enough: a run from recipe to report, the planner and the reference."""
    import config_reference

    recipe = recipe_file()
    losses = {}
    for name in ("dense", "copied"):
        command = ["tests/workers/with_kernels.py", "train", str(recipe), f"run.name={name}", f"model.attention={name}"]
        out = run("fork", 1, command, RIM_TEST_KERNELS=str(new_kernels)).stdout
        assert f"attention {name} (the recipe asks for it)" in out
        folder = tmp_path / "runs" / name
        losses[name] = [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if line["kind"] == "train"]
    assert losses["copied"] == losses["dense"]
    assert len(losses["copied"]) == 8
    assert load_recipe(tmp_path / "runs" / "copied" / "recipe.yaml", written=True).model.attention == "copied"
    assert main(["export", str(tmp_path / "runs" / "copied"), str(tmp_path / "exported")]) == 0
    runs = [str(tmp_path / "runs" / name) for name in losses]
    assert main(["report", *runs, "--output", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text(encoding="utf-8")
    assert re.search(r"model\.attention.*dense.*copied", page, flags=re.DOTALL)

    capsys.readouterr()
    overrides = ["model.config.vocab_size=64", "model.attention=copied"]
    assert main(["plan", str(recipe), *overrides, "--gpus", "1", "--gpu-memory", "1GiB", "--question-tokens", "9"]) == 2
    assert "model.attention: copied cannot be used: it has no backward pass on cuda; allowed: auto, split, dense" in (
        capsys.readouterr().err
    )
    load = Workload(30, 4, 3, 5, samples=2)
    setup = Setup(Buckets(1, 1, 1, 1), dtype="fp32", attention="copied", device="cpu")
    assert attention_masks(setup, load) == 7 * load.tokens
    row = "| `copied` | Dense under another name. | 4 to 8 | no | no | no | no | no | no | cpu | fp32 | none | none |"
    assert row in config_reference.reference()
    with pytest.raises(
        ConfigError, match=r"model\.attention: 'copie' is not allowed; allowed: auto, copied, dense, flex, leaky"
    ):
        load_recipe(recipe, ["model.attention=copie"])


def test_every_stage_trains_with_its_kernel(tmp_path: Path, new_kernels: Path, recipe_file: Callable[..., Path]) -> None:
    """A kernel without attention dropout, which `auto` prefers, runs the stage without dropout and no other."""
    counting = NEW_KERNEL.replace('devices = ("cpu",)', 'devices, precedence, auto_reason = ("cpu",), 9, "it counts"').replace(
        "    from rim", f"    open({str(tmp_path / 'calls')!r}, 'a').write('.')\n    from rim"
    )
    (new_kernels / "counting.py").write_text(counting)
    recipe, losses, calls = recipe_file(evaluation={"at_end": False}, parallel={"zero_stage": 0}), {}, {}
    for dropout in ("0", "0.1"):
        command = ["train", str(recipe), f"run.name=d{dropout}", f"curriculum.stage2.attention_dropout={dropout}"]
        out = run("fork", 1, ["tests/workers/with_kernels.py", *command], RIM_TEST_KERNELS=str(new_kernels)).stdout
        calls[dropout] = len((tmp_path / "calls").read_text())
        (tmp_path / "calls").unlink()
        lines = [line for line in read_metrics(tmp_path / "runs" / f"d{dropout}" / "metrics.jsonl") if line["kind"] == "train"]
        losses[dropout] = [line["loss"] for line in lines]
    assert "attention counting (it counts) in stage1, split (counting is out: it has no dropout" in out
    steps = len([line for line in lines if line["stage"] == "stage1"])
    assert 0 < steps < len(losses["0"])
    assert losses["0.1"][:steps] == losses["0"][:steps]
    assert losses["0.1"][steps] != losses["0"][steps]
    # A call a layer and micro-batch (of 300 tokens).
    stage2 = sum(round(line["tokens"] / line["packing_efficiency"] / 300) for line in lines if line["stage"] == "stage2")
    assert calls["0"] - calls["0.1"] == stage2 * TINY_MODEL["num_hidden_layers"]  # type: ignore[operator]


@pytest.mark.usefixtures("new_kernels")
@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("curriculum.stage2.attention_dropout=0.1", "it has no dropout, and attention_dropout is 0.1"),
        ("model.dtype=bf16", "it computes in fp32, and model.dtype is bf16"),
        ("model.config.hidden_size=64", "its kernels take heads of at most 8 channels, llama has 16 here"),
        ("memory.inside_block=bidirectional", "its blocks are causal inside, and memory.inside_block is bidirectional"),
        ("parallel.sequence=2", "it cannot run under parallel.sequence_mode ulysses"),
    ],
)
def test_a_new_kernel_refuses_what_it_does_not_declare(
    override: str, reason: str, recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(recipe_file()), "model.attention=copied", override]) == 2
    message = f"model.attention: copied cannot be used: {reason}; allowed: auto, split, dense"
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match=re.escape(message)):
        prepare_run(load_recipe(recipe_file(), ["model.attention=copied", override]))


@pytest.mark.usefixtures("new_kernels")
def test_a_kernel_that_forgets_the_mask_is_refused(recipe_file: Callable[..., Path]) -> None:
    """The proof of a family runs the kernel of the run."""
    assert [proof_kernel(name) for name in ("dense", "flex", "split", "leaky")] == ["dense", "split", "split", "leaky"]
    with pytest.raises(ModelError, match="llama: a packed row differs from its unrolled runs"):
        prepare_run(load_recipe(recipe_file(model={"attention": "leaky"})))


@pytest.mark.usefixtures("new_kernels")
def test_layers_are_refused_what_a_kernel_does_not_declare() -> None:
    """Where a family's configuration does not say what its layers ask for."""
    for family, name in (("Gemma 2", "sliding_window|softcap"), ("Mistral, sliding window", "sliding_window")):
        model = build(family)
        install_readout_loss(model)
        use_rim_attention(model, "copied")
        with (
            torch.no_grad(),
            pytest.raises(ModelError, match=f"attention with ({name}) is not supported by model.attention copied"),
        ):
            run_batch(model, pack_samples(random_samples(0)))


def test_json_of_a_plan_names_the_kernel(recipe_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["plan", str(recipe_file()), "model.config.vocab_size=64", "model.attention=split", "--gpus", "1", "--json"]
    assert main([*plan, "--gpu-memory", "1GiB", "--question-tokens", "9"]) == 0
    assert json.loads(capsys.readouterr().out)["as_written"]["attention"] == "split"
