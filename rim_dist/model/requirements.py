"""Tokenizer, configuration and attention of a run, with all checks that need no weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from rim_dist.attention.choice import KernelChoice, choose_kernel
from rim_dist.attention.kernels import proof_kernel
from rim_dist.attention.kernels.base import Demands
from rim_dist.config import MemorySection, Recipe, StageName
from rim_dist.data.proposal import Lengths
from rim_dist.data.synthetic import sentencepiece_tokenizer, synthetic_tokenizer
from rim_dist.errors import ConfigError, ModelError, RimError, first_line
from rim_dist.methods import method_of
from rim_dist.model.generation import check_blocks, ends_of_folder, generation_config, model_positions
from rim_dist.model.precision import with_precision
from rim_dist.model.proof import dropout_kinds, prove_family, prove_thoughts
from rim_dist.model.skeleton import skeleton
from rim_dist.model.weights import WeightSource
from rim_dist.parallel.degrees import Mode, check_tensor_degree, choose_mode, head_counts
from rim_dist.parallel.tensor import TensorRank, split_model
from rim_dist.tokens import MemoryTokens, add_memory_tokens, prompt_ids, set_chat_template, text_ids


@dataclass(frozen=True)
class Start:
    """Where a run's weights come from: an HF folder or hub id (None: from scratch), or a checkpoint's model folder.

    `checkpoint`: the rim_dist checkpoint that has the weights, instead of an HF folder. `config`: that of an HF folder, as its
    files need it. `weights`: finds the values. `notes`: what the user should know of how they are read.
    """

    source: Path | str | None = None
    checkpoint: Path | None = None
    config: PretrainedConfig | None = None
    weights: Callable[[], WeightSource] | None = None
    notes: tuple[str, ...] = ()


@dataclass
class Requirements:
    """What a run needs before any weight exists."""

    tokenizer: PreTrainedTokenizerBase
    tokens: MemoryTokens
    config: PretrainedConfig
    start: Start
    attention: dict[StageName, KernelChoice]  # of every stage that is trained
    sequence_mode: Mode  # how ranks of a sequence group share a row
    ends: list[int] = field(default_factory=list)  # tokens that end an answer; targets end with the first, end-of-text
    notes: list[str] = field(default_factory=list)  # what the user is told about chat template and ends

    @property
    def proof_kernels(self) -> list[str]:
        """The kernels that tiny models run with to prove those of the stages."""
        return list(dict.fromkeys(proof_kernel(choice.kernel) for choice in self.attention.values()))

    @property
    def attention_in_words(self) -> str:
        """Which kernel the stages have, and why."""
        words = {stage: f"{choice.kernel} ({choice.reason})" for stage, choice in self.attention.items()}
        if len(set(words.values())) == 1:
            return next(iter(words.values()))
        return ", ".join(f"{text} in {stage}" for stage, text in words.items())

    @property
    def positions(self) -> int:
        """Longest sequence the model takes (`model_positions`)."""
        return model_positions(self.config)

    @property
    def generation(self) -> GenerationConfig:
        """How answers of the trained model are decoded, in its checkpoints and exports too."""
        return generation_config(self.tokenizer, self.ends)

    @property
    def hidden_size(self) -> int:
        return int(self.config.get_text_config().hidden_size)


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
        raise ModelError(f"model.tokenizer: {name!r} cannot be loaded ({first_line(error)})") from error


def lengths_of(model: str) -> Lengths:
    """How long texts are for a model: a folder or hub id. Raises ModelError if it cannot be loaded."""
    tokenizer = load_tokenizer(model)
    try:
        config = AutoConfig.from_pretrained(model)
    except Exception as error:
        raise ModelError(f"--model: {model!r} cannot be loaded ({first_line(error)})") from error
    set_chat_template(tokenizer, MemorySection(), 0)
    template = len(prompt_ids(tokenizer, ["x"])[0])
    return Lengths(lambda text: len(text_ids(tokenizer, [text])[0]), template, model_positions(config), True)


def _scratch_config(recipe: Recipe, vocabulary: int) -> PretrainedConfig:
    fields = dict(recipe.model.config or {})
    model_type = fields.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        near = difflib.get_close_matches(str(model_type), list(CONFIG_MAPPING), n=3) or ["llama", "qwen3", "gpt2"]
        raise ConfigError(
            f"model.config.model_type: {model_type!r} is no family of transformers; near to it: {', '.join(near)}"
        )
    try:
        if unknown := sorted(set(fields) - set(AutoConfig.for_model(model_type).to_dict())):
            raise ConfigError(f"model.config: {model_type} has no field {', '.join(unknown)}")
        config = AutoConfig.for_model(model_type, **{"vocab_size": vocabulary, **fields})
        if (text := config.get_text_config(decoder=True)) is not config:
            raise ConfigError(f"model.config: {model_type} is a model of more than text; give model_type: {text.model_type}")
        return config
    except RimError:
        raise
    except Exception as error:
        raise ConfigError(f"model.config: {first_line(error)}") from error


def gather_requirements(recipe: Recipe, start: Start) -> Requirements:
    """Load and check tokenizer and model configuration.

    Raises ModelError or ConfigError: unknown model, no end-of-text token, a chat template that cannot ask a question, a family
    that cannot take the RiM mask, blocks beyond the model's positions.
    """
    recipe = with_precision(recipe)
    section = recipe.model
    source = start.source
    tokenizer = load_tokenizer(section.tokenizer or str(source), section.revision, section.trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise ModelError("model.tokenizer: the tokenizer has no end-of-text token, so no answer could ever end")
    tokens = add_memory_tokens(tokenizer, recipe.memory)
    method = method_of(recipe)
    if source is None:
        config = _scratch_config(recipe, len(tokenizer))
    elif start.config is not None:
        config = start.config
    else:
        try:
            config = AutoConfig.from_pretrained(source, revision=section.revision, trust_remote_code=section.trust_remote_code)
        except Exception as error:
            raise ModelError(f"model.init_from: {section.init_from!r} cannot be loaded ({first_line(error)})") from error
    ends, end_notes = _ends(recipe, source, tokenizer, config)
    try:
        check_tensor_degree(recipe.parallel.tensor, config)
        heads, kv_heads = (count // recipe.parallel.tensor for count in head_counts(config))
        mode = choose_mode(recipe.parallel.sequence_mode, recipe.parallel.sequence, heads, kv_heads)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        attention = {
            stage: choose_kernel(section.attention, Demands.of(recipe, config, device, mode, stage, local=True))
            for stage in recipe.trained_stages
        }
        positions = model_positions(config)
    except RimError:
        raise
    except Exception as error:  # some families have no heads, and some have others in every layer
        raise ModelError(f"model family {config.model_type}: not supported: {first_line(error)}") from error
    check_blocks(method.prompt_blocks, len(tokens.block), positions, "memory.blocks", "memory.tokens_per_block")
    try:
        notes = set_chat_template(tokenizer, recipe.memory, method.prompt_blocks)
    except ModelError as error:
        raise ModelError(f"model.tokenizer: {error}\n(correct its chat_template.jinja, or name another tokenizer)") from None
    notes = [*(f"{section.init_from}: {note}" for note in start.notes), *notes, *end_notes, *_dropout_notes(recipe, config)]
    requirements = Requirements(tokenizer, tokens, config, start, attention, mode, ends, notes)
    for kernel in requirements.proof_kernels:
        prove_family(config, section.trust_remote_code, kernel)
        if method.thoughts:
            prove_thoughts(config, section.trust_remote_code, kernel)
    if recipe.parallel.tensor > 1:
        split_model(skeleton(recipe, config, tokens), TensorRank(0, recipe.parallel.tensor))  # refuses what it cannot split
    return requirements


def _dropout_notes(recipe: Recipe, config: PretrainedConfig) -> list[str]:
    """Notes to the user on dropout that there is no place for."""
    asked, none = recipe.largest_dropouts, frozenset[tuple[str, str]]()
    attention, hidden = (
        dropout_kinds(config, recipe.model.trust_remote_code) if asked.attention or asked.residual else (none, none)
    )
    adapters = max(recipe.curriculum.stage(name).lora_dropout or 0.0 for name in recipe.trained_stages)
    idle = (
        ("lora_dropout", recipe.model.lora is None and adapters, "the run has no adapters (model.lora)"),
        ("attention_dropout", not attention and asked.attention, f"{config.model_type} has no dropout of attention weights"),
        ("residual_dropout", not hidden and asked.residual, f"{config.model_type} has no dropout of hidden states"),
    )
    return [f"note: {name} {value:g} drops nothing: {why}" for name, value, why in idle if value]


def _ends(
    recipe: Recipe, source: Path | str | None, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> tuple[list[int], list[str]]:
    """Tokens that end an answer, end-of-text first; and notes to the user on those that the model names and that cannot be."""
    ends: list[int] = [tokenizer.eos_token_id]
    if source is None or recipe.model.tokenizer not in (None, str(source)):
        return ends, []  # ids of another vocabulary mean nothing here
    others = [end for end in ends_of_folder(source, recipe.model.revision, config) if end not in ends]
    known = tokenizer.added_tokens_decoder
    # Configurations have ids by default, which may be any word's.
    words = [end for end in others if end not in known]
    notes = [
        f"note: eos_token_id {end} of the model is no special token of its tokenizer; answers go on after it" for end in words
    ]
    return [*ends, *(end for end in others if end in known)], notes


def fetch_weights(recipe: Recipe, requirements: Requirements) -> None:
    """Download the model's weights if they are on the hub. Does nothing for a folder or a model from scratch."""
    source = requirements.start.source
    if source is None or Path(source).exists():
        return
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(str(source), revision=recipe.model.revision, ignore_patterns=["*.pth", "*.bin", "*.gguf", "*.onnx"])
    except Exception as error:
        raise ModelError(f"model.init_from: {source} cannot be fetched ({first_line(error)})") from error
