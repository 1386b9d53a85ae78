"""Checkpoints for any number of ranks: whole tensors by name, in safetensors, with the optimizer's moments or without.

`reshape` makes one from a checkpoint of fixed ranks; `from-hf` from an HF folder, with a fresh optimizer. A run that goes on
from one writes ordinary checkpoints of its own ranks.

portable/portable.safetensors (or shards and their index)   weight/NAME, exp_avg/NAME, exp_avg_sq/NAME
portable/portable.json    whose names they are (`module`: the trained module's; `model`: the plain model's), step counts
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rim_dist.checkpoint import store
from rim_dist.checkpoint.assemble import Workers, index_text, plan_files, write_all
from rim_dist.checkpoint.shards import MOMENTS, ShardIndex
from rim_dist.checkpoint.store import MODEL, PORTABLE, TrainingState
from rim_dist.checkpoint.tensors import ModelTensor, StoredTensor, forget_files, read_folder_index, read_safetensors_index
from rim_dist.config import Recipe
from rim_dist.errors import CheckpointError, ConfigError
from rim_dist.parallel.degrees import check_tensor_degree, choose_mode, head_counts
from rim_dist.parallel.mesh import Degrees
from rim_dist.recipe import dump_recipe, load_recipe, validate_recipe

Names = Literal["module", "model"]
_SHARD_BYTES = 2 * 10**9
_DESCRIPTION = "portable.json"


@dataclass(frozen=True)
class Portable:
    names: Names
    index: ShardIndex


def is_portable(checkpoint: Path) -> bool:
    return (checkpoint / PORTABLE).is_dir()


def starts_fresh(checkpoint: Path) -> bool:
    """Whether a checkpoint holds a plain model's weights and no optimizer: the start of a stage."""
    return is_portable(checkpoint) and read_portable(checkpoint / PORTABLE).names == "model"


def read_portable(folder: Path) -> Portable:
    """Index a `portable/` folder. Raises CheckpointError."""
    try:
        description = json.loads((folder / _DESCRIPTION).read_text(encoding="utf-8"))
        names, steps = description["names"], {k: float(v) for k, v in description["steps"].items()}
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / _DESCRIPTION}: cannot be read ({error})") from None
    index = ShardIndex(moments={kind: {} for kind in MOMENTS}, steps=steps)
    for name, stored in read_folder_index(folder, "portable").items():
        kind, _, parameter = name.partition("/")
        target = index.weights if kind == "weight" else index.moments.get(kind)
        if target is None:
            raise CheckpointError(f"{folder}: {name}: unknown kind of tensor")
        target[parameter] = stored
    return Portable(names, index)


