"""Tokenised data: encoded once by one process and memory-mapped, or streamed.

Both kinds return the samples at positions [start, stop) of the run's sample stream. The order depends on the seed alone, not on
the number of ranks.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

import rim_dist
from rim_dist.config import Recipe
from rim_dist.data.encoding import DataReport, encode
from rim_dist.data.samples import EncodedSample
from rim_dist.data.sources import read_source, source_name
from rim_dist.data.synthetic import FORMAT
from rim_dist.errors import DataError
from rim_dist.tokens import MemoryTokens

_ARRAYS = ("tokens", "segment_ends", "first_segment", "lines")
_COMPARED_SAMPLES = 64


class PreparedData:
    """Memory-mapped samples from a folder of `prepare`, in a new seeded permutation each epoch."""

    def __init__(self, folder: Path, seed: int) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.report = DataReport.model_validate(meta["report"])
        # A plain view of the mapped file: slices of numpy.memmap itself cost more than the samples they give.
        self._tokens, self._ends, self._first, self._lines = (
            numpy.load(folder / f"{name}.npy", mmap_mode="r").view(numpy.ndarray) for name in _ARRAYS
        )
        self._name, self._seed = folder.name, seed
        self._order: tuple[int, numpy.ndarray] | None = None

    @property
    def fingerprint(self) -> str:
        """Equal on ranks with the same data: the folder's name, and a hash of the sizes and of evenly spaced samples."""
        digest = hashlib.sha256(f"{len(self)} {len(self._tokens)}".encode())
        for index in range(0, len(self), max(1, len(self) // _COMPARED_SAMPLES)):
            digest.update(self._tokens[self._ends[self._first[index]] : self._ends[self._first[index + 1]]].tobytes())
        return f"{self._name}-{digest.hexdigest()[:12]}"

    def __len__(self) -> int:
        """Samples of one epoch."""
        return len(self._lines)

    def __getitem__(self, index: int) -> EncodedSample:
        first, last = self._first[index], self._first[index + 1]
        ends = self._ends[first : last + 1].tolist()  # the entry before a segment's end is its start
        pieces = [self._tokens[a:b] for a, b in itertools.pairwise(ends)]
        return EncodedSample(pieces[0], pieces[1:-1], pieces[-1], int(self._lines[index]))

    def samples(self, start: int, stop: int) -> list[EncodedSample]:
        """The samples at positions start .. stop - 1 of the run's stream."""
        return [self[self.index_at(position)] for position in range(start, stop)]

    def index_at(self, position: int) -> int:
        """Index of the sample at a position of the stream."""
        epoch, offset = divmod(position, len(self))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, numpy.random.default_rng([self._seed, epoch]).permutation(len(self)))
        return int(self._order[1][offset])


class StreamedData:
    """A source read in order through a seeded shuffle buffer. Going back restarts it from the beginning."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tokens: MemoryTokens, positions: int) -> None:
        self.report = DataReport()
        self.fingerprint = ""  # the data is not known before it is read
        self._arguments = (tokenizer, tokens, positions)
        self._recipe = recipe
        self._position = 0
        self._iterator = self._forever()

    def __len__(self) -> int:
        return 0  # unknown

    def samples(self, start: int, stop: int) -> list[EncodedSample]:
        if start < self._position:
            self.report, self._position, self._iterator = DataReport(), 0, self._forever()
        while self._position < start:
            next(self._iterator)
            self._position += 1
        self._position = max(self._position, stop)
        return [next(self._iterator) for _ in range(start, stop)]

    def _forever(self) -> Iterator[EncodedSample]:
        epoch = 0
        while True:
            generator = numpy.random.default_rng([self._recipe.run.seed, epoch])
            buffer: list[EncodedSample] = []
            count = 0
            rows = read_source(self._recipe.data, self._recipe.run.seed)
            for sample in encode(self._recipe, rows, *self._arguments, self.report):
                count += 1
                if len(buffer) < self._recipe.data.shuffle_buffer:
                    buffer.append(sample)
                    continue
                chosen = int(generator.integers(len(buffer)))
                yield buffer[chosen]
                buffer[chosen] = sample
            if not count:
                raise DataError(f"{source_name(self._recipe.data)}: no usable sample in the data ({self.report.reasons()})")
            for chosen in generator.permutation(len(buffer)).tolist():
                yield buffer[chosen]
            epoch += 1


SampleStream = PreparedData | StreamedData


# The sections that are not one method's own. `fingerprint` lists those of their fields that decide a token or a rejected row.
_COMMON = frozenset(
    "method run model memory data curriculum optimizer parallel checkpoint evaluation logging".split()  # noqa: SIM905
)


def _digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, positions: int) -> str:
    """A hash of everything that decides a token or a rejected row."""
    data = recipe.data
    source_file = Path(data.path) if data.path else None
    parts = {
        "version": rim_dist.__version__,
        "data": data.model_dump(mode="json", exclude={"cache_dir", "path"}),
        "file": _digest_file(source_file) if source_file and source_file.is_file() else None,
        "synthetic": [recipe.run.seed, FORMAT] if data.source == "synthetic" else None,
        "method": recipe.method,
        "memory": recipe.memory.model_dump(mode="json", exclude={"initialise"}),
        "stage1": [
            recipe.curriculum.stage1.enabled,
            recipe.curriculum.stage1.max_steps,
            recipe.curriculum.stage1.longer,
            recipe.curriculum.stage1.targets,
        ],
        "stage2": recipe.curriculum.stage2.enabled,
        # A method's own section may decide which rows fit.
        "own": {name: getattr(recipe, name).model_dump(mode="json") for name in set(type(recipe).model_fields) - _COMMON},
        "positions": positions,
        "micro_batch_tokens": recipe.optimizer.micro_batch_tokens,
        "template": tokenizer.chat_template,
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "probe": tokenizer("From 3 to 48/2=24, then: été\n  end.")["input_ids"],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def prepare(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tokens: MemoryTokens, positions: int, folder: Path
) -> PreparedData:
    """Open the recipe's tokenised data in `folder`; encode it first if it is not there.

    Any number of processes may call this at once: one encodes, the others wait for its file lock, outside of any collective.
    Raises DataError if no row is usable.
    """
    target = folder / fingerprint(recipe, tokenizer, positions)
    if not (target / "meta.json").is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):
                if not (target / "meta.json").is_file():
                    _build(recipe, tokenizer, tokens, positions, target)
        except OSError as error:
            raise DataError(f"{folder}: tokenised data cannot be written ({error.strerror or error})") from None
    return PreparedData(target, recipe.run.seed)


def _build(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, tokens: MemoryTokens, positions: int, target: Path) -> None:
    flat, ends, first, lines = array("i"), array("q", [0]), array("q", [0]), array("q")
    report = DataReport()
    rows = read_source(recipe.data, recipe.run.seed)
    for sample in encode(recipe, rows, tokenizer, tokens, positions, report):
        for piece in (sample.question, *sample.steps, sample.answer):
            flat.extend(piece)
            ends.append(len(flat))
        first.append(len(ends) - 1)
        lines.append(sample.line)
    if not lines:
        raise DataError(f"{source_name(recipe.data)}: no usable sample in the data ({report.reasons()})")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, values in zip(_ARRAYS, (flat, ends, first, lines), strict=True):
        numpy.save(partial / f"{name}.npy", numpy.frombuffer(values, dtype=numpy.dtype(values.typecode)))
    (partial / "meta.json").write_text(json.dumps({"report": report.model_dump()}, indent=1), encoding="utf-8")
    os.replace(partial, target)
