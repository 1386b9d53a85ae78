"""A run for other degrees, or from an HF folder: a new run folder with one portable checkpoint in it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoConfig

from rim_dist.checkpoint import store
from rim_dist.checkpoint.assemble import Workers
from rim_dist.checkpoint.card import recipe_of_export
from rim_dist.checkpoint.contents import account, read_contents
from rim_dist.checkpoint.hf_export import check_intact
from rim_dist.checkpoint.portable import is_portable, read_portable, write_run
from rim_dist.checkpoint.shards import MOMENTS
from rim_dist.checkpoint.start import model_of, requirements_of
from rim_dist.checkpoint.store import MODEL, PORTABLE, TrainingState
from rim_dist.checkpoint.tensors import ModelTensor, StoredTensor, read_folder_index, read_safetensors_index
from rim_dist.config import Recipe
from rim_dist.data.loader import plan_stages
from rim_dist.errors import ConfigError
from rim_dist.files import os_errors
from rim_dist.model.generation import generation_config
from rim_dist.model.requirements import Requirements
from rim_dist.model.skeleton import empty_module
from rim_dist.parallel.degrees import check_tensor_degree, choose_mode, head_counts
from rim_dist.parallel.mesh import Degrees
from rim_dist.recipe import load_recipe, validate_recipe


def _placed(recipe: Recipe, run: Path, degrees: Degrees, **model: Any) -> Recipe:
    """The recipe of a run that lives in another folder and has other degrees."""
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
    contents = read_contents(source)
    if contents.recipe.model.dtype == "fp16":
        raise ConfigError(f"{source}: fp16 is not reshaped: its loss scale would start anew; use bf16")
    trained = [name for name in contents.module if name in contents.index.steps]
    tensors = {f"weight/{name}": ModelTensor((stored,), stored.shape) for name, stored in contents.module.items()}
    for kind in MOMENTS:
        moments = contents.index.moments.get(kind, {})
        tensors |= {f"{kind}/{name}": ModelTensor((moments[name],), moments[name].shape) for name in trained}
    plain = is_portable(source) and read_portable(source / PORTABLE).names == "model"
    description = {"names": "model" if plain else "module", "steps": {name: contents.index.steps[name] for name in trained}}

    def write_model(folder: Path) -> None:
        shutil.copytree(source / MODEL, folder)
        metrics = source.parent.parent / "metrics.jsonl"  # the curves go on
        if metrics.is_file():
            shutil.copy(metrics, run / "metrics.jsonl")

    state = replace(contents.state, ranks=degrees.ranks)
    return write_run(run, _placed(contents.recipe, run, degrees), state, tensors, description, write_model, workers)


def from_hf(folder: Path, run: Path, recipe_path: Path | None, stage: int | None, degrees: Degrees, workers: Workers) -> Path:
    """An HF folder as the start of a run: its weights with memory rows, a fresh optimizer, the beginning of a stage."""

    recipe = load_recipe(recipe_path) if recipe_path else recipe_of_export(folder)
    check_degrees(recipe, degrees, AutoConfig.from_pretrained(folder))
    recipe = _placed(recipe, run, degrees, init_from=str(folder.resolve()), config=None, tokenizer=None)
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
    rows = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    stored: dict[str, ModelTensor]
    scratch: Path | None = None
    if requirements.tokens.added or max(requirements.tokens.ids) >= rows or recipe.memory.initialise == "mean":
        # A plain model: memory rows are made as training would make them.
        scratch = run.with_name(run.name + ".rows")
        stored = _built(recipe, requirements, scratch, workers)
    else:
        stored = {name: ModelTensor((t,), t.shape) for name, t in read_folder_index(folder).items()}
    _account(folder, recipe, requirements, {name: t.parts[0] for name, t in stored.items()})

    def write_model(target: Path) -> None:
        config = AutoConfig.from_pretrained(folder)
        config.get_text_config().vocab_size = max(rows, max(requirements.tokens.ids) + 1)
        config.save_pretrained(target)
        generation_config(requirements.tokenizer).save_pretrained(target)
        with os_errors(target):
            requirements.tokenizer.save_pretrained(target)

    try:
        tensors = {f"weight/{name}": tensor for name, tensor in stored.items()}
        return write_run(run, recipe, state, tensors, {"names": "model", "steps": {}}, write_model, workers)
    finally:
        if scratch is not None and workers.is_first:
            shutil.rmtree(scratch, ignore_errors=True)


def _built(recipe: Recipe, requirements: Requirements, scratch: Path, workers: Workers) -> dict[str, ModelTensor]:
    """The model with its memory rows, put into a file from which it can be read as any other."""
    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": None})})

    def build() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        model = model_of(plain, requirements)
        weights = {name: p.detach().contiguous() for name, p in [*model.named_parameters(), *model.named_buffers()]}
        with os_errors(scratch):
            save_file({name: weights[name] for name in weights if name in model.state_dict()}, scratch / "model.safetensors")

    workers.on_first(build)
    return {name: ModelTensor((t,), t.shape) for name, t in read_safetensors_index(scratch / "model.safetensors").items()}


def _account(where: Path, recipe: Recipe, requirements: Requirements, found: dict[str, StoredTensor]) -> None:

    config = requirements.config
    rows = max(config.get_text_config().vocab_size, max(requirements.tokens.ids) + 1)
    config.get_text_config().vocab_size = rows
    account(where, found, empty_module(recipe, config, None), ())
