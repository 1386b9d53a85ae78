"""The embedded task: walks through a house with a fixed map. docs/synthetic.md says what was tried and why.

"From the attic take red blue pink." Each door colour is a fixed permutation of the rooms. A step is an equation, as in
GSM8K-Aug: the room, the door, the room behind it ("attic red hall"); the answer is the last room. The map is the same for
everyone, so that it can be learned; an answer needs as many look-ups in a row as the question has doors, which a small
model cannot do in one pass.
"""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy
from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from rim_dist.data.samples import Sample

ROOMS = ("kitchen", "hall", "attic", "garden", "cellar")
DOORS = ("red", "blue", "pink", "green", "white", "black")
StepText = Literal["equation", "room"]
FORMAT = 2  # of the texts; data that was tokenised from another format is not reused
GUESSING = 1 / len(ROOMS)  # accuracy of an answer drawn at random
_MAP_SEED = 1
_HELD_OUT_EVERY = 8  # one problem in so many is never trained on


@functools.cache
def house_map() -> tuple[tuple[int, ...], ...]:
    """`[door][room] -> room`: a different permutation (never the identity) for each door."""
    generator = numpy.random.default_rng(_MAP_SEED)
    maps: list[tuple[int, ...]] = []
    while len(maps) < len(DOORS):
        candidate = tuple(generator.permutation(len(ROOMS)).tolist())
        if candidate != tuple(range(len(ROOMS))) and candidate not in maps:
            maps.append(candidate)
    return tuple(maps)


class SyntheticTask:
    """Walks through `min_steps` .. `max_steps` doors, each length equally often in training."""

    def __init__(self, min_steps: int, max_steps: int, step_text: StepText = "equation") -> None:
        self._min, self._max, self._step_text = min_steps, max_steps, step_text

    def training(self, count: int, seed: int) -> Iterator[Sample]:
        """`count` walks that are not held out, drawn from the seed (repetitions possible)."""
        return self._draw(count, numpy.random.default_rng([seed, 0]), self._min, held_out=False)

    def held_out(self, count: int, seed: int) -> Iterator[Sample]:
        """`count` held-out walks of the longest length, drawn from the seed."""
        return self._draw(count, numpy.random.default_rng([seed, 1]), self._max, held_out=True)

    def _draw(self, count: int, generator: numpy.random.Generator, shortest: int, held_out: bool) -> Iterator[Sample]:
        line = 1
        while line <= count:
            doors = generator.integers(0, len(DOORS), int(generator.integers(shortest, self._max + 1))).tolist()
            sample = walk(int(generator.integers(len(ROOMS))), doors, self._step_text, line)
            if is_held_out(sample.question) == held_out:
                line += 1
                yield sample


def is_held_out(question: str) -> bool:
    """Whether a walk is kept for evaluation. A hash of its text decides, so that no seed can mix the sets."""
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_EVERY == 0


def walk(room: int, doors: list[int], step_text: StepText = "equation", line: int = 1) -> Sample:
    """The sample that starts in a room and takes doors (both by number)."""
    question = f"From the {ROOMS[room]} take {' '.join(DOORS[door] for door in doors)}."
    steps = []
    for door in doors:
        behind = house_map()[door][room]
        steps.append(f"{ROOMS[room]} {DOORS[door]} {ROOMS[behind]}" if step_text == "equation" else ROOMS[behind])
        room = behind
    return Sample(question, tuple(steps), ROOMS[room], line)


@functools.cache
def _sentencepiece_model() -> bytes:
    """A SentencePiece model trained on the task's own texts: one token per word. Deterministic."""
    import sentencepiece

    texts = [
        text
        for sample in SyntheticTask(1, 8).training(4000, seed=0)
        for text in (sample.question, " ".join(sample.steps), f"#### {sample.answer}")
    ]
    model = BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=128,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        num_threads=1,
        minloglevel=2,
        normalization_rule_name="identity",
    )
    return model.getvalue()


def sentencepiece_tokenizer(model: bytes) -> PreTrainedTokenizerBase:
    """A tokenizer from the content of a SentencePiece model file, with the special tokens that the model defines.

    Raises ValueError if it is not a SentencePiece model.
    """
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
    except RuntimeError as error:
        raise ValueError("not a SentencePiece model") from error
    ids = {
        "unk_token": processor.unk_id(),
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "pad_token": processor.pad_id(),
    }
    special = {name: processor.IdToPiece(number) if number >= 0 else None for name, number in ids.items()}
    with tempfile.TemporaryDirectory() as folder:  # transformers reads from a folder that holds nothing else
        (Path(folder) / "tokenizer.model").write_bytes(model)
        return LlamaTokenizer.from_pretrained(folder, **special)


def synthetic_tokenizer() -> PreTrainedTokenizerBase:
    """The task's tokenizer. Its chat template is the question as it stands, after BOS."""
    tokenizer = sentencepiece_tokenizer(_sentencepiece_model())
    tokenizer.chat_template = "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return tokenizer
