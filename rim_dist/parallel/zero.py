"""The DeepSpeed configuration of a run: a file of `ds_configs/` (or the user's own) completed from the recipe."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rim_dist.config import Recipe
from rim_dist.errors import ConfigError
from rim_dist.parallel.environment import shipped_folder
from rim_dist.parallel.mesh import Mesh, ModelParallelUnit

if TYPE_CHECKING:
    import torch

_BUCKET = 20_000_000  # entries of gradients or parameters in one message: smaller buckets mean many small messages
# Keys that the trainer sets itself, and the recipe's setting for each; a user's value would silently train something else.
OWNED_KEYS = {
    "train_batch_size": "optimizer.global_batch",
    "train_micro_batch_size_per_gpu": "optimizer.micro_batch_tokens",
    "gradient_accumulation_steps": "optimizer.global_batch and optimizer.micro_batch_tokens",
    "gradient_clipping": "optimizer.gradient_clipping",
    "optimizer": "the optimizer section",
    "scheduler": "the schedule of each stage",
    "data_types": "optimizer.grad_accum_dtype",
    "bf16": "model.dtype",
    "bfloat16": "model.dtype",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.sequence",
    "wandb": "logging.wandb",
    "tensorboard": "logging.tensorboard",
}


def shipped_config(recipe: Recipe) -> str:
    """Name of the recipe's file in `ds_configs/`."""
    parallel = recipe.parallel
    name = f"zero{parallel.zero_stage}"
    if parallel.offload:
        name += "-offload"
    elif parallel.zero_plus_plus:
        name += "-zeropp"
    elif parallel.zero_stage == 3:
        name += ("-tp" if parallel.tensor > 1 else "") + ("-sp" if parallel.sequence > 1 else "")
    return f"{name}.json"