def _write(
    run: Path,
    recipe: Recipe,
    state: TrainingState,
    tensors: dict[str, ModelTensor],
    description: dict[str, Any],
    write_model: Callable[[Path], None],
    workers: Workers,
) -> Path:
    """A run folder with one portable checkpoint in it, ready for `rim-dist train RUN/recipe.yaml`."""
    checkpoints = run / "checkpoints"
    partial = store.partial_folder(checkpoints, state.step)
    files = plan_files(tensors, None, _SHARD_BYTES, "portable")
    begun = False

    def begin() -> None:
        nonlocal begun
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise CheckpointError(f"{run}: already holds something; choose another folder")
        begun = True
        checkpoints.mkdir(parents=True, exist_ok=True)
        needed, free = sum(file.data_bytes for file in files), shutil.disk_usage(checkpoints).free
        if needed > free:
            raise CheckpointError(
                f"{run}: cannot be written: it takes {needed / 2**20:,.1f} MiB, {free / 2**20:,.1f} are free, "
                f"{(needed - free) / 2**20:,.1f} MiB are missing"
            )
        store.start_writing(checkpoints, state.step)
        (partial / PORTABLE).mkdir()

    try:
        workers.on_first(begin)
        records = write_all(partial / PORTABLE, files, workers)

        def finish() -> None:
            if len(files) > 1:
                index = partial / PORTABLE / "portable.safetensors.index.json"
                index.write_text(index_text(files), encoding="utf-8")
            (partial / PORTABLE / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")
            write_model(partial / MODEL)
            named = {f"{PORTABLE}/{name}": record for name, record in records.items()}
            store.announce(partial, state, dump_recipe(recipe), named)
            store.write_atomically(run / "recipe.yaml", dump_recipe(recipe))

        workers.on_first(finish)
    except BaseException as error:
        if begun:  # on the first rank; what is left of it would stand in the way of another try
            shutil.rmtree(run, ignore_errors=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{run}: cannot be written ({error.strerror or error})") from None
        raise
    finally:
        forget_files()
    return run


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
    from transformers import AutoConfig

    from rim_dist.checkpoint.contents import read_contents
    from rim_dist.checkpoint.hf_export import check_intact

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
    return _write(run, _placed(contents.recipe, run, degrees), state, tensors, description, write_model, workers)


def recipe_of_export(folder: Path) -> Recipe:
    """The recipe in a RiM export. Raises CheckpointError if the folder is none."""
    try:
        about = json.loads((folder / "rim_dist.json").read_text(encoding="utf-8"))
        return validate_recipe(about["recipe"], str(folder / "rim_dist.json"), written=True)
    except (OSError, ValueError, KeyError):
        raise CheckpointError(f"{folder}: not a RiM export with its recipe; give one with --recipe") from None


def from_hf(folder: Path, run: Path, recipe_path: Path | None, stage: int | None, degrees: Degrees, workers: Workers) -> Path:
    """An HF folder as the start of a run: its weights with memory rows, a fresh optimizer, the beginning of a stage."""
    from transformers import AutoConfig

    from rim_dist.data.loader import plan_stages
    from rim_dist.evaluation.generation import generation_config
    from rim_dist.model import build_model, lay_foundation

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
    foundation = lay_foundation(recipe)
    rows = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    stored: dict[str, ModelTensor]
    scratch: Path | None = None
    if foundation.tokens.added or max(foundation.tokens.ids) >= rows or recipe.memory.initialise == "mean":
        # A plain model: memory rows are made as training would make them.
        scratch = run.with_name(run.name + ".rows")
        stored = _built(build_model, recipe, foundation, scratch, workers)
    else:
        stored = {name: ModelTensor((t,), t.shape) for name, t in read_folder_index(folder).items()}
    _account(folder, recipe, foundation, {name: t.parts[0] for name, t in stored.items()})

    def write_model(target: Path) -> None:
        config = AutoConfig.from_pretrained(folder)
        config.get_text_config().vocab_size = max(rows, max(foundation.tokens.ids) + 1)
        config.save_pretrained(target)
        generation_config(foundation.tokenizer).save_pretrained(target)
        with store.os_errors(target):
            foundation.tokenizer.save_pretrained(target)

    try:
        tensors = {f"weight/{name}": tensor for name, tensor in stored.items()}
        return _write(run, recipe, state, tensors, {"names": "model", "steps": {}}, write_model, workers)
    finally:
        if scratch is not None and workers.is_first:
            shutil.rmtree(scratch, ignore_errors=True)


def _built(build_model: Any, recipe: Recipe, foundation: Any, scratch: Path, workers: Workers) -> dict[str, ModelTensor]:
    """The model with its memory rows, put into a file from which it can be read as any other."""
    from safetensors.torch import save_file

    plain = recipe.model_copy(update={"model": recipe.model.model_copy(update={"lora": None})})

    def build() -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        model = build_model(plain, foundation)
        weights = {name: p.detach().contiguous() for name, p in [*model.named_parameters(), *model.named_buffers()]}
        with store.os_errors(scratch):
            save_file({name: weights[name] for name in weights if name in model.state_dict()}, scratch / "model.safetensors")

    workers.on_first(build)
    return {name: ModelTensor((t,), t.shape) for name, t in read_safetensors_index(scratch / "model.safetensors").items()}


def _account(where: Path, recipe: Recipe, foundation: Any, found: dict[str, StoredTensor]) -> None:
    from rim_dist.checkpoint.contents import account, empty_module

    config = foundation.config
    rows = max(config.get_text_config().vocab_size, max(foundation.tokens.ids) + 1)
    config.get_text_config().vocab_size = rows
    account(where, found, empty_module(recipe, config, None), ())
