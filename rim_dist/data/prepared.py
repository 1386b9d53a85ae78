"""Tokenised data: encoded once by one process and memory-mapped, or streamed.

Both kinds return the samples at positions [start, stop) of the run's sample stream. The order depends on the seed alone, not on
the number of ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import tokenizers
import transformers
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

import rim_dist
from rim_dist.config import DataSection, OptimizerSection, Recipe, StageSection
from rim_dist.data.encoding import ENCODER_VERSION, DataReport, encode
from rim_dist.data.formats import format_names, format_of
from rim_dist.data.samples import EncodedSample
from rim_dist.data.sources import read_source, source_name
from rim_dist.data.synthetic import FORMAT
from rim_dist.errors import DataError, RimError
from rim_dist.files import sampled_hash
from rim_dist.methods import method_class
from rim_dist.tokens import MemoryTokens, prompt_texts

_ARRAYS = ("tokens", "segment_ends", "first_segment", "lines")
_COMPARED_SAMPLES = 64
_LARGE_BYTES = 1 << 28


class PreparedData:
    """Memory-mapped samples from a folder of `prepare`, in a new seeded permutation each epoch."""

    def __init__(self, folder: Path, seed: int) -> None:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        self.report = DataReport.model_validate(meta["report"])
        self._content: str = meta["content"]
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

    @property
    def inputs(self) -> dict[str, Any]:
        """What tells this data from other data: rows, samples and a hash of every token in order."""
        return {"rows": self.report.rows, "used": self.report.used, "content": self._content}

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

    def __init__(
        self,
        recipe: Recipe,
        tokenizer: PreTrainedTokenizerBase,
        tokens: MemoryTokens,
        positions: int,
        ends: Sequence[int] = (),
    ) -> None:
        self.report = DataReport()
        self.fingerprint = ""  # the data is not known before it is read
        self._arguments, self._ends = (tokenizer, tokens, positions), ends
        self._recipe = recipe
        self._position = 0
        self._iterator = self._forever()

    @property
    def inputs(self) -> dict[str, Any]:
        """What tells this source from others: a file's size and samples of it; of the hub, what the recipe says."""
        path = self._recipe.data.path
        return {"content": sampled_hash([Path(path)])} if path else {}

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
            for sample in encode(self._recipe, rows, *self._arguments, self.report, self._ends):
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


# Fields of a recipe that decide neither a token nor a rejected row. A field that is not here is part of the key.
_DECIDES_NOTHING: dict[str, Any] = {
    **dict.fromkeys(("run", "model", "parallel", "checkpoint", "evaluation", "logging"), True),
    "memory": {"initialise"},
    "data": {"cache_dir", "path", "streaming", "shuffle_buffer"},
    "curriculum": {
        "normalisation": True,
        "stage1": {*StageSection.model_fields, "weights"},
        "stage2": {*StageSection.model_fields, "weight_power"},
    },
    "optimizer": set(OptimizerSection.model_fields) - {"micro_batch_tokens"},
}


def tokenizer_digests(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Hashes of the files that the tokenizer is saved as: vocabulary, normaliser, added and special tokens, chat template."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: _digest_file(path) for path in sorted(Path(folder).iterdir())}


def _source_files(data: DataSection) -> Any:
    """Hashes of a local source's files; None for another source. Times would differ between the copies of several nodes."""
    name = data.id if data.source == "hub" else data.path
    if name is None or not (path := Path(name)).exists():
        return None
    if path.is_file():
        return _digest_file(path)
    names = [file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(name): _digest_file(path / name) for name in names if not any(part.startswith(".") for part in name.parts)}


def _digest_file(path: Path) -> str:
    """Of a large file, which every rank looks at, samples."""
    if path.stat().st_size > _LARGE_BYTES:
        return sampled_hash([path], samples=4096)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, positions: int, ends: Sequence[int] = ()) -> str:
    """A hash of everything that decides a token or a rejected row."""
    data, stages = recipe.data, (recipe.curriculum.stage1, recipe.curriculum.stage2)
    # A method and a format are a file each, which may be a user's own.
    plugins = [method_class(recipe.method), *(type(format_of(data.source)) for _ in {data.source} & set(format_names()))]
    parts = {
        "versions": [rim_dist.__version__, ENCODER_VERSION, transformers.__version__, tokenizers.__version__],
        "recipe": recipe.model_dump(mode="json", exclude=_DECIDES_NOTHING),
        "stages": [stage.enabled for stage in stages],
        "plugins": [_digest_file(Path(inspect.getfile(plugin))) for plugin in plugins],
        "synthetic": [recipe.run.seed, FORMAT] if data.source == "synthetic" else None,
        "source": _source_files(data),
        "tokenizer": tokenizer_digests(tokenizer),
        "prompt": prompt_texts(tokenizer, ["What is 3 + 4?"], 0),
        "positions": positions,
        "ends": list(ends),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


def prepare(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    tokens: MemoryTokens,
    positions: int,
    folder: Path,
    ends: Sequence[int] = (),
) -> PreparedData:
    """Open the recipe's tokenised data in `folder`; encode it first if it is not there.

    Any number of processes may call this at once: one encodes, the others wait for its file lock, outside of any collective.
    Raises DataError if no row is usable.
    """
    target = folder / fingerprint(recipe, tokenizer, positions, ends)
    if not _is_whole(target):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / "lock"):
                if not _is_whole(target):
                    rows = read_source(recipe.data, recipe.run.seed)
                    report = DataReport()
                    _build(recipe, encode(recipe, rows, tokenizer, tokens, positions, report, ends), report, target)
        except RimError:
            if made:  # bad data leaves nothing behind
                (folder / "lock").unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    for path in made:
                        path.rmdir()
            raise
        except OSError as error:
            raise DataError(f"{folder}: tokenised data cannot be written ({error.strerror or error})") from None
    return PreparedData(target, recipe.run.seed)


def _is_whole(target: Path) -> bool:
    """Whether all that `_build` wrote is there: shared disks are cleared file by file."""
    try:
        sizes = json.loads((target / "meta.json").read_text(encoding="utf-8"))["sizes"]
        return all((target / f"{name}.npy").stat().st_size == sizes[name] for name in _ARRAYS)
    except (OSError, ValueError, KeyError):
        return False


def _build(recipe: Recipe, samples: Iterable[EncodedSample], report: DataReport, target: Path) -> None:
    """Write the samples. `report`: of those that were read so far."""
    flat, ends, first, lines = array("i"), array("q", [0]), array("q", [0]), array("q")
    for sample in samples:
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
    sizes, content = {}, hashlib.sha256()
    for name, values in zip(_ARRAYS, (flat, ends, first, lines), strict=True):
        content.update(values)
        numpy.save(partial / f"{name}.npy", numpy.frombuffer(values, dtype=numpy.dtype(values.typecode)))
        sizes[name] = (partial / f"{name}.npy").stat().st_size
    meta = {"report": report.model_dump(), "sizes": sizes, "content": content.hexdigest()[:20]}
    (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)  # not whole
    os.replace(partial, target)