def _read(recipe: Recipe) -> tuple[str, dict[str, Any]]:
    own = recipe.parallel.deepspeed_config
    if own is None:
        name = shipped_config(recipe)
        return name, json.loads((shipped_folder("ds_configs") / name).read_text(encoding="utf-8"))
    try:
        tree = json.loads(Path(own).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"parallel.deepspeed_config: {own}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"parallel.deepspeed_config: {own}: not a JSON file ({error})") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"parallel.deepspeed_config: {own}: a DeepSpeed configuration is a JSON object")
    for key, setting in OWNED_KEYS.items():
        if tree.get(key, "auto") != "auto":
            raise ConfigError(f"parallel.deepspeed_config: {own}: {key} belongs to the trainer; set {setting} in the recipe")
    if isinstance(fp16 := tree.get("fp16"), dict) and fp16.get("enabled", "auto") != "auto":
        raise ConfigError(
            f"parallel.deepspeed_config: {own}: fp16.enabled belongs to the trainer; set model.dtype in the recipe"
        )
    stage = tree.get("zero_optimization", {}).get("stage", "auto")
    if stage not in ("auto", recipe.parallel.zero_stage):
        raise ConfigError(
            f"parallel.deepspeed_config: {own}: zero_optimization.stage is {stage!r}, parallel.zero_stage is "
            f"{recipe.parallel.zero_stage}; make them equal"
        )
    return own, tree


def compose(recipe: Recipe, hidden_size: int, ranks_per_node: int = 1) -> dict[str, Any]:
    """The complete DeepSpeed configuration. Pure: reads the JSON, checks it, fills in what the recipe decides.

    `hidden_size` and `ranks_per_node` resolve sizes given as "auto". Raises ConfigError for a file that cannot be used.
    """
    name, tree = _read(recipe)
    tree = {key: value for key, value in tree.items() if key not in OWNED_KEYS}
    zero = tree.setdefault("zero_optimization", {})
    sizes = {
        "reduce_bucket_size": max(_BUCKET, hidden_size * hidden_size),
        "stage3_prefetch_bucket_size": max(_BUCKET, hidden_size * hidden_size * 9 // 10),
        "stage3_param_persistence_threshold": 10 * hidden_size,
        "zero_hpz_partition_size": ranks_per_node,
    }
    for key, size in sizes.items():
        if zero.get(key) == "auto":
            zero[key] = size
    zero["stage"] = recipe.parallel.zero_stage
    if recipe.parallel.tensor > 1 and zero.get("zero_hpz_partition_size", 1) > 1:
        raise ConfigError(
            f"parallel.deepspeed_config: {name}: zero_hpz_partition_size cannot be combined with parallel.tensor "
            f"{recipe.parallel.tensor}: DeepSpeed takes neighbouring ranks for copies of one slice; allowed: 1"
        )
    if recipe.model.dtype == "bf16":
        tree["bf16"] = {"enabled": True}
    fp16 = tree.pop("fp16", {})
    if recipe.model.dtype == "fp16":
        tree["fp16"] = {**fp16, "enabled": True}
    if recipe.accumulates_in_fp32:
        tree["data_types"] = {"grad_accum_dtype": "fp32"}
        if recipe.parallel.zero_stage == 1:  # reduces what it added up, once a step; DeepSpeed would round that before
            tree.setdefault("communication_data_type", "fp32")
    # The trainer forms micro-batches of its own, so that the engine's idea of accumulation and batch is always 1; the
    # loss is already normalised over the global batch.
    tree.update(
        train_micro_batch_size_per_gpu=1,
        gradient_accumulation_steps=1,
        gradient_clipping=recipe.optimizer.gradient_clipping,  # DeepSpeed's default is 1.0, not off
        steps_per_print=1_000_000_000,
        zero_allow_untested_optimizer=True,
    )
    left = [key for key, value in {**tree, **zero}.items() if value == "auto"]
    if left:
        raise ConfigError(f'parallel.deepspeed_config: {name}: the trainer has no value for {", ".join(left)}: "auto"')
    return tree


@contextlib.contextmanager
def one_kind_of_shards() -> Iterator[None]:
    """In this context `deepspeed.initialize` gives all ZeRO stages the ZeRO optimizers.

    Under ZeRO-1 in bf16 with gradients in fp32 it would take another, whose shards no conversion reads; ZeRO's own adds them up
    in fp32 as well.
    """
    from deepspeed.runtime import engine

    original = engine.DeepSpeedEngine._do_optimizer_sanity_check

    def check(self: Any, optimizer: Any) -> Any:
        found = original(self, optimizer)
        return engine.ZERO_OPTIMIZATION if self.zero_optimization() else found

    engine.DeepSpeedEngine._do_optimizer_sanity_check = check
    try:
        yield
    finally:
        engine.DeepSpeedEngine._do_optimizer_sanity_check = original


def partitioner(ds_config: dict[str, Any], mesh: Mesh, dtype: torch.dtype) -> Callable[[list[torch.nn.Parameter]], None] | None:
    """The function that shards parameters over the shard group under ZeRO-3, so that no rank holds the full model.

    The function takes the values of the group's first rank. None for other stages. Collective.
    """
    if ds_config["zero_optimization"]["stage"] != 3:
        return None
    import deepspeed

    init = deepspeed.zero.Init(
        config_dict_or_path=ds_config,
        data_parallel_group=mesh.shard_group,
        mpu=ModelParallelUnit(mesh) if mesh.degrees.tensor > 1 else None,
        dtype=dtype,
    )
    return init._convert_to_zero_parameters


def keep_no_gathered_weights() -> AbstractContextManager[None]:
    """A context for a forward pass under ZeRO-3 in which autograd saves no gathered parameter for the backward pass.

    Autograd saves `weight.t()`, a view that keeps a layer's memory alive after ZeRO has released it, until every rank holds the
    full model. The hook saves the view's strides and offset instead: in the backward pass the parameter is gathered again.
    """
    import torch

    return torch.autograd.graph.saved_tensors_hooks(_pack_view, _unpack_view)


def _pack_view(tensor: torch.Tensor) -> Any:
    parameter = tensor._base
    if parameter is None or not hasattr(parameter, "ds_id"):
        return tensor
    return parameter, tensor.size(), tensor.stride(), tensor.storage_offset() - parameter.storage_offset()


def _unpack_view(packed: Any) -> torch.Tensor:
    if not isinstance(packed, tuple):
        return packed
    parameter, size, stride, offset = packed
    return parameter.detach().as_strided(size, stride, parameter.storage_offset() + offset)
