"""A run for other degrees, or from an HF folder: a new run folder with one portable checkpoint in it."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoConfig

from rim_dist.checkpoint import store
from rim_dist.checkpoint.hf_export import check_intact
from rim_dist.checkpoint.index import index_checkpoint, match_tensors
from rim_dist.checkpoint.model_card import recipe_of_export
from rim_dist.checkpoint.portable import starts_fresh, write_run
from rim_dist.checkpoint.pretrained import open_pretrained
from rim_dist.checkpoint.safetensors_files import read_folder_index
from rim_dist.checkpoint.start import model_of, requirements_of
from rim_dist.checkpoint.store import INPUTS, MODEL, TrainingState
from rim_dist.checkpoint.stored_tensors import StoredTensor
from rim_dist.checkpoint.workers import Workers
from rim_dist.checkpoint.zero_shards import MOMENTS
from rim_dist.config import Recipe
from rim_dist.data.loader import plan_stages
from rim_dist.errors import ConfigError
from rim_dist.files import os_errors
from rim_dist.messages import say
from rim_dist.model.requirements import Requirements
from rim_dist.model.skeleton import empty_module
from rim_dist.parallel.degrees import check_tensor_degree, choose_mode, head_counts
from rim_dist.parallel.mesh import Degrees
from rim_dist.recipe import load_recipe, validate_recipe


def _recipe_for(recipe: Recipe, run: Path, degrees: Degrees, **model: Any) -> Recipe:
    """The recipe with another run folder, other degrees, and these fields of `model`."""
    tree = recipe.model_dump(mode="json")
    tree["run"] |= {"name": run.name, "output_dir": str(run.parent)}
    tree["model"] |= model
    tree["parallel"] |= {"tensor": degrees.tensor, "sequence": degrees.sequence}
    return validate_recipe(tree, str(run))


def check_degrees(recipe: Recipe, degrees: Degrees, config: Any) -> None:
    """Refuse degrees that a run of this recipe and model could not have."""
    for name in ("tensor", "sequence", "data"):
        if getattr(degrees, name) < 1:
            raise ConfigError(f"--{name}: {getattr(degrees, name)} is not allowed; allowed: 1 or more")
    if recipe.optimizer.global_batch < degrees.data:
        raise ConfigError(
            f"--data: {degrees.data} ranks share a global batch of {recipe.optimizer.global_batch} samples; use fewer"
        )
    check_tensor_degree(degrees.tensor, config)
    heads, kv_heads = (count // degrees.tensor for count in head_counts(config))
    choose_mode(recipe.parallel.sequence_mode, degrees.sequence, heads, kv_heads)


def reshape(source: Path, run: Path, degrees: Degrees, workers: Workers) -> Path:
    """A checkpoint as one for other degrees, in a run folder of its own: weights, optimizer, stage, position.

    There is no random state to carry: dropout and data order follow from seed, step and rank.
    """
    check_degrees(store.read_recipe(source), degrees, AutoConfig.from_pretrained(source / MODEL))
    check_intact(source, workers)
    index = index_checkpoint(source)
    if index.recipe.model.dtype == "fp16":
        raise ConfigError(f"{source}: fp16 is not reshaped: its loss scale would start anew; use bf16")
    steps = {name: index.tensors.steps[name] for name in index.module if name in index.tensors.steps}
    stored = {f"weight/{name}": tensor for name, tensor in index.module.items()}
    for kind in MOMENTS:
        stored |= {f"{kind}/{name}": index.tensors.moments[kind][name] for name in steps}
    description = {"names": "model" if starts_fresh(source) else "module", "steps": steps}

    def write_model(folder: Path) -> None:
        shutil.copytree(source / MODEL, folder)
        if (source / INPUTS).is_file():
            shutil.copy(source / INPUTS, folder.parent)

    state = replace(index.state, ranks=degrees.ranks)
    recipe = _recipe_for(index.recipe, run, degrees)
    metrics = source.parent.parent / "metrics.jsonl"  # the curves go on
    return write_run(run, recipe, state, stored, description, write_model, workers, metrics)


def from_hf(folder: Path, run: Path, recipe_path: Path | None, stage: int | None, degrees: Degrees, workers: Workers) -> Path:
    """An HF folder as the start of a run: its weights with memory rows, a fresh optimizer, the beginning of a stage."""
    recipe = load_recipe(recipe_path) if recipe_path else recipe_of_export(folder)
    found = open_pretrained(folder)
    check_degrees(recipe, degrees, found.config)
    recipe = _recipe_for(recipe, run, degrees, init_from=str(folder.resolve()), config=None, tokenizer=None)
    first = recipe.curriculum.stage1 if recipe.curriculum.stage1.enabled else recipe.curriculum.stage2
    if stage == 2 and first is recipe.curriculum.stage1 and not first.samples:
        raise ConfigError(
            "--stage 2: the recipe gives stage 1 in epochs; give curriculum.stage1.samples, so that its end is known"
        )
    plans = [p for p in plan_stages(recipe, 1) if stage is None or p.name == f"stage{stage}"]
    if not plans:
        raise ConfigError(f"--stage {stage}: the recipe leaves this stage out")
    plan = plans[0]
    state = TrainingState(plan.name, 0, plan.first_step, plan.first_sample, 0.0, degrees.ranks)
    requirements = requirements_of(recipe)
    if workers.is_first:
        for note in found.notes:
            say(f"{folder}: {note}")
    config = copy.deepcopy(requirements.config)
    text_config, last_token = config.get_text_config(), max(requirements.tokens.ids)
    # A plain model: memory rows are made as training would make them.
    makes_rows = bool(requirements.tokens.added) or last_token >= text_config.vocab_size or recipe.memory.initialise == "mean"
    ready = {name: t for name, t in (found.tensors or {}).items() if isinstance(t, StoredTensor)}
    makes_rows = makes_rows or not ready  # the tensors are not in the files as they are in the model
    text_config.vocab_size = max(text_config.vocab_size, last_token + 1)
    scratch = run.with_name(run.name + ".rows")

    def write_model(target: Path) -> None:
        config.save_pretrained(target)
        requirements.generation.save_pretrained(target)
        with os_errors(target):
            requirements.tokenizer.save_pretrained(target)

    try:
        if makes_rows:
            workers.on_first(lambda: _build(recipe, requirements, scratch))
        stored = read_folder_index(scratch) if makes_rows else ready
        match_tensors(folder, stored, empty_module(recipe, config, None))
        tensors = {f"weight/{name}": tensor for name, tensor in stored.items()}
        return write_run(run, recipe, state, tensors, {"names": "model", "steps": {}}, write_model, workers)
    finally:
        if makes_rows and workers.is_first:
            shutil.rmtree(scratch, ignore_errors=True)


def _build(recipe: Recipe, requirements: Requirements, scratch: Path) -> None:
    """Write the model with its memory rows into a folder that is read as any other."""
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": None})})
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model = model_of(plain, requirements)
    named = [*model.named_parameters(), *model.named_buffers()]
    saved = model.state_dict().keys()
    with os_errors(scratch):
        save_file({name: t.detach().contiguous() for name, t in named if name in saved}, scratch / "model.safetensors")
