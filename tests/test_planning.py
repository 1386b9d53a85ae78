"""The planner: parameters against transformers' own models, kept activations against autograd, arithmetic, refusals, speed."""

from __future__ import annotations

import importlib
import itertools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from ranks import ROOT, environment

from rim_dist.attention.registration import use_rim_attention
from rim_dist.cli import main
from rim_dist.config import Dropouts, LoraSection
from rim_dist.data.rows import pack
from rim_dist.data.samples import Readout, Row
from rim_dist.errors import ConfigError
from rim_dist.objective.forward import install_readout_loss, run_batch
from rim_dist.parallel.tensor import TensorRank, split_model
from rim_dist.planning.communication import Group, sent_bytes, transfer, transfers
from rim_dist.planning.links import INTERCONNECTS
from rim_dist.planning.memory import Buckets, Setup, estimate, layer_activations
from rim_dist.planning.request import make_planner, parse_memory
from rim_dist.planning.shape import FAMILIES, ModelShape, known_models, model_shape, read_shape
from rim_dist.planning.workload import Workload
from rim_dist.recipe import load_recipe

Make = Callable[..., Path]
GIB = 2**30
RECIPE = str(ROOT / "recipes" / "gsm8k-aug-llama-3.2-1b.yaml")
SIZES = {
    "vocab_size": 211,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "tie_word_embeddings": True},
    "llama, untied, biases": {**SIZES, "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
    "mistral": {**SIZES, "sliding_window": None},
    "qwen2": {k: v for k, v in SIZES.items() if k != "head_dim"},
    "qwen3": {**SIZES, "head_dim": 24},
    "smollm3": SIZES,
    "granite": SIZES,
    "starcoder2": {**SIZES, "sliding_window": None},
    "gpt2": {"vocab_size": 211, "n_embd": 96, "n_layer": 2, "n_head": 6, "n_positions": 512},
}
NO_TOKENS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
BUCKETS = Buckets(reduce=1_000_000, prefetch=1_000_000, persistence=100_000, reuse=1_000_000_000)


def shape_of(name: str, **changes: Any) -> ModelShape:
    return read_shape({"model_type": name.partition(",")[0], **CONFIGS[name], **changes}, name)


def build(name: str, device: str, **changes: Any) -> transformers.PreTrainedModel:
    model_type = name.partition(",")[0]
    with torch.device(device):
        config = transformers.AutoConfig.for_model(model_type, **{**CONFIGS[name], **changes}, **NO_TOKENS)
        return transformers.AutoModelForCausalLM.from_config(config)


def count(model: torch.nn.Module, trained: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained)


# ---- shapes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", known_models())
def test_shipped_shapes_have_the_parameters_of_transformers(name: str) -> None:
    fields = json.loads(resources.files("rim_dist.planning").joinpath("shapes", f"{name}.json").read_text())
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            transformers.AutoConfig.for_model(fields.pop("model_type"), **fields, **NO_TOKENS)
        )
    assert model_shape(name).parameters() == count(model)


def test_every_family_is_tried() -> None:
    assert {name.partition(",")[0] for name in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_of_every_family(name: str) -> None:
    shape = shape_of(name)
    assert shape.parameters() == count(build(name, "meta"))
    for tensor in (2,) if shape.family.splittable else ():
        model = build(name, "meta")
        split_model(model, TensorRank(0, tensor))
        assert shape.parameters(tensor=tensor) == count(model)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", "all-linear"), ("qwen3", ["q_proj", "down_proj"]), ("llama", r".*(q|v)_proj"), ("gpt2", "all-linear")],
)
def test_parameters_with_adapters(name: str, targets: Any) -> None:
    import peft

    def adapted() -> Any:
        model = build(name, "meta")
        rows = {"wte" if name == "gpt2" else "embed_tokens": [1, 2, 3]}
        if not model.config.tie_word_embeddings:
            rows["lm_head"] = [1, 2, 3]
        config = peft.LoraConfig(r=4, target_modules=targets, trainable_token_indices=rows, task_type="CAUSAL_LM")
        with torch.device("meta"):
            return peft.get_peft_model(model, config)

    tensors = shape_of(name).tensors(LoraSection(rank=4, target_modules=targets))
    model = adapted()
    assert sum(t.entries for t in tensors) == count(model)
    assert sum(t.entries for t in tensors if t.trained) == count(model, trained=True)


