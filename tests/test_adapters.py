"""`merge-lora` against the model that peft trained: every kind of adapter is merged as peft merges it, or refused by name."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_pretrained import plain, saved, tied
from transformers import AutoModelForCausalLM

from rim_dist.cli import main

__all__ = ["plain"]  # a fixture

ADAPTER = "adapter_model.safetensors"
LAYERS = ["q_proj", "v_proj", "down_proj"]
# What is changed in a LoRA configuration, and whether the merge goes through the files tensor by tensor.
KINDS: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, True),
    "rsLoRA": ({"use_rslora": True}, True),
    "ranks and alphas by layer": (
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3}, "alpha_pattern": {"v_proj": 5}, "use_rslora": True},
        True,
    ),
    "excluded modules": ({"target_modules": "all-linear", "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]}, True),
    "some layers": ({"layers_to_transform": [1]}, True),
    "gaussian": ({"init_lora_weights": "gaussian"}, True),
    "orthogonal": ({"init_lora_weights": "orthogonal"}, True),
    "EVA": ({"init_lora_weights": "eva"}, True),
    "rows of the vocabulary": ({"trainable_token_indices": {"embed_tokens": [3, 90]}}, True),
    "PiSSA": ({"init_lora_weights": "pissa"}, False),
    "OLoRA": ({"init_lora_weights": "olora"}, False),
    "DoRA": ({"use_dora": True}, False),
    "biases": ({"bias": "all"}, False),
    "a saved head": ({"modules_to_save": ["lm_head"]}, False),
    "saved embeddings": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "an adapter on the embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, False),
}


def adapt(base: Path, out: Path, config: peft.PeftConfig) -> dict[str, torch.Tensor]:
    """Write an adapter as a training with peft leaves it; returns the tensors of the trained model, merged."""
    torch.manual_seed(1)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    model.save_pretrained(out)
    return model.merge_and_unload().state_dict()


def merged(adapter: Path, base: Path, out: Path) -> dict[str, torch.Tensor]:
    assert main(["convert", "merge-lora", str(adapter), str(base), str(out), "--dtype", "fp32"]) == 0
    return AutoModelForCausalLM.from_pretrained(out).state_dict()


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_merged_as_trained(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    settings, streamed = KINDS[kind]
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": LAYERS, "task_type": "CAUSAL_LM", **settings})
    expected = adapt(plain, tmp_path / "adapter", config)
    before = load_file(plain / "model.safetensors")
    assert any(name not in before or not torch.equal(tensor, before[name]) for name, tensor in expected.items())
    assert_close(merged(tmp_path / "adapter", plain, tmp_path / "out"), expected)
    assert ("merged by peft" in capsys.readouterr().err) is not streamed


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["IA3", "experts", "a tied head", "a saved head of a tied base"])
def test_other_bases_and_adapters(plain: Path, tmp_path: Path, kind: str) -> None:
    base = tmp_path / "base"
    common = {"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
    config: peft.PeftConfig
    if kind == "IA3":
        base, config = plain, peft.IA3Config(task_type="CAUSAL_LM", target_modules=LAYERS, feedforward_modules=["down_proj"])
    elif kind == "experts":
        saved(FAMILIES["Qwen3-MoE"], base)
        config = LoraConfig(**common, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    else:
        tied(plain, base, separate=False)
        targets = {"target_modules": ["lm_head", "q_proj"]} if kind == "a tied head" else {"modules_to_save": ["lm_head"]}
        config = LoraConfig(**{**common, "target_modules": ["q_proj"], **targets})
    expected = adapt(base, tmp_path / "adapter", config)
    assert_close(merged(tmp_path / "adapter", base, tmp_path / "out"), expected)


@pytest.mark.filterwarnings("ignore")
def test_adapters_that_are_refused(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One tensor too few or too many, of another shape, on layers that are not there, and kinds that cannot be merged."""
    config = LoraConfig(r=4, target_modules=LAYERS, task_type="CAUSAL_LM")
    adapt(plain, tmp_path / "good", config)
    tensors = load_file(tmp_path / "good" / ADAPTER)
    first = min(tensors)

    def refusal(adapter: Path, base: Path = plain) -> str:
        assert main(["convert", "merge-lora", str(adapter), str(base), str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    def tampered(name: str, change: dict[str, torch.Tensor | None]) -> Path:
        shutil.copytree(tmp_path / "good", tmp_path / name)
        left = {n: t for n, t in {**tensors, **change}.items() if t is not None}
        save_file(left, tmp_path / name / ADAPTER, {"format": "pt"})
        return tmp_path / name

    assert f"1 tensors missing, first {first}" in refusal(tampered("few", {first: None}))
    assert "1 tensors unexpected, first extra" in refusal(tampered("many", {"extra": torch.zeros(2)}))
    assert f"{first} does not fit the base's" in refusal(tampered("thin", {first: tensors[first][:, :5].contiguous()}))
    saved(FAMILIES["GPT-2"], tmp_path / "gpt2")
    assert "peft does not merge it (Target modules" in refusal(tmp_path / "good", tmp_path / "gpt2")
    adapt(plain, tmp_path / "dora", LoraConfig(r=4, target_modules=LAYERS, task_type="CAUSAL_LM", use_dora=True))
    whole = load_file(tmp_path / "dora" / ADAPTER)
    magnitude = next(name for name in whole if "magnitude" in name)
    save_file({n: t for n, t in whole.items() if n != magnitude}, tmp_path / "dora" / ADAPTER, {"format": "pt"})
    assert "1 tensors missing, first" in refusal(tmp_path / "dora")
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(plain), prompts).save_pretrained(tmp_path / "prompts")
    assert "PROMPT_TUNING puts tokens before a prompt; there is nothing to merge" in refusal(tmp_path / "prompts")
    for what, setting in (("bias", {"lora_bias": True}), ("layers", {"layer_replication": [(0, 2), (1, 2)]})):
        config = LoraConfig(r=4, target_modules=LAYERS, task_type="CAUSAL_LM", **setting)
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(plain), config).save_pretrained(tmp_path / what)
        assert next(iter(setting)) in refusal(tmp_path / what)
    for start in ("corda", "loftq"):
        file = tmp_path / "good" / "adapter_config.json"
        file.write_text(file.read_text().replace('"init_lora_weights": true', f'"init_lora_weights": "{start}"'))
        assert start in refusal(tmp_path / "good")
        file.write_text(file.read_text().replace(f'"{start}"', "true"))
    (tmp_path / "good" / "adapter_config.json").write_text('{"peft_type": "FUTURE"}')
    assert "not a PEFT adapter" in refusal(tmp_path / "good")
