"""The tokens of memory blocks, which are rows of the vocabulary, and the chat template that appends the blocks."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rim_dist.config import MemorySection
from rim_dist.errors import ModelError, first_line

# The end of a RiM model's template. The one of a model that starts from a RiM export is replaced.
_BLOCKS = (
    "{% if add_generation_prompt %}{% for _ in range(rim_blocks if rim_blocks is defined else {K}) %}"
    "{{ '{BLOCK}' }}{% endfor %}{% endif %}"
)
_BLOCKS_START = _BLOCKS.partition("{K}")[0]

# The start of a template that reads contents as lists of parts only: it would leave out a text without a word. Jinja drops the
# line's end, and what follows begins a line, as before.
_TEXT_TO_PARTS = (
    "{% set rim_turns = namespace(all=[]) %}{% for turn in messages %}{% set rim_turns.all = rim_turns.all + "
    "[dict(turn, content=[{'type': 'text', 'text': turn['content']}]) if turn['content'] is string else turn] %}"
    "{% endfor %}{% set messages = rim_turns.all %}\n"
)

# No run depends on the day of its start, and no export on that of a request. Llama's own templates fall back to this one.
_PINNED_DATE = datetime.datetime(2024, 7, 26)
_DATE_CALL = re.compile(r"""strftime_now\(\s*(["'])((?:(?!\1).)*)\1\s*\)""")
_PROBES = ("How many are 3 and 4?", "Where does the red door lead?")
_RENDERINGS = 8  # of one question: all equal, unless the template draws at random

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
    """Whether the tokenizer puts BOS before a text by itself. The text is empty: not every vocabulary has a given letter."""
    return tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, memory: MemorySection, blocks: int) -> list[str]:
    """Make the chat template append `blocks` memory blocks after the last assistant header. Returns notes to the user.

    The template argument `rim_blocks` sets the number of blocks of one request; training renders with 0. Nothing is appended
    without a generation prompt. With `blocks` 0 the template is the model's own. What an earlier call appended, also in an
    earlier run, is removed first. Raises ModelError if the template cannot be used.
    """
    if not tokenizer.chat_template:
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos(tokenizer) else "") + _MINIMAL_TEMPLATE
    tokenizer.chat_template = _own_template(tokenizer).partition(_BLOCKS_START)[0]
    notes = prepare_template(tokenizer)
    if blocks:
        # Jinja drops a line's end at the end of a template and keeps blanks there. Before a tag it does the opposite.
        template = re.sub(r"(\r\n|\r|\n)\Z", "", tokenizer.chat_template)
        template += "{{ '' }}" if re.search(r"(\A|[\r\n])[ \t]+\Z", template) else ""
        quoted = block_text(memory).replace("\\", "\\\\").replace("'", "\\'")
        plain = prompt_texts(tokenizer, _PROBES)
        tokenizer.chat_template = template + _BLOCKS.replace("{K}", str(blocks)).replace("{BLOCK}", quoted)
        _check_blocks(tokenizer, plain, block_text(memory), blocks)
    return notes


def _check_blocks(tokenizer: PreTrainedTokenizerBase, plain: Sequence[str], block: str, blocks: int) -> None:
    """Raise ModelError unless a prompt is the `plain` one and its blocks, as text and as token ids."""
    before = plain[0].rpartition(_PROBES[0])[2]  # the question's own words may not be in the vocabulary
    ids, with_blocks, one = text_ids(tokenizer, [before, before + block * blocks, block])
    texts = prompt_texts(tokenizer, _PROBES)
    if texts != [text + block * blocks for text in plain] or with_blocks != ids + one * blocks:
        raise ModelError(f"the chat template cannot end with memory blocks: {texts[0]!r}")


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ModelError(f"it has chat templates named {', '.join(sorted(template))}, and none named default")
        template = template["default"]
    if not isinstance(template, str):
        raise ModelError(f"its chat template is {type(template).__name__}, not text")
    return template


