"""The description in every export: rim_dist.json for programs, the model card (README.md) for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import rim_dist
from rim_dist.checkpoint.store import TrainingState
from rim_dist.config import Recipe
from rim_dist.errors import CheckpointError
from rim_dist.methods import method_of
from rim_dist.recipe import dump_recipe, recipe_tree, validate_recipe
from rim_dist.tokens import MemoryTokens

EXPORT_INFO = "rim_dist.json"
_LICENCE_NOTE = "The licence of the base model and of the training data applies; this card does not grant one."


def export_info(
    recipe: Recipe, state: TrainingState, tokens: MemoryTokens, rows: int, vocabulary: int, dtype: str
) -> dict[str, Any]:
    """The content of rim_dist.json. `rows`: of the embedding; `vocabulary`: tokens of the tokenizer."""
    return {
        "rim_dist": rim_dist.__version__,
        "method": recipe.method,
        "blocks": method_of(recipe).prompt_blocks,
        "thoughts": method_of(recipe).thoughts,
        "tokens_per_block": recipe.memory.tokens_per_block,
        "memory_token_ids": list(tokens.ids),
        **{field: getattr(state, field) for field in ("stage", "stage_step", "step", "samples", "ranks")},
        "global_batch": recipe.optimizer.global_batch,
        "synthetic_steps": recipe.data.synthetic.max_steps,
        "dtype": dtype,
        "embedding_rows": rows,
        "vocabulary": vocabulary,
        "recipe": recipe_tree(recipe),
    }


def read_export_info(folder: Path) -> dict[str, Any]:
    """rim_dist.json of an HF folder; empty if it has none. Raises CheckpointError if it cannot be read."""
    path = folder / EXPORT_INFO
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def recipe_of_export(folder: Path) -> Recipe:
    """The recipe in a RiM export. Raises CheckpointError if the folder is none."""
    try:
        return validate_recipe(read_export_info(folder)["recipe"], str(folder / EXPORT_INFO), written=True)
    except (ValueError, KeyError):
        raise CheckpointError(f"{folder}: not a RiM export with its recipe; give one with --recipe") from None


def _rows_note(recipe: Recipe, info: dict[str, Any]) -> str:
    memory = recipe.memory
    names = ", ".join(f"`{name}`" for name in (memory.begin_token, memory.memory_token, memory.end_token))
    ids = ", ".join(map(str, info["memory_token_ids"]))
    spare = info["embedding_rows"] - info["vocabulary"]
    padding = (
        f"The embedding has {spare} rows above the tokenizer's last token; no text reaches them."
        if spare > 0
        else "There are no padding rows."
    )
    return (
        f"Memory tokens {names} are the rows {ids} of {info['embedding_rows']} (tokenizer: {info['vocabulary']} tokens). "
        f"{padding} To train on, start from this folder with the same names in `memory`: the rows are reused and keep their "
        "values."
    )


def model_card(recipe: Recipe, info: dict[str, Any], adapter: str = "") -> str:
    """README.md. `adapter`: what to say of an adapter that is not merged."""
    blocks = (
        f"The chat template appends {info['blocks']} memory blocks of {info['tokens_per_block']} + 2 tokens to the prompt; "
        "the template argument `rim_blocks` changes their number for one request. Raw completions get no blocks.\n\n"
        + _rows_note(recipe, info)
        if info["blocks"]
        else "This is a baseline without memory blocks."
    )
    if info["thoughts"]:
        blocks = (
            f"The model answers after {info['thoughts']} continuous thoughts between `{recipe.memory.begin_token}` and "
            f"`{recipe.memory.end_token}`: a thought's input is the last hidden state before it. **Servers, and the code "
            "below, cannot feed that back and answer without thoughts**; `rim-dist generate` and `rim-dist evaluate` run them."
        )
    base = recipe.model.init_from or "from scratch"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [rim_dist, {recipe.method}]
---

# {recipe.run.name}

Trained with rim_dist {info["rim_dist"]}, method `{recipe.method}`: {info["step"]} optimizer steps of
{info["global_batch"]} samples on {info["ranks"]} rank(s), last stage `{info["stage"]}`. Base: `{base}`.

{blocks}
{adapter}
{_LICENCE_NOTE}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".")
prompt = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "..."}}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))
```

## Resolved recipe

```yaml
{dump_recipe(recipe)}```
"""
