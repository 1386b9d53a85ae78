"""Building what is trained: tokenizer, model, memory rows, adapters; everything refused before it costs anything."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint as recompute
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rim_dist.attention.choice import PathChoice, choose_path
from rim_dist.attention.probe import probe_family, probe_thoughts
from rim_dist.attention.registration import use_rim_attention
from rim_dist.checkpoint.store import MODEL, find_checkpoint
from rim_dist.checkpoint.tensors import DTYPES, ModelTensor
from rim_dist.config import STAGE_NAMES, Recipe
from rim_dist.data.synthetic import sentencepiece_tokenizer, synthetic_tokenizer
from rim_dist.errors import ConfigError, ModelError, RimError
from rim_dist.evaluation.generation import model_positions
from rim_dist.evaluation.thinking import think_before_answers
from rim_dist.memory import MemoryTokens, add_memory_tokens, set_chat_template
from rim_dist.methods import method_of
from rim_dist.methods.base import Method
from rim_dist.objective.forward import install_readout_loss
from rim_dist.parallel.degrees import Mode, check_tensor_degree, choose_mode, head_counts
from rim_dist.parallel.mesh import Coordinates, Mesh
from rim_dist.parallel.tensor import TensorPlace, split_model, sum_shared_gradients
from rim_dist.unwrap import bare_model
from rim_dist.weights import (
    Filling,
    LoadedWeights,
    MemoryRows,
    StoredWeights,
    WeightSource,
    broadcast_buffers,
    fill,
    folder_weights,
)


@dataclass
class Foundation:
    """What a run is built on, before any weight exists."""

    tokenizer: PreTrainedTokenizerBase
    tokens: MemoryTokens
    config: PretrainedConfig
    source: Path | str | None  # where weights come from; None: from scratch
    checkpoint: Path | None  # a rim_dist checkpoint to take weights from, instead of an HF folder
    attention: PathChoice
    sequence_mode: Mode  # how ranks of a sequence group share a row

    @property
    def positions(self) -> int:
        """Longest sequence the model takes (`model_positions`)."""
        return model_positions(self.config)

    @property
    def hidden_size(self) -> int:
        return int(self.config.get_text_config().hidden_size)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """A tokenizer from an HF folder, a hub id, a SentencePiece `.model` file, or `synthetic`."""
    if name == "synthetic":
        return synthetic_tokenizer()
    try:
        if name.endswith(".model"):
            if not Path(name).is_file():
                raise ModelError(f"model.tokenizer: {name}: no such file")
            return sentencepiece_tokenizer(Path(name).read_bytes())
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except RimError:
        raise
    except Exception as error:
        raise ModelError(f"model.tokenizer: {name!r} cannot be loaded ({_first_line(error)})") from error


def _scratch_config(recipe: Recipe, vocabulary: int) -> PretrainedConfig:
    fields = dict(recipe.model.config or {})
    model_type = fields.pop("model_type")
    try:
        known = set(AutoConfig.for_model(model_type).to_dict())
        unknown = sorted(set(fields) - known)
        if unknown:
            raise ConfigError(f"model.config: {model_type} has no field {', '.join(unknown)}")
        return AutoConfig.for_model(model_type, **{"vocab_size": vocabulary, **fields})
    except RimError:
        raise
    except Exception as error:
        raise ConfigError(f"model.config: {_first_line(error)}") from error


def _is_a_path(name: str, recipe: Recipe) -> bool:
    """Whether a name that does not exist here was meant as a folder: looking for it on the hub would take a minute."""
    parent = Path(name).parent
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or parent.exists() or parent == Path(recipe.run.output_dir)


def lay_foundation(recipe: Recipe) -> Foundation:
    """Tokenizer and model configuration with all their checks; builds no weights.

    Raises ModelError or ConfigError: unknown model, no end-of-text token, a family that cannot take the RiM mask,
    blocks beyond the model's positions.
    """
    section = recipe.model
    checkpoint = None
    source: Path | str | None = section.init_from
    if section.init_from is not None:
        folder = Path(section.init_from)
        if (folder / "hf" / "config.json").is_file():
            source = folder / "hf"  # a finished run
        elif folder.is_dir() and not (folder / "config.json").is_file():
            checkpoint = find_checkpoint(folder)
            source = checkpoint / MODEL
        elif not folder.exists() and _is_a_path(section.init_from, recipe):
            raise ModelError(f"model.init_from: {section.init_from}: no such folder (a hub id has the form owner/name)")
    tokenizer = load_tokenizer(section.tokenizer or str(source), section.revision, section.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError("model.tokenizer: the tokenizer has no end-of-text token, so no answer could ever end")
    tokens = add_memory_tokens(tokenizer, recipe.memory)
    method = method_of(recipe)
    set_chat_template(tokenizer, recipe.memory, method.prompt_blocks)
    if source is None:
        config = _scratch_config(recipe, len(tokenizer))
    else:
        try:
            config = AutoConfig.from_pretrained(source, revision=section.revision, trust_remote_code=section.trust_remote_code)
        except Exception as error:
            raise ModelError(f"model.init_from: {section.init_from!r} cannot be loaded ({_first_line(error)})") from error
    check_tensor_degree(recipe.parallel.tensor, config)
    heads, kv_heads = (count // recipe.parallel.tensor for count in head_counts(config))
    mode = choose_mode(recipe.parallel.sequence_mode, recipe.parallel.sequence, heads, kv_heads)
    foundation = Foundation(tokenizer, tokens, config, source, checkpoint, _attention(recipe, config), mode)
    _check_positions(method, foundation)
    probe_family(config, section.trust_remote_code)
    if method.thoughts:
        probe_thoughts(config, section.trust_remote_code)
    if recipe.parallel.tensor > 1:
        split_model(skeleton(recipe, foundation), TensorPlace(0, recipe.parallel.tensor))  # refused here, if at all
    return foundation


def _attention(recipe: Recipe, config: PretrainedConfig) -> PathChoice:
    stages = [recipe.curriculum.stage(name) for name in STAGE_NAMES]
    return choose_path(
        recipe.model.attention,
        "cuda" if torch.cuda.is_available() else "cpu",
        config,
        max(stage.dropout for stage in stages if stage.enabled),
        recipe.memory.inside_block == "bidirectional",
        recipe.optimizer.micro_batch_tokens,
    )


def _check_positions(method: Method, foundation: Foundation) -> None:
    size = len(foundation.tokens.block)
    blocks = method.prompt_blocks
    if blocks * size >= foundation.positions:
        raise ConfigError(
            f"memory.blocks: {blocks} blocks of {size} tokens need {blocks * size} positions; the model has "
            f"{foundation.positions}, so at most {(foundation.positions - 1) // size} blocks fit"
        )


def build_model(
    recipe: Recipe,
    foundation: Foundation,
    resume: Path | None = None,
    mesh: Mesh | None = None,
    partition: Callable[[list[torch.nn.Parameter]], None] | None = None,
) -> PreTrainedModel:
    """The model with memory rows (and adapters), the RiM attention selected, all dropouts 0: this rank's slice of it.

    From the seed and the source alone: every rank gets what one process would. `resume`: the checkpoint the run goes on from;
    one of whole tensors gives the model its weights here, one of shards later, in the engine. `partition`: spreads parameters
    over ranks (ZeRO-3) while the model is built. fp32, or the run's precision if it is partitioned.
    """
    mesh = mesh or Mesh.alone()
    section = recipe.model
    model: Any = skeleton(recipe, foundation)
    bare = bare_model(model)
    if mesh.degrees.tensor > 1:
        split_model(model, TensorPlace(mesh.place.tensor, mesh.degrees.tensor, mesh.tensor_group))
    use_rim_attention(bare, foundation.attention.path)
    source, names, initialise = _weight_source(recipe, foundation, resume)
    dtype = DTYPES[section.dtype] if partition is not None else torch.float32
    memory = MemoryRows(foundation.tokens, initialise, recipe.run.seed)
    reads = partition is None or mesh.shard == 0
    fill(model, Filling(source, memory, recipe.run.seed, names, reads, partition, dtype))
    if partition is not None and mesh.degrees.shards > 1:
        broadcast_buffers(model, functools.partial(_send_from_first, mesh=mesh))
    model.train()
    set_dropout(model, 0.0)
    sum_shared_gradients(model)
    if section.activation_checkpointing:
        recompute_layers(bare, section.activation_offload)
        if section.lora is not None:
            model.enable_input_require_grads()
    install_readout_loss(bare)
    if thoughts := method_of(recipe).thoughts:
        think_before_answers(bare, thoughts, foundation.tokens.ids)
    return model


def skeleton(recipe: Recipe, foundation: Foundation) -> Any:
    """The model with memory rows and adapters, without values: on the meta device."""
    config = copy.deepcopy(foundation.config)
    text = config.get_text_config()
    text.vocab_size = max(text.vocab_size, max(foundation.tokens.ids) + 1)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(
            config, trust_remote_code=recipe.model.trust_remote_code, dtype=torch.float32
        )
        if recipe.model.lora is not None:
            model = add_adapters(model, recipe, foundation.tokens)
    return model


def _send_from_first(tensor: torch.Tensor, mesh: Mesh) -> None:
    first = mesh.degrees.rank_of(Coordinates(0, 0, mesh.place.tensor))
    torch.distributed.broadcast(tensor, first, group=mesh.shard_group)


def _weight_source(recipe: Recipe, foundation: Foundation, resume: Path | None) -> tuple[WeightSource | None, str, str]:
    """Where weights come from (None: drawn), whose names it goes by, and what becomes of the memory rows."""
    from rim_dist.checkpoint.contents import read_contents
    from rim_dist.checkpoint.portable import is_portable, starts_fresh

    initialise = recipe.memory.initialise
    if resume is not None and is_portable(resume):
        contents = read_contents(resume)
        if starts_fresh(resume):
            return StoredWeights(contents.model), "model", "keep"
        whole = {name: ModelTensor((stored,), stored.shape) for name, stored in contents.module.items()}
        return StoredWeights(whole), "module", "keep"
    if foundation.checkpoint is not None:
        return StoredWeights(read_contents(foundation.checkpoint).model), "model", initialise
    if foundation.source is None:
        return None, "model", initialise
    return _pretrained(recipe, foundation), "model", initialise


def _pretrained(recipe: Recipe, foundation: Foundation) -> WeightSource:
    """An HF folder's files read tensor by tensor; where that cannot be, the model loaded whole by transformers."""
    section = recipe.model
    try:
        folder = _local_folder(foundation.source, section.revision)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(foundation.config, trust_remote_code=section.trust_remote_code)
        if (stored := folder_weights(folder, empty)) is not None:
            return stored
        loaded = AutoModelForCausalLM.from_pretrained(
            foundation.source, revision=section.revision, trust_remote_code=section.trust_remote_code, dtype=torch.float32
        )
    except RimError:
        raise
    except Exception as error:
        raise ModelError(f"model.init_from: {section.init_from!r} cannot be loaded ({_first_line(error)})") from error
    return LoadedWeights(loaded.state_dict())


