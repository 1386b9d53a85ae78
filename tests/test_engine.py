"""The engine in one process: accumulation, the reset at the stage switch, dropout, restricted loading."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from conftest import TINY_MODEL
from deepspeed.utils import safe_get_full_optimizer_state
from families import FAMILIES
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from rim_dist.checkpoint.start import model_of
from rim_dist.config import Dropouts
from rim_dist.data.loader import BatchLoader, plan_stages
from rim_dist.model.dropout import set_dropout
from rim_dist.model.proof import dropout_kinds
from rim_dist.objective.forward import run_batch
from rim_dist.parallel.launch import Process, join, leave
from rim_dist.parallel.zero import compose, keep_no_gathered_weights
from rim_dist.recipe import load_recipe
from rim_dist.training.engine import Engine, restricted_loading
from rim_dist.training.trainer import prepare_run

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def process() -> Iterator[Process]:
    before = dict(os.environ)
    yield join(60)
    leave()
    for name in set(os.environ) - set(before):
        del os.environ[name]


def steps(engine: Engine, loader: BatchLoader, plans: list, stage: int, count: int) -> None:
    for step in range(count):
        rank_batch = loader.rank_batch(plans[stage], step)
        for i, batch in enumerate(rank_batch.micro_batches):
            engine.forward_backward(batch, 1.0 / rank_batch.weight, last=i == len(rank_batch.micro_batches) - 1)
        engine.step(1e-3)


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in engine.module.named_parameters()}


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_stage_switch_is_a_fresh_optimizer(process: Process, recipe_file: Make, zero: int) -> None:
    """Steps after `begin_stage` equal, bit for bit, those of a new engine built on the same weights."""
    recipe = load_recipe(recipe_file(parallel={"zero_stage": zero}, optimizer={"weight_decay": 0.1}))
    requirements, data = prepare_run(recipe)
    plans = plan_stages(recipe, len(data))
    loader = BatchLoader(recipe, data, requirements.tokens, 0, 1)
    config = compose(recipe, 32)
    first = Engine(recipe, model_of(recipe, requirements), config, process)
    steps(first, loader, plans, 0, 3)
    middle = weights(first)
    model = model_of(recipe, requirements)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(middle[name])
    first.begin_stage(Dropouts())
    steps(first, loader, plans, 1, 3)
    second = Engine(recipe, model, config, process)
    steps(second, loader, plans, 1, 3)
    for (name, a), b in zip(weights(first).items(), weights(second).values(), strict=True):
        assert torch.equal(a, b), name
        assert not torch.equal(a, middle[name]), name


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_accumulation_does_not_change_the_step(process: Process, recipe_file: Make, zero: int) -> None:
    norms = []
    for tokens in (70, 150, 8192):
        recipe = load_recipe(recipe_file(parallel={"zero_stage": zero}, optimizer={"micro_batch_tokens": tokens}))
        requirements, data = prepare_run(recipe)
        loader = BatchLoader(recipe, data, requirements.tokens, 0, 1)
        engine = Engine(recipe, model_of(recipe, requirements), compose(recipe, 32), process)
        rank_batch = loader.rank_batch(plan_stages(recipe, len(data))[0], 0)
        for i, batch in enumerate(rank_batch.micro_batches):
            engine.forward_backward(batch, 1.0 / rank_batch.weight, last=i == len(rank_batch.micro_batches) - 1)
        norms.append(engine.step(1e-3))
    assert norms[0] == pytest.approx(norms[2], rel=1e-5)
    assert norms[1] == pytest.approx(norms[2], rel=1e-5)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gradients_of_a_16_bit_model_are_added_up_in_fp32(process: Process, recipe_file: Make, zero: int) -> None:
    """AdamW gets, bit for bit, the fp32 sum of the bf16 gradients of all micro-batches; asked for, their bf16 sum."""
    given = {"micro_batch_tokens": 70, "gradient_clipping": 0, "beta1": 0.0}  # the first moment is the gradient
    path = recipe_file(model={"dtype": "bf16"}, parallel={"zero_stage": zero}, optimizer=given)
    for accumulated in (torch.float32, torch.bfloat16):
        half = accumulated == torch.bfloat16
        recipe = load_recipe(path, ["optimizer.grad_accum_dtype=model"] if half else [])
        requirements, data = prepare_run(recipe)
        engine = Engine(recipe, model_of(recipe, requirements), compose(recipe, 32), process)
        plain = model_of(recipe, requirements)
        for parameter in plain.parameters():  # rotary frequencies stay fp32
            parameter.data = parameter.data.to(torch.bfloat16)
        rank_batch = BatchLoader(recipe, data, requirements.tokens, 0, 1).rank_batch(plan_stages(recipe, len(data))[0], 0)
        assert len(rank_batch.micro_batches) > 3
        sums: dict[str, torch.Tensor] = {}
        losses = []
        for i, batch in enumerate(rank_batch.micro_batches):
            scale = 1.0 / rank_batch.weight
            loss, _ = run_batch(plain, batch, gradient_scale=scale)
            (loss * scale).backward()
            for name, parameter in plain.named_parameters():
                gradient = parameter.grad.to(accumulated)
                sums[name] = sums[name] + gradient if name in sums else gradient
                parameter.grad = None
            last = i == len(rank_batch.micro_batches) - 1
            losses.append((engine.forward_backward(batch, scale, last=last).weighted_sum, loss.detach()))
        norm = engine.step(1e-3)
        assert all(torch.equal(*pair) for pair in losses)
        for name, parameter in engine.module.named_parameters():
            found = safe_get_full_optimizer_state(parameter, "exp_avg").view_as(sums[name])
            assert torch.equal(found, sums[name].float()), name
        assert norm == pytest.approx(float(torch.cat([s.float().flatten() for s in sums.values()]).norm()), rel=1e-5)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_fp16_has_the_scale_of_the_gradient(process: Process, recipe_file: Make, zero: int) -> None:
    """A gradient too small for fp16 without the loss scale: the norm, and what AdamW gets, are those of fp32."""
    small, found = 1e-6, {}
    for dtype in ("fp32", "fp16"):
        recipe = load_recipe(
            recipe_file(
                model={"dtype": dtype, "config": {**TINY_MODEL, "tie_word_embeddings": False}},
                parallel={"zero_stage": zero},
                optimizer={"gradient_clipping": 0, "micro_batch_tokens": 8192, "beta1": 0.0},
            )
        )
        requirements, data = prepare_run(recipe)
        engine = Engine(recipe, model_of(recipe, requirements), compose(recipe, 32), process)
        rank_batch = BatchLoader(recipe, data, requirements.tokens, 0, 1).rank_batch(plan_stages(recipe, len(data))[0], 0)
        engine.forward_backward(rank_batch.micro_batches[0], small / rank_batch.weight, last=True)
        norm = engine.step(1e-3)
        moments = [state["exp_avg"].flatten() for state in engine._inner_optimizer().state.values()]
        found[dtype] = norm, float(torch.cat(moments).float().norm())
    assert found["fp32"][0] == pytest.approx(found["fp32"][1], rel=1e-5)
    assert found["fp16"] == pytest.approx(found["fp32"], rel=1e-2)


def test_dropout_of_a_stage_reaches_every_kind(process: Process, recipe_file: Make) -> None:
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    places = [Dropouts(attention=0.3), Dropouts(residual=0.3)]
    for config, dropping in ((gpt2, places), (dict(TINY_MODEL), places[:1])):
        recipe = load_recipe(recipe_file(model={"config": config}))
        requirements, data = prepare_run(recipe)
        engine = Engine(recipe, model_of(recipe, requirements), compose(recipe, 32), process)
        batch = (
            BatchLoader(recipe, data, requirements.tokens, 0, 1)
            .rank_batch(plan_stages(recipe, len(data))[0], 0)
            .micro_batches[0]
        )

        def loss(seed: int, engine: Engine = engine, batch: object = batch) -> float:
            torch.manual_seed(seed)
            return float(engine.forward_backward(batch, 1.0, last=True).weighted_sum.detach())  # type: ignore[arg-type]

        engine.begin_stage(Dropouts())
        assert loss(0) == loss(1)
        for dropouts in dropping:
            engine.begin_stage(dropouts)
            assert loss(0) == loss(0)
            assert loss(0) != loss(1)


def probabilities(model: torch.nn.Module) -> dict[str, float]:
    """Every dropout of a model."""
    found = {name: module.p for name, module in model.named_modules() if isinstance(module, torch.nn.Dropout)}
    for path, module in model.named_modules():
        found |= {f"{path}.{name}": v for name, v in vars(module).items() if "drop" in name and isinstance(v, float)}
    return found


# A family, and the fields of its configuration for dropout of attention weights and of hidden states.
DROPOUT_FIELDS = {
    "GPT-2": (["attn_pdrop"], ["embd_pdrop", "resid_pdrop"]),
    "GPT-NeoX": (["attention_dropout"], ["hidden_dropout"]),
    "Llama": (["attention_dropout"], []),
    "OPT": (["attention_dropout"], ["dropout"]),
    "Phi": (["attention_dropout"], ["embd_pdrop", "resid_pdrop"]),
    "Starcoder2": (["attention_dropout"], ["embedding_dropout", "residual_dropout"]),
}


@pytest.mark.parametrize("family", DROPOUT_FIELDS)
def test_dropout_by_place_is_the_familys_own(family: str) -> None:
    """Each place gets what transformers gives it by the fields of the family's configuration, adapters theirs by peft."""
    attention, residual = DROPOUT_FIELDS[family]
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    own = probabilities(model)
    assert own
    for dropouts in (Dropouts(attention=0.25), Dropouts(residual=0.125), Dropouts(0.25, 0.125, 0.5)):
        config = copy.deepcopy(FAMILIES[family])
        for fields, value in ((attention, dropouts.attention), (residual, dropouts.residual)):
            for field in fields:
                setattr(config, field, value)
        set_dropout(model, dropouts, dropout_kinds(FAMILIES[family])[0])
        assert probabilities(model) == probabilities(AutoModelForCausalLM.from_config(config))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear"))
    set_dropout(wrapped, Dropouts(lora=0.5), dropout_kinds(FAMILIES[family])[0])
    found = probabilities(wrapped)
    assert {name for name, p in found.items() if p} == {name for name in found if ".lora_dropout." in name} != set()
    assert set(found.values()) == {0.0, 0.5}


