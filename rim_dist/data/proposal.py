"""`rim-dist init`: a look at a data file, and the recipe that it suggests."""

from __future__ import annotations

import csv
import gzip
import io
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rim_dist.config import ColumnsSection
from rim_dist.data.formats import format_names, format_of, recognise
from rim_dist.data.formats.base import JsonFormat, from_columns, parse_json
from rim_dist.data.formats.gsm8k import Gsm8k
from rim_dist.data.samples import BadSample, Sample, SourceRow
from rim_dist.errors import ConfigError, DataError, first_line

# Names that data sets give to a column, likelier ones first.
_NAMES = {
    "question": ("question", "problem", "prompt", "query", "instruction", "input", "user"),
    "steps": ("steps", "reasoning", "rationale", "cot", "chain_of_thought", "thoughts", "explanation", "solution"),
    "answer": ("answer", "final_answer", "target", "label", "result", "output", "response", "completion", "expected"),
}
_CHATS = ("messages", "conversations", "conversation")
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
_TRAINING = re.compile(r"train(ing)?", re.IGNORECASE)
_HELD_OUT = ("test", "validation", "valid", "val", "dev", "eval")
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_CONVERTED = (".csv", ".tsv")
_LOOK = 20_000  # rows


@dataclass
class Look:
    """What a data file is.

    `converted`: no format of rim_dist reads it, so the samples are to be written as JSONL. `equations`: the steps are what
    GSM8K has in `<<..>>`.
    """

    source: str
    path: Path
    columns: ColumnsSection = field(default_factory=ColumnsSection)
    samples: list[Sample] = field(default_factory=list)
    bad: Counter[str] = field(default_factory=Counter)
    converted: bool = False
    equations: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """Numbers of steps of the samples, ascending."""
        return sorted(len(sample.steps) for sample in self.samples)


def look_at(data: Path, columns: dict[str, str]) -> Look:
    """Find out how a file, or a folder of them, is read. `columns`: those that the user names.

    Raises DataError or ConfigError: no such file, nothing that can be used in it, columns that cannot be guessed.
    """
    files = _files(data)
    ending = "".join(files[0].suffixes[-2:]).lower()
    whole = len(files) == 1 and not ending.endswith((".gz", *_CONVERTED))
    source = recognise(files[0]) if whole else "jsonl"
    look = Look(source, files[0], converted=not whole, equations=source in ("gsm8k", "gsm8k_aug"))
    if whole and source not in ("jsonl", "parquet", "prosqa"):
        return _sorted_out(look, format_of(source).read(look.path, look.columns))
    rows = _raw_rows(files)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{data}: no rows in it")
    chat = next((name for name in _CHATS if isinstance(first[1].get(name), list)), None)
    rows = itertools.chain([first], rows)
    if source == "prosqa":  # any list of objects in a .json file
        if {"question", "answer"} <= first[1].keys() and not columns:
            return _sorted_out(look, format_of(source).read(look.path, look.columns))
        look.converted, look.source = True, "jsonl"
    inside = next((known for known in _row_formats() if known.fits(first[1])), None)
    if inside is not None and not columns:
        look.converted, look.source, look.equations = True, "jsonl", isinstance(inside, Gsm8k)
        look.notes.append("question and solution as in GSM8K" if look.equations else "question and answer as in GSM-Hard")
        return _sorted_out(look, (inside.convert(number, row, look.columns) for number, row in rows))
    if chat and not columns:
        look.converted, look.source = True, "jsonl"
        look.notes.append(f"conversations in {chat}: the last answer of each with one question; system prompts are left out")
        return _sorted_out(look, (_from_chat(number, row.get(chat)) for number, row in rows))
    look.columns = _columns(data, first[1], columns)
    return _sorted_out(look, (from_columns(number, row, look.columns) for number, row in rows))


def _row_formats() -> list[JsonFormat]:
    """Formats with more in a row than named columns, which hub data sets and compressed files hold as well."""
    known = [found for found in map(format_of, format_names()) if isinstance(found, JsonFormat) and found.precedence]
    return sorted(known, key=lambda found: -found.precedence)