def test_adapters_of_some_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"target_modules: .* takes self_attn.q_proj in some layers only"):
        shape_of("llama").tensors(LoraSection(rank=4, target_modules=r".*\.0\..*_proj"))


def test_a_config_json_is_a_model(tmp_path: Path) -> None:
    config = transformers.AutoConfig.for_model("qwen3", **CONFIGS["qwen3"])
    config.save_pretrained(tmp_path)
    assert model_shape(str(tmp_path)).parameters() == model_shape(str(tmp_path / "config.json")).parameters()
    assert model_shape(str(tmp_path)).parameters() == count(build("qwen3", "meta"))


# ---- memory ------------------------------------------------------------------------------------------------


def kept_by_autograd(model: Any, load: Workload) -> int:
    """Bytes of all tensors that a forward pass keeps for the backward pass, parameters and buffers left out."""
    use_rim_attention(getattr(model, "get_base_model", lambda: model)(), "split")
    install_readout_loss(getattr(model, "get_base_model", lambda: model)())
    readouts = tuple(Readout(k, [1] * load.target, 1.0) for k in range(1, load.blocks + 1))
    row = Row([3] * load.question, load.blocks, load.block, readouts)
    batch = pack([row] * int(load.samples), [208, *[209] * load.memory, 210])
    own = {t.untyped_storage().data_ptr() for t in itertools.chain(model.parameters(), model.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = run_batch(model, batch)
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


@pytest.mark.usefixtures("plain_linear")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_kept_activations_are_what_autograd_keeps(name: str, dtype: str) -> None:
    """Of a layer, by the difference of three layers and two, to the byte."""
    load = Workload(question=30, blocks=4, memory=3, target=5, samples=2)
    layers = "n_layer" if name == "gpt2" else "num_hidden_layers"
    drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if name == "gpt2" else {}
    drops |= {"residual_dropout": 0.0, "embedding_dropout": 0.0} if name == "starcoder2" else {}
    precision = torch.float32 if dtype == "fp32" else torch.bfloat16
    two, three = (kept_by_autograd(build(name, "cpu", **{layers: n}, **drops).to(precision).train(), load) for n in (2, 3))
    setup = Setup(BUCKETS, dtype=dtype, attention="split", device="cpu")  # type: ignore[arg-type]
    assert layer_activations(shape_of(name), setup, load.tokens, load.tokens) == three - two


@pytest.mark.usefixtures("plain_linear")
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_kept_activations_with_adapters(targets: Any) -> None:
    import peft

    load = Workload(question=30, blocks=4, memory=3, target=5, samples=2)

    def adapted(layers: int) -> Any:
        config = peft.LoraConfig(
            r=4, target_modules=targets, trainable_token_indices={"embed_tokens": [208, 209, 210]}, task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(build("llama", "cpu", num_hidden_layers=layers), config).train()

    lora = LoraSection(rank=4, target_modules=targets)
    setup = Setup(BUCKETS, dtype="fp32", lora=lora, attention="split", device="cpu")
    two, three = (kept_by_autograd(adapted(n), load) for n in (2, 3))
    assert layer_activations(shape_of("llama"), setup, load.tokens, load.tokens) == three - two


def test_workload_counts_as_rows_do() -> None:
    load = Workload(question=30, blocks=4, memory=3, target=5, samples=2)
    row = Row([3] * 30, 4, 5, tuple(Readout(k, [1] * 5, 1.0) for k in range(1, 5)))
    assert (load.row, load.targets, load.pairs) == (len(row), 2 * row.targets, row.span().pairs)
    pause = Workload(question=30, blocks=4, memory=3, target=5, one_readout=True)
    row = Row([3] * 30, 4, 5, (Readout(4, [1] * 5, 1.0),))
    assert (pause.row, pause.targets, pause.pairs) == (len(row), row.targets, row.span().pairs)
    plain = Workload(question=30, blocks=0, memory=3, target=5)
    row = Row([3] * 30, 0, 5, (Readout(0, [1] * 5, 1.0),))
    assert (plain.row, plain.targets, plain.pairs) == (len(row), row.targets, row.span().pairs)


def states(shape: ModelShape, **changes: Any) -> dict[str, int]:
    return estimate(shape, Setup(BUCKETS, **changes), Workload(128, 8, 2, 16, rounds=4)).states


def test_zero_shards_what_it_says() -> None:
    shape = model_shape("llama-3.1-8b")
    parameters = shape.parameters()
    assert states(shape, zero_stage=0, dtype="fp32") == {"parameters": 4 * parameters, "optimizer": 8 * parameters}
    assert states(shape, zero_stage=1, data=8) == {"parameters": 2 * parameters, "optimizer": 12 * parameters // 8}
    assert states(shape, zero_stage=2, data=8) == states(shape, zero_stage=1, data=4, sequence=2)
    three = states(shape, zero_stage=3, data=8)
    small = sum(t.entries for t in shape.tensors() if t.size <= BUCKETS.persistence)
    assert three["parameters"] == 2 * parameters // 8 + 2 * small
    assert three["gradients"] == 2 * parameters // 8
    assert three["optimizer"] == 12 * parameters // 8
    off = estimate(shape, Setup(BUCKETS, data=8, offload=True), Workload(128, 8, 2, 16))
    assert off.host == (2 + 2 + 16) * parameters // 8
    assert off.states == {"parameters": 2 * small, "communication buckets": 2 * BUCKETS.reduce}


def test_memory_grows_and_shrinks_as_it_should() -> None:
    shape = model_shape("llama-3.1-8b")
    load = Workload(128, 8, 128, 16, samples=2, rounds=4)
    plain = Setup(BUCKETS, data=8)
    peak = estimate(shape, plain, load).peak_bytes
    for more in (replace(load, memory=256), replace(load, blocks=16), replace(load, question=512), replace(load, samples=3)):
        assert estimate(shape, plain, more).peak_bytes > peak
    for less in (
        replace(plain, tensor=2, data=4),
        replace(plain, sequence=2, data=4),
        replace(plain, activation_checkpointing=True),
        replace(plain, data=16),
        replace(plain, lora=LoraSection(rank=16)),
        replace(plain, offload=True),
    ):
        assert estimate(shape, less, load).peak_bytes < peak
    dropped = replace(plain, lora=LoraSection(rank=16), dropouts=Dropouts(lora=0.1), attention="split")
    assert estimate(shape, dropped, load).peak_bytes > estimate(shape, replace(dropped, dropouts=Dropouts()), load).peak_bytes
    # Llama has no dropout of hidden states.
    hidden = replace(dropped, dropouts=Dropouts(residual=0.1))
    assert estimate(shape, hidden, load).peak_bytes == estimate(shape, replace(dropped, dropouts=Dropouts()), load).peak_bytes
    recomputed, offloaded = (replace(plain, activation_checkpointing=True, activation_offload=off) for off in (False, True))
    assert estimate(shape, offloaded, load).peak_bytes < estimate(shape, recomputed, load).peak_bytes
    kept = [estimate(shape, replace(plain, sequence=s, data=8 // s), load).peak["activations"] for s in (1, 2, 4)]
    assert kept[1] == pytest.approx(2 * kept[2], rel=0.01)
    assert kept[0] / 2 < kept[1] < 0.53 * kept[0]  # an all-to-all brings the attention's output once more
    gathered = replace(plain, sequence=4, data=2, sequence_mode="allgather_kv")
    assert kept[2] < estimate(shape, gathered, load).peak["activations"] < kept[0] / 2


def test_what_was_measured_is_still_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest full run of benchmarks/planner.py: the formulas of now against the memory of then, within 15%."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    planner = importlib.import_module("planner")
    newest = max((ROOT / "benchmarks" / "results").glob("*-planner.json"))
    figures = json.loads(newest.read_text())["figures"]
    assert len(figures) >= 12
    for figure in figures:
        fields = figure["case"]
        case = planner.Case(**{**fields, "load": Workload(**fields["load"])})
        said = planner.predicted(case)
        for name, value in (("between", said.states_bytes), ("peak", said.peak_bytes)):
            assert (value + said.host) / figure["measured"][name] == pytest.approx(1, abs=0.15), (case, name)


# ---- what is sent ------------------------------------------------------------------------------------------


def test_volumes_of_zero() -> None:
    shape, link = model_shape("llama-3.1-8b"), INTERCONNECTS["nvlink+ib-400g"]
    parameters, part = shape.parameters(), 7 / 8
    load = Workload(128, 8, 2, 16, rounds=4)
    small = sum(t.entries for t in shape.tensors() if t.size <= BUCKETS.persistence)

    def sent(**changes: Any) -> float:
        return sent_bytes(transfers(shape, Setup(BUCKETS, data=8, **changes), load, link, 8))

    assert sent(zero_stage=0) == pytest.approx(2 * 2 * parameters * part)
    assert sent(zero_stage=1) == pytest.approx(3 * 2 * parameters * part)
    assert sent(zero_stage=2) == pytest.approx((2 * 4 + 1) * 2 * parameters * part)
    again = parameters - small - BUCKETS.reuse // 2
    assert sent(zero_stage=3) == pytest.approx(4 * 2 * ((parameters - small) + again + parameters) * part)
    assert transfers(shape, Setup(BUCKETS, zero_stage=3), load, link, 8) == []


def test_volumes_of_tensor_and_sequence_ranks() -> None:
    shape, link = model_shape("llama-3.1-8b"), INTERCONNECTS["nvlink+ib-400g"]
    load = Workload(128, 8, 128, 16, rounds=1)

    def sent(part: str, **changes: Any) -> float:
        return sent_bytes(transfers(shape, Setup(BUCKETS, zero_stage=1, **changes), load, link, 8), part)

    row = 2 * load.tokens * shape.hidden
    layers = shape.layers
    targets = 2 * load.targets * shape.hidden + 3 * 4 * load.targets
    assert sent("tensor", tensor=2) == pytest.approx((4 * layers + 1) * row + targets)
    assert sent("tensor", tensor=2, activation_checkpointing=True) == pytest.approx((5 * layers + 1) * row + targets)
    own = load.tokens / 2
    widths = 2 * shape.query_width + 2 * shape.kv_width
    assert sent("sequence", sequence=2) == pytest.approx(2 * layers * own * 2 * widths / 2)
    whole = 2 * load.tokens * 2 * shape.kv_width
    assert sent("sequence", sequence=2, sequence_mode="allgather_kv") == pytest.approx(2 * layers * whole / 2)
    # 16 ranks, 8 KV heads: each head goes to two ranks
    wide = sent("sequence", sequence=16)
    assert wide == pytest.approx(2 * layers * load.tokens / 16 * 2 * (2 * shape.query_width + 2 * 16 * 128) * 15 / 16)


def test_time_on_the_links() -> None:
    link = INTERCONNECTS["nvlink+ib-400g"]

    def seconds(ranks: int, stride: int) -> float:
        return transfer("zero", "", "all-gather", Group(ranks, stride), 1, 8e9, link, 8).seconds

    inside = seconds(8, 1)
    assert inside == pytest.approx(8e9 * 7 / 8 / 450e9, rel=0.01)
    assert seconds(128, 1) == pytest.approx(8e9 * 127 / 128 / 450e9, rel=0.1)  # eight adapters a node keep up with it
    assert seconds(2, 8) == pytest.approx(8e9 / 2 / 50e9, rel=0.01)  # one of them does not
    assert inside < seconds(16, 1) < seconds(2, 8)
    slow = transfer("zero", "", "all-gather", Group(2, 8), 1, 8e9, INTERCONNECTS["ethernet-25g"], 8)
    assert slow.seconds == pytest.approx(8e9 / 2 / (3.125e9 / 8), rel=0.01)  # eight groups share the node's only adapter


# ---- recommendation ----------------------------------------------------------------------------------------


def planner(*overrides: str, gpus: int = 8, gib: float = 80, model: str | None = None, **more: Any) -> Any:
    return make_planner(load_recipe(RECIPE, overrides), gpus, int(gib * GIB), model, **more)


@pytest.mark.parametrize("gpus", [8, 64, 1024])
@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b"])
def test_every_shape_is_planned_quickly(model: str, gpus: int) -> None:
    start = time.process_time()
    plan = planner("memory.tokens_per_block=512", gpus=gpus, model=model)
    chosen, candidates = plan.recommend()
    assert time.process_time() - start < 10
    assert chosen.fits
    assert chosen.memory.peak_bytes <= 0.9 * 80 * GIB
    assert chosen.setup.ranks == gpus
    assert all(c.setup.ranks == gpus and c.setup.data <= 128 for c in candidates)
    recipe = load_recipe(RECIPE, ["memory.tokens_per_block=512", *chosen.overrides])
    again = make_planner(recipe, gpus, 80 * GIB, model).as_written()
    assert again.memory.peak_bytes == chosen.memory.peak_bytes
    assert again.fits


def test_degrees_follow_the_need() -> None:
    easy, _ = planner().recommend()
    s = easy.setup
    assert (s.tensor, s.sequence, s.activation_checkpointing, s.offload) == (1, 1, False, False)
    full = planner("model.lora=null", model="llama-3.1-70b")
    with pytest.raises(ConfigError, match=r"fits nowhere on 8 GPUs.*Closest: .*GiB.*It would fit with .*GPUs or adapters"):
        full.recommend()
    many, _ = planner("model.lora=null", gpus=64, model="llama-3.1-70b").recommend()
    assert many.setup.zero_stage == 3 or many.setup.tensor == 8
    long, _ = planner("memory.tokens_per_block=8192", model="llama-3.1-8b").recommend()
    assert long.setup.sequence > 1 or long.setup.activation_checkpointing


def test_largest_memory_is_the_edge() -> None:
    plan = planner(gpus=8, gib=40, model="llama-3.1-8b")
    chosen, _ = plan.recommend()
    setup = replace(chosen.setup, activation_checkpointing=False, activation_offload=False)
    largest = plan.largest_memory(setup)
    assert plan.fits_with(setup, plan.row.blocks, largest)
    assert not plan.fits_with(setup, plan.row.blocks, largest + 1)
    small = planner(gpus=8, model="smollm2-135m", gib=400)  # here the model's positions end first
    blocks = small.largest_blocks(small.recommend()[0].setup)
    assert 128 + blocks * 4 + 16 <= 8192 < 128 + (blocks + 1) * 4 + 16


def test_fields_the_recipe_sets_stay() -> None:
    plan = planner("parallel.zero_stage=1", "optimizer.micro_batch_tokens=4096", gpus=16, model="llama-3.1-8b")
    added = plan.fill_in()
    assert {text.partition("=")[0] for text in added} == {
        "parallel.tensor",
        "parallel.sequence",
        "parallel.offload",
        "model.activation_checkpointing",
        "model.activation_offload",
    }
    with pytest.raises(ConfigError, match=r"does not fit 16 GPUs .*with what the recipe sets: .*parallel.zero_stage"):
        planner("parallel.zero_stage=0", "model.lora=null", gpus=16, model="llama-3.1-70b").fill_in()


def test_other_methods(tmp_path: Path) -> None:
    assert planner("method=direct").row == Workload(128, 0, 2, 16)
    assert planner("method=pause").row.one_readout
    assert planner("method=cot").row.target == 13 * 15 + 16  # end-of-text once, at the end of the chain
    with pytest.raises(ConfigError, match="method: coconut cannot be planned"):
        planner("method=coconut")


# ---- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus: 0 is not allowed"),
        (["--gpu-memory", "80"], "--gpu-memory: '80' is not a size"),
        (["--gpu-memory", "0GiB"], "'0GiB' is not a size"),
        (["--gpu-memory", "80Gib"], "'80Gib' is not a size"),
        (["--gpus", "12"], "--gpus: 12 GPUs are no whole nodes of 8"),
        (["--interconnect", "string"], "--interconnect: 'string' is not known; known: nvlink"),
        (["--model", "llama-4"], "--model: 'llama-4' is not known and no file; known: gpt2, llama-3.1-405b"),
        (["--question-tokens", "0"], "--question-tokens: 0 is not allowed"),
        (["--question-tokens", "140000"], "need 140068 positions; llama-3.2-1b has 131072"),
        (["--gpus", "16384", "--model", "gpt2"], "optimizer.global_batch: 128 samples cannot be spread over 16384 GPUs"),
    ],
)
def test_impossible_wishes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--gpus": "8", "--gpu-memory": "80GiB", **dict(zip(arguments[::2], arguments[1::2], strict=True))}
    assert main(["plan", RECIPE, *itertools.chain(*given.items())]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a JSON file"),
        ("[]", "is a JSON object"),
        ('{"model_type": "mixtral"}', "model_type 'mixtral' cannot be planned; allowed: llama, mistral"),
        ('{"model_type": "llama", "num_attention_heads": 4}', "hidden_size: None is not allowed"),
    ],
)
def test_broken_config_json(content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(content)
    assert main(["plan", RECIPE, "--gpus", "1", "--gpu-memory", "80GiB", "--model", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_recipes_models(recipe_file: Make, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--gpus", "2", "--gpu-memory", "1GiB"]
    assert main(["plan", str(recipe_file()), *arguments]) == 2
    assert "model.config.vocab_size: is required" in capsys.readouterr().err
    assert main(["plan", str(recipe_file()), "model.config.vocab_size=64", *arguments, "--question-tokens", "9", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["model"]["parameters"] > 0
    assert said["as_written"]["data"] == 2
    recipe = recipe_file(model={"config": None, "init_from": "someone/else"})
    assert main(["plan", str(recipe), *arguments]) == 2
    assert "model.init_from: someone/else: its config.json is not on this machine" in capsys.readouterr().err


def test_tables_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", RECIPE, "memory.tokens_per_block=1024", "--gpus", "16", "--gpu-memory", "40GiB", "--interconnect"]
    assert main([*arguments, "ethernet-25g", "--output", str(tmp_path / "plan")]) == 0
    out = capsys.readouterr().out
    for word in (
        "recommended: tensor",
        "recipe as it is",
        "optimizer.micro_batch_tokens: 8192 tokens hold no row",
        "all-gather",
    ):
        assert word in out
    for word in ("Memory of a GPU", "Sent by a GPU", "Largest memory blocks", "keys and values"):
        assert word in out
    said = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert said["recommended"]["peak_total_bytes"] == sum(said["recommended"]["peak_bytes"].values())
    assert said["recommended"]["peak_total_bytes"] <= said["cluster"]["usable_bytes"]
    assert (tmp_path / "plan" / "plan.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    assert main([*arguments, "ib-200g", "--output", str(tmp_path / "file")]) == 2
    assert "--output:" in capsys.readouterr().err


def test_neither_torch_nor_deepspeed_is_loaded() -> None:
    code = (
        "import sys; from rim_dist.cli import main\n"
        f"status = main(['plan', {RECIPE!r}, '--gpus', '1024', '--gpu-memory', '80GiB', '--model', 'llama-3.1-405b'])\n"
        "print('loaded:', [m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules], status)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "loaded: [] 0"


def test_submit_fills_in_degrees(recipe_file: Make, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--dry-run", "--nodes", "2", "--ranks-per-node", "8", "--gpu-memory"]
    assert main(["submit", RECIPE, "model.lora=null", "data.path=x", *flags, "40GiB"]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("set -- "))
    assert re.search(r"model.lora=null data.path=x parallel.tensor=\d+ parallel.sequence=\d+ .*parallel.offload=", line)
    assert "parallel.zero_stage" not in line  # the recipe says it
    assert main(["submit", RECIPE, *flags, "40"]) == 2
    assert "--gpu-memory: '40' is not a size" in capsys.readouterr().err


def test_sizes_have_units() -> None:
    assert parse_memory("80GiB") == 80 * 2**30
    assert parse_memory("1.5 TB") == 1_500_000_000_000