def _local_folder(source: Path | str | None, revision: str | None) -> Path:
    """The folder with a model's files: the one given, or the hub's on this machine."""
    if source is not None and Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(source), revision=revision, allow_patterns=["*.safetensors", "*.json"]))


def recompute_layers(model: PreTrainedModel, offload: bool) -> None:
    """Activation checkpointing: keep each layer's input only (`offload`: in CPU memory) and run the layer again in backward."""
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    if offload:
        model._set_gradient_checkpointing(True, _offloaded_checkpoint)


def _offloaded_checkpoint(layer: Any, hidden: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
    """Recompute a layer in the backward pass from its input, which waits in CPU memory until then."""
    device = hidden.device

    def run(kept: torch.Tensor) -> Any:
        return layer(kept.to(device, non_blocking=True), *arguments, **keywords)

    return recompute(run, hidden.cpu(), use_reentrant=False)


def set_dropout(model: torch.nn.Module, probability: float) -> None:
    """Set every dropout of a model: nn.Dropout modules and attention dropouts kept as numbers."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        for name in ("attention_dropout", "attn_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, probability)


def add_adapters(model: PreTrainedModel, recipe: Recipe, tokens: MemoryTokens) -> Any:
    """Wrap the model with peft: adapters and the memory rows train, everything else is frozen."""
    import peft

    lora = recipe.model.lora
    assert lora is not None
    modules = dict(model.named_modules())
    rows: dict[str, list[int]] = {}
    for part in (model.get_input_embeddings(), model.get_output_embeddings()):
        name = next(name for name, module in modules.items() if module is part).rpartition(".")[2]
        rows[name] = list(tokens.ids)
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        rows = dict([next(iter(rows.items()))])  # a tied head follows the embedding
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        # peft leaves out a dropout of 0 for good; the trainer sets the real value at each stage.
        lora_dropout=max(recipe.curriculum.stage1.dropout, recipe.curriculum.stage2.dropout),
        target_modules=lora.target_modules,
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"model.lora.target_modules: {lora.target_modules!r}: {_first_line(error)}") from None


def fetch_weights(recipe: Recipe, foundation: Foundation) -> None:
    """Bring the model's weights onto this machine if they are on the hub; nothing to do for a folder or from scratch."""
    if foundation.source is None or Path(foundation.source).exists():
        return
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(
            str(foundation.source), revision=recipe.model.revision, ignore_patterns=["*.pth", "*.bin", "*.gguf", "*.onnx"]
        )
    except Exception as error:
        raise ModelError(f"model.init_from: {foundation.source} cannot be fetched ({_first_line(error)})") from error
