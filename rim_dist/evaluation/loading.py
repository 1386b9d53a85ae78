"""Load a model to be evaluated: an exported folder, any HF causal LM folder, or a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rim_dist.checkpoint.hf_export import load_trained_model
from rim_dist.checkpoint.pretrained import open_pretrained, refuse_adapter
from rim_dist.checkpoint.store import MODEL, find_checkpoint, read_recipe
from rim_dist.config import ColumnsSection, around_text
from rim_dist.errors import CheckpointError, ModelError, first_line
from rim_dist.evaluation.scoring import ANSWER_FORMAT
from rim_dist.files import MANIFEST, damage_of
from rim_dist.messages import say
from rim_dist.methods import method_names, method_of
from rim_dist.model.generation import check_blocks, model_positions, padding_note
from rim_dist.model.precision import switch_kernels, with_precision
from rim_dist.model.skeleton import DTYPES
from rim_dist.model.thinking import think_before_answers
from rim_dist.tokens import add_memory_tokens, appended_block, prepare_template, prompt_ids


@dataclass(frozen=True)
class LoadedModel:
    """A model on its device, ready to answer. Every prompt has `blocks` memory blocks (0: none) of `block_size` tokens.

    `columns`, `answer_format`: of the data that it was trained on, as far as that is known, so that questions can come from a
    similar file and answers are read as they were trained.
    """

    model: Any
    tokenizer: PreTrainedTokenizerBase
    blocks: int
    block_size: int
    method: str = "rim"
    synthetic_steps: int = 5
    columns: ColumnsSection = field(default_factory=ColumnsSection)
    answer_format: str = ANSWER_FORMAT

    def prompts(self, questions: list[str], blocks: int | None = None) -> list[list[int]]:
        """Token ids of the prompts of questions, with the trained number of blocks unless another is given."""
        return prompt_ids(self.tokenizer, questions, (self.blocks or None) if blocks is None else blocks)

    def check_blocks(self, blocks: int, option: str) -> None:
        """Raise ConfigError, naming the option, if so many blocks do not fit into the model."""
        check_blocks(blocks, self.block_size, model_positions(self.model.config), option)


def load_for_evaluation(folder: str | Path, verify: bool = True) -> LoadedModel:
    """Load an exported folder, any HF causal LM folder, a checkpoint, or a run's newest checkpoint.

    `verify`: compare what has checksums with them. Raises CheckpointError or ModelError if it is none of them, is damaged,
    cannot be loaded, has other tensors than its model, or has blocks that only training can run.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        if verify and (folder / MANIFEST).is_file() and (wrong := damage_of(folder, checksums=True, free=["README.md"])):
            raise CheckpointError(f"{folder}: damaged, or changed by hand: {wrong}; --no-verify takes it as it is")
        return _load_hf(folder)
    if (folder / "checkpoints").is_dir() or (folder / "state.json").is_file():
        return load_checkpoint(find_checkpoint(folder), verify)
    refuse_adapter(folder)
    if not folder.exists():
        raise CheckpointError(f"{folder}: no such folder")
    raise CheckpointError(f"{folder}: not an HF model folder (no config.json); `rim-dist export` makes one")


def load_checkpoint(checkpoint: Path, verify: bool = False) -> LoadedModel:
    """The model of a checkpoint, LoRA merged, in the precision that its export would have. Raises CheckpointError."""
    recipe = read_recipe(checkpoint)
    if not recipe.exportable:
        raise CheckpointError(
            f"{checkpoint}: trained with memory.inside_block={recipe.memory.inside_block}, which no ordinary server can run; "
            "training evaluates such a model (evaluation.every_steps)"
        )
    model = load_trained_model(checkpoint, verify).to(DTYPES[with_precision(recipe).model.dtype]).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / MODEL)
    method = method_of(recipe)
    if method.thoughts:
        think_before_answers(model, method.thoughts, add_memory_tokens(tokenizer, recipe.memory).ids)
    data = recipe.data
    origin = (recipe.method, data.synthetic.max_steps, data.columns, data.answer_format)
    return _ready(model, tokenizer, method.prompt_blocks, *origin)


def _load_hf(folder: Path) -> LoadedModel:
    about: dict[str, Any] = {}
    try:
        if (folder / "rim_dist.json").is_file():
            about = json.loads((folder / "rim_dist.json").read_text(encoding="utf-8"))
        method = about.get("method", "direct")
        if method not in method_names():
            raise ValueError(f"its method {method} is not known here")
        data = about.get("recipe", {}).get("data", {})
        columns = ColumnsSection.model_validate(data.get("columns", {}))
        around_text(answer_format := data.get("answer_format", ANSWER_FORMAT), "answer")
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({first_line(error)})") from error
    found = open_pretrained(folder)
    for note in found.notes:
        say(f"{folder}: {note}")
    model = found.load("auto").eval()
    if not tokenizer.chat_template:
        raise CheckpointError(f"{folder}: its tokenizer has no chat template, so it is not known how to ask it a question")
    try:
        for note in prepare_template(tokenizer):
            say(note)
    except ModelError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if thoughts := about.get("thoughts", 0):
        think_before_answers(model, thoughts, about["memory_token_ids"])
    origin = (method, about.get("synthetic_steps", 5), columns, answer_format)
    return _ready(model, tokenizer, about.get("blocks", 0), *origin)


def _ready(model: Any, tokenizer: PreTrainedTokenizerBase, blocks: int, *origin: Any) -> LoadedModel:
    """The model on its device. `origin`: as in LoadedModel, from `method` on."""
    if note := padding_note(tokenizer):
        say(note)
    switch_kernels()
    if torch.cuda.is_available():
        model = model.to("cuda")
    return LoadedModel(model, tokenizer, blocks, len(appended_block(tokenizer)), *origin)