def _files(data: Path) -> list[Path]:
    """The training files that are meant: the file itself, or those of a data set's folder."""
    if data.is_file():
        return [data]
    if not data.is_dir():
        raise DataError(f"{data}: no such file or folder")
    endings = (".jsonl", ".parquet", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", ".json", ".txt")
    found = sorted(path for path in data.rglob("*") if path.is_file() and path.name.lower().endswith(endings))
    training = [path for path in found if _TRAINING.search(path.name)]
    files = training or [path for path in found if not any(word in path.name.lower() for word in _HELD_OUT)]
    files = [path for path in files if path.suffixes == files[0].suffixes] if files else []
    if not files:
        raise DataError(f"{data}: no data files in this folder ({', '.join(endings)}); name one")
    return files


def _raw_rows(files: Iterable[Path]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows with named columns, with their numbers. Raises DataError for a file that is none of such rows."""
    number = 0
    for file in files:
        for row in _parquet_rows(file) if file.suffix.lower() == ".parquet" else _text_rows(file):
            number += 1
            if not isinstance(row, dict):
                raise DataError(f"{file}:{number}: not a row with named columns; allowed: JSONL, Parquet, CSV")
            yield number, row


def _parquet_rows(file: Path) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise DataError(f"{file}: not a readable Parquet file ({first_line(error)})") from None


def _text_rows(file: Path) -> Iterator[Any]:
    name = file.name.lower().removesuffix(".gz")
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix.lower() == ".gz" else file.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    if name.endswith(_CONVERTED):
        try:
            dialect = csv.Sniffer().sniff(text[:65536], ",;\t") if name.endswith(".csv") else csv.excel_tab
        except csv.Error:
            dialect = csv.excel
        yield from csv.DictReader(io.StringIO(text, newline=""), dialect=dialect)
        return
    if text.lstrip().startswith("["):
        try:
            yield from parse_json(text)
        except ValueError as error:
            raise DataError(f"{file}: not a JSON list of rows ({error})") from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield parse_json(line)
            except ValueError as error:
                raise DataError(f"{file}:{number}: not valid JSON ({error})") from None


def _columns(data: Path, row: dict[str, Any], given: dict[str, str]) -> ColumnsSection:
    """The columns of a row by what they are usually called; `given` ones as they are."""
    there = {name.lower(): name for name in row if isinstance(name, str)}
    chosen: dict[str, str | None] = {"steps": None, **given}
    for part, names in _NAMES.items():
        if part in given:
            if given[part] not in row:
                raise ConfigError(
                    f"--column: {part}={given[part]}: no such column in {data}; it has {', '.join(map(str, row))}"
                )
            continue
        free = [there[name] for name in names if name in there and there[name] not in chosen.values()]
        if free:
            chosen[part] = free[0]
        elif part != "steps":
            raise ConfigError(
                f"{data}: which column is the {part}? It has {', '.join(map(str, row))}; say --column {part}=NAME"
            )
    return ColumnsSection.model_validate(chosen)


def _from_chat(number: int, turns: Any) -> SourceRow:
    """A sample from a conversation of one question: the steps are its thoughts, or the lines before the last one."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return BadSample(number, "no conversation")
    said = [(turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))) for turn in turns]
    spoken = [(_ROLES.get(str(role), role), text) for role, text in said if role != "system"]
    if [role for role, _ in spoken] != ["user", "assistant"] or not all(isinstance(text, str) for _, text in spoken):
        return BadSample(number, "not one question and its answer")
    (_, question), (_, reply) = spoken
    thoughts = "\n".join(_THOUGHT.findall(reply))
    *before, last = [line for line in _THOUGHT.sub("", reply).splitlines() if line.strip()] or [""]
    row = {"question": question, "steps": thoughts or "\n".join(before), "answer": last.replace("####", "")}
    if thoughts and before:
        row["answer"] = "\n".join([*before, row["answer"]])
    return from_columns(number, row, ColumnsSection())


def _sorted_out(look: Look, rows: Iterator[SourceRow]) -> Look:
    first = ""
    for number, row in enumerate(rows):
        if isinstance(row, BadSample):
            look.bad[row.reason] += 1
            first = first or f"{row.line}: {row.reason}{row.remark}"
        else:
            look.samples.append(row)
        if number == _LOOK and not look.converted:
            look.notes.append(f"the first {_LOOK} rows were looked at")
            break
    if not look.samples:
        raise DataError(f"{look.path}:{first or ' no rows in it'}; no row can be used")
    return look


def held_out_beside(data: Path) -> Path | None:
    """A file of held-out questions with the training file's name but for that word."""
    for word in _HELD_OUT:
        name = _TRAINING.sub(word, data.name)
        if name != data.name and data.with_name(name).is_file():
            return data.with_name(name)
    return None


def write_converted(look: Look, target: Path) -> None:
    """The samples as JSONL, which every source setting reads."""
    lines = (
        json.dumps({"question": s.question, "steps": s.steps, "answer": s.answer}, ensure_ascii=False) for s in look.samples
    )
    target.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@dataclass(frozen=True)
