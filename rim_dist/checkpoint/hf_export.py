"""From a checkpoint to a plain HF folder that transformers, and every server, runs without rim_dist."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import rim_dist
from rim_dist.checkpoint.store import ENGINE, MODEL, TrainingState, find_checkpoint, read_recipe, read_state
from rim_dist.config import Recipe, dump_recipe
from rim_dist.errors import CheckpointError
from rim_dist.evaluation.generation import generation_config
from rim_dist.memory import MemoryTokens, add_memory_tokens

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LICENCE_NOTE = "The licence of the base model and of the training data applies; this card does not grant one."


def trained_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All parameters and buffers of a checkpoint in fp32 (the optimizer's own copy where there is one), by name."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    from rim_dist.training.engine import restricted_loading

    weights: dict[str, torch.Tensor] = {}
    with restricted_loading():
        zero_stage = read_recipe(checkpoint).parallel.zero_stage
        if zero_stage < 3:
            # The module itself is whole here; zero_to_fp32 leaves out frozen parameters with ZeRO-1 in bf16.
            state = torch.load(checkpoint / ENGINE / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=True)
            weights = {name: tensor.float() for name, tensor in state["module"].items()}
        if zero_stage > 0:
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                weights |= get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), tag=ENGINE)
    return weights


def load_trained_model(checkpoint: Path) -> PreTrainedModel:
    """The trained model on the CPU in fp32, LoRA merged. Every tensor must be there by name and shape.

    Raises CheckpointError naming missing, surplus or misshapen tensors.
    """
    from rim_dist.model import add_adapters  # that module starts from checkpoints and so imports this one

    recipe = read_recipe(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / MODEL)
    tokens = add_memory_tokens(tokenizer, recipe.memory)
    config = AutoConfig.from_pretrained(checkpoint / MODEL, trust_remote_code=recipe.model.trust_remote_code)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code).float()
    adapted: Any = add_adapters(model, recipe, tokens) if recipe.model.lora else model
    _load_strictly(adapted, trained_weights(checkpoint), checkpoint)
    return adapted.merge_and_unload() if recipe.model.lora else model


def _load_strictly(model: torch.nn.Module, weights: dict[str, torch.Tensor], checkpoint: Path) -> None:
    expected = model.state_dict()
    # Tied parameters are one tensor under several names; a checkpoint may hold any one of them.
    groups: dict[int, list[str]] = {}
    for name, tensor in expected.items():
        groups.setdefault(tensor.data_ptr(), []).append(name)
    for names in groups.values():
        present = [name for name in names if name in weights]
        for name in names:
            if present and name not in weights:
                weights[name] = weights[present[0]]
    missing = sorted(set(expected) - set(weights))
    surplus = sorted(set(weights) - set(expected))
    misshapen = [n for n in expected if n in weights and weights[n].shape != expected[n].shape]
    for what, names in (("missing", missing), ("unexpected", surplus), ("of another shape", misshapen)):
        if names:
            raise CheckpointError(f"{checkpoint}: {len(names)} tensors {what}, first {names[0]}")
    model.load_state_dict(weights, strict=True)


def export_checkpoint(source: str | Path, out: str | Path) -> Path:
    """Write the checkpoint meant by `source` as a plain HF folder `out` (safetensors, tokenizer, chat template, card).

    Written beside and renamed, so that `out` is whole or absent. Raises CheckpointError if `out` exists and is not an
    empty folder or an earlier export, or if the checkpoint is incomplete.
    """
    checkpoint, out = find_checkpoint(source), Path(out)
    check_export_target(out)
    recipe, state = read_recipe(checkpoint), read_state(checkpoint)
    if not recipe.exportable:
        raise CheckpointError(
            f"{checkpoint}: trained with memory.inside_block={recipe.memory.inside_block}, which no ordinary server can run; "
            "only causal blocks can be exported"
        )
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / MODEL)
    model = load_trained_model(checkpoint)
    model = model.to(DTYPES[recipe.model.dtype])
    model.generation_config = generation_config(tokenizer)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        tokens = add_memory_tokens(tokenizer, recipe.memory)
        about = _about(recipe, state, tokens)
        (partial / "rim_dist.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(_card(recipe, about), encoding="utf-8")
        if out.exists():
            shutil.rmtree(out)
        os.replace(partial, out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"{out}: cannot be written ({error.strerror or error})") from None
    return out


def check_export_target(out: Path) -> None:
    """Refuse to write over a folder that is not an earlier export."""
    if out.exists() and not (out / "rim_dist.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: already holds something else; choose another folder")


def _about(recipe: Recipe, state: TrainingState, tokens: MemoryTokens) -> dict[str, Any]:
    return {
        "rim_dist": rim_dist.__version__,
        "method": recipe.method,
        "blocks": recipe.memory.blocks if recipe.method == "rim" else 0,
        "tokens_per_block": recipe.memory.tokens_per_block,
        "memory_token_ids": list(tokens.ids),
        "stage": state.stage,
        "step": state.step,
        "samples": state.samples,
        "global_batch": recipe.optimizer.global_batch,
        "synthetic_steps": recipe.data.synthetic.max_steps,
    }


def _card(recipe: Recipe, about: dict[str, Any]) -> str:
    blocks = (
        f"The chat template appends {about['blocks']} memory blocks of {about['tokens_per_block']} + 2 tokens to the prompt; "
        "the template argument `rim_blocks` changes their number for one request.\n"
        if about["blocks"]
        else "This is a baseline without memory blocks.\n"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rim_dist, {recipe.method}]
---

# {recipe.run.name}

Trained with rim_dist {about["rim_dist"]}, method `{recipe.method}`: {about["step"]} optimizer steps of
{about["global_batch"]} samples, last stage `{about["stage"]}`. Base: `{recipe.model.init_from or "from scratch"}`.
{blocks}{_LICENCE_NOTE}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "..."}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**prompt)[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
```

## Resolved recipe

```yaml
{dump_recipe(recipe)}```
"""
