"""The tokens of memory blocks, which are rows of the vocabulary, and the chat template that appends the blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rim_dist.config import MemorySection
from rim_dist.errors import ModelError

# The end of a RiM model's template. The one of a model that starts from a RiM export is replaced.
_BLOCKS = (
    "{% if add_generation_prompt %}{% for _ in range(rim_blocks if rim_blocks is defined else {K}) %}"
    "{{ '{BLOCK}' }}{% endfor %}{% endif %}"
)
_BLOCKS_START = _BLOCKS.partition("{K}")[0]

# For models without a chat template: the messages as they are, a line each. The template adds BOS once.
_MINIMAL_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
)


@dataclass(frozen=True)
class MemoryTokens:
    """Ids of the memory tokens. `added`: those that were not in the tokenizer before."""

    begin: int
    memory: int
    end: int
    tokens_per_block: int
    added: tuple[int, ...]

    @property
    def block(self) -> list[int]:
        """Token ids of one block: `[begin, memory x M, end]`."""
        return [self.begin, *[self.memory] * self.tokens_per_block, self.end]

    @property
    def ids(self) -> tuple[int, int, int]:
        return (self.begin, self.memory, self.end)


def block_text(memory: MemorySection) -> str:
    """The text of one block, as the chat template appends it."""
    return memory.begin_token + memory.memory_token * memory.tokens_per_block + memory.end_token


def add_memory_tokens(tokenizer: PreTrainedTokenizerBase, memory: MemorySection) -> MemoryTokens:
    """Add the memory tokens to the tokenizer (those it has are reused) and return their ids.

    Raises ModelError if a reused name is not one token of its own.
    """
    names = [memory.begin_token, memory.memory_token, memory.end_token]
    vocabulary = tokenizer.get_vocab()
    missing = [name for name in names if name not in vocabulary]
    # Also for reused names, so that their text is always one token.
    tokenizer.add_special_tokens({"additional_special_tokens": names}, replace_extra_special_tokens=False)
    ids = tokenizer.convert_tokens_to_ids(names)
    encoded = tokenizer(block_text(memory), add_special_tokens=False)["input_ids"]
    tokens = MemoryTokens(ids[0], ids[1], ids[2], memory.tokens_per_block, tuple(tokenizer.convert_tokens_to_ids(missing)))
    if encoded != tokens.block:
        raise ModelError(f"memory: the tokenizer reads {block_text(memory)!r} as {encoded}, not as {tokens.block}")
    return tokens


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts BOS before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def set_chat_template(tokenizer: PreTrainedTokenizerBase, memory: MemorySection, blocks: int) -> None:
    """Make the chat template append `blocks` memory blocks after the last assistant header.

    The template argument `rim_blocks` sets the number of blocks of one request; training renders with 0. Nothing is appended
    without a generation prompt. With `blocks` 0 the template is the model's own. What an earlier call appended, also in an
    earlier run, is removed first.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        template = ("{{ bos_token }}" if adds_bos(tokenizer) else "") + _MINIMAL_TEMPLATE
    template = template.partition(_BLOCKS_START)[0]
    if blocks:
        text = block_text(memory).replace("\\", "\\\\").replace("'", "\\'")
        # Jinja drops a newline at the end of a template. Text after it would bring it back.
        template = template.removesuffix("\n") + _BLOCKS.replace("{K}", str(blocks)).replace("{BLOCK}", text)
    tokenizer.chat_template = template


def prompt_ids(tokenizer: PreTrainedTokenizerBase, questions: list[str], blocks: int | None = None) -> list[list[int]]:
    """Token ids of the prompts of single-turn questions; `blocks` overrides the template's own number."""
    if not questions:
        return []
    conversations = [[{"role": "user", "content": question}] for question in questions]
    extra: dict[str, Any] = {} if blocks is None else {"rim_blocks": blocks}
    return tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False, **extra)