def prepare_template(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Make the chat template show a question given as text, the same on every day. Returns notes to the user.

    Raises ModelError, with the template's own message, if no prompt with the question in it can be made.
    """
    notes = []
    tokenizer.chat_template = own = _own_template(tokenizer)
    if problem := _problem(tokenizer):
        tokenizer.chat_template = _TEXT_TO_PARTS + own
        # A template that fails on texts may show a list as Python does, brackets and all.
        if _problem(tokenizer) or "'type': 'text'" in prompt_texts(tokenizer, _PROBES[:1])[0]:
            raise ModelError(problem)
        notes.append("note: the chat template reads contents as lists of parts; a text is given to it as one part")
    if len({prompt_texts(tokenizer, _PROBES[:1])[0] for _ in range(_RENDERINGS)}) > 1:
        raise ModelError("the chat template draws at random: two prompts of one question differ")
    if _depends_on_date(tokenizer):
        tokenizer.chat_template = _DATE_CALL.sub(
            lambda call: call[1] + _PINNED_DATE.strftime(call[2]) + call[1], tokenizer.chat_template
        )
        if _depends_on_date(tokenizer):
            raise ModelError("the chat template depends on the date in a way that cannot be pinned; write a date into it")
        notes.append(f"note: the chat template depends on the date; it is pinned to {_PINNED_DATE:%d %B %Y}, in the export too")
    return notes


def _problem(tokenizer: PreTrainedTokenizerBase) -> str:
    """Why the template makes no prompt of a question; empty if it makes one."""
    try:
        prompt_texts(tokenizer, _PROBES)
    except ModelError as error:
        return str(error)
    return ""


def _depends_on_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the prompt of a question changes, or fails, if what tells the date is no function."""
    try:
        return prompt_texts(tokenizer, _PROBES[:1], strftime_now="no function") != prompt_texts(tokenizer, _PROBES[:1])
    except ModelError:
        return True


def appended_block(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of one block, as the chat template appends it; empty if it appends none."""
    (plain,), (with_one,) = (prompt_texts(tokenizer, _PROBES[:1], blocks) for blocks in (0, 1))
    return text_ids(tokenizer, [with_one.removeprefix(plain)])[0]


def prompt_texts(
    tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], blocks: int | None = None, **variables: Any
) -> list[str]:
    """Texts of the prompts of single-turn questions; `blocks` overrides the template's own number.

    `variables`: of the template. Raises ModelError if the template refuses a question, with its own message, or leaves it out.
    """
    try:
        prompts = _render(tokenizer, questions, blocks, tokenize=False, **variables)
    except Exception as error:  # a template may fail in any way
        raise ModelError(f"the chat template refuses a question: {first_line(error)}") from error
    for question, prompt in zip(questions, prompts, strict=True):
        if question.strip() not in prompt:
            raise ModelError(f"the chat template leaves a question, or a part of it, out of the prompt: {question[:60]!r}")
    return prompts


def prompt_ids(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], blocks: int | None = None) -> list[list[int]]:
    """Token ids of the prompts of `prompt_texts`. Raises ModelError also if the tokenizer cannot encode one."""
    prompt_texts(tokenizer, questions, blocks)
    try:
        return _render(tokenizer, questions, blocks, return_dict=False)
    except Exception as error:  # what a vocabulary lacks is a bare exception
        raise ModelError(f"the tokenizer cannot encode a question: {first_line(error)}") from error


def _render(tokenizer: PreTrainedTokenizerBase, questions: Sequence[str], blocks: int | None, **options: Any) -> Any:
    if not questions:
        return []
    conversations = [[{"role": "user", "content": question}] for question in questions]
    extra: dict[str, Any] = {} if blocks is None else {"rim_blocks": blocks}
    return tokenizer.apply_chat_template(conversations, add_generation_prompt=True, **options, **extra)


def text_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as they stand. Raises ModelError if the tokenizer cannot encode one."""
    try:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    except Exception as error:  # what a vocabulary lacks is a bare exception
        raise ModelError(f"the tokenizer cannot encode a text: {first_line(error)}") from error