class _Evil:
    def __reduce__(self) -> tuple:
        return (os.system, ("true",))


def test_loading_runs_no_code(tmp_path: Path) -> None:
    torch.save({"x": _Evil()}, tmp_path / "evil.pt")
    with restricted_loading(), pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        torch.load(tmp_path / "evil.pt", weights_only=False)
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.usefixtures("plain_linear")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_no_gathered_weight_is_kept_for_the_backward_pass(bias: bool, trained: bool) -> None:
    """Values that ZeRO-3 lets go of after a layer's forward pass are freed; gathered again, gradients are the same."""
    torch.manual_seed(0)
    layer, hidden = torch.nn.Linear(6, 4, bias=bias), torch.randn(1, 3, 6, requires_grad=True)
    layer.weight.requires_grad_(trained)
    wanted = torch.autograd.grad(layer(hidden).square().sum(), [hidden, *([layer.weight] if trained else [])])
    values = layer.weight.detach().clone()
    layer.weight.ds_id = 0  # ZeRO-3's mark
    for hold in (nullcontext, keep_no_gathered_weights):
        layer.weight.data = torch.cat([torch.zeros(5), values.flatten()])[5:].view(4, 6)  # a part of a gathered buffer
        with hold():
            loss = layer(hidden).square().sum()
        gathered = StorageWeakRef(layer.weight.untyped_storage())
        layer.weight.data = torch.empty(0)
        assert gathered.expired() == (hold is keep_no_gathered_weights)
    layer.weight.data = values.clone()
    got = torch.autograd.grad(loss, [hidden, *([layer.weight] if trained else [])])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