class Lengths:
    """How long texts are in tokens: `count` of one text, and of the chat template's own words. `positions`: of the model."""

    count: Callable[[str], int]
    template: int
    positions: int
    measured: bool


def propose(look: Look, name: str, path: Path, model: str, lengths: Lengths, blocks: int | None = None) -> str:
    """The text of a recipe that trains on what was found, commented."""
    samples, steps = look.samples, look.steps
    likely = steps[int(0.95 * (len(steps) - 1))]
    blocks = blocks or (max(2, min(16, likely)) if likely else 4)
    memory = blocks * 4
    longest_row = longest = answer = 0
    for sample in samples:
        own = [lengths.count(step) + 8 for step in sample.steps]  # 8: format and end-of-text
        target = lengths.count(sample.answer) + 8
        question = lengths.count(sample.question) + lengths.template
        longest = max(longest, question + memory + max([target, *own]))
        longest_row = max(longest_row, question + max(memory + blocks * target, 4 * len(own) + sum(own) + target))
        answer = max(answer, target)
    limit = min(_rounded(longest), lengths.positions)
    skips = bool(look.bad) or limit < longest or steps[-1] > 13
    batch = 1 << max(3, min(7, (len(samples) // 50).bit_length() - 1))  # 8 to 128, 50 steps an epoch where it can be
    steps_seen = f"{steps[0]} to {steps[-1]} steps, 95 % at most {likely}" if likely else "without steps: no stage 1"
    stage1 = f"{{epochs: 6, learning_rate: 1.0e-4, max_steps: {min(steps[-1], 32)}}}" if likely else "{epochs: 0}"
    held_out = held_out_beside(path)
    evaluation = (
        f"{{data: {_q(held_out)}, samples: 264, every_steps: 0, max_new_tokens: {max(32, answer)}}}"
        if held_out
        else "{at_end: false}  # data: a file of held-out questions in the same format"
    )
    how = "measured with the model's tokenizer" if lengths.measured else "guessed: three bytes a token; --model measures"
    columns = look.columns.model_dump()
    lines = [
        f"# {path}: {len(samples)} samples, {steps_seen}.",
        *([f"# Made from {look.path} by rim-dist init."] if look.converted else []),
        *(f"# Left out: {count} x {reason}." for reason, count in look.bad.most_common(5)),
        *(f"# Note: {note}." for note in look.notes),
        f"# Lengths are {how}. docs/configuration.md has every field.",
        "method: rim  # or direct, cot, pause, coconut: baselines on the same data",
        f"run: {{name: {_q(name)}, output_dir: runs, seed: 0}}",
        "model:",
        f"  init_from: {_q(model)}",
        "  dtype: fp32  # bf16 on GPUs that have it",
        "  # lora: {rank: 128, alpha: 256}  # adapters and memory rows only; then learning rates about ten times as high",
        f"memory: {{blocks: {blocks}, tokens_per_block: 2}}",
        "data:",
        f"  source: {look.source}",
        f"  path: {_q(path)}",
    ]
    if look.source in ("jsonl", "parquet") and not look.converted:
        lines.append("  columns: {" + ", ".join(f"{part}: {_q(column)}" for part, column in columns.items()) + "}")
    if look.equations:
        lines.append('  step_format: "<<{step}>>"')
    lines += [
        f"  max_tokens: {limit if lengths.measured else 'null'}  # longest question with blocks and one target",
        f"  on_bad_sample: {'skip' if skips else 'refuse'}",
        "curriculum:",
        f"  stage1: {stage1}",
        "  stage2: {epochs: 2, learning_rate: 5.0e-5}",
        f"optimizer: {{global_batch: {batch}, micro_batch_tokens: {_rounded(max(2048, longest_row))}}}",
        "parallel: {zero_stage: 1}  # rim-dist plan says what fits on GPUs",
        "checkpoint: {every_steps: 100}",
        f"evaluation: {evaluation}",
    ]
    return "\n".join(lines) + "\n"


def _rounded(tokens: int) -> int:
    """With a tenth to spare, to a multiple of 64."""
    return 64 * math.ceil(1.1 * tokens / 64)


def _q(value: Any) -> str:
    return "null" if value is None else json.dumps(str(value), ensure_ascii=False)


def guessed_lengths() -> Lengths:
    """Where no tokenizer is at hand."""
    return Lengths(lambda text: len(text.encode()) // 3 + 1, 16, 1 << 30, False)
