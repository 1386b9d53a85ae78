"""Sources of samples: a file in a known format, a hub data set or the embedded task.

Every row becomes a `Sample`, or a `BadSample` with its line and the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rim_dist.config import ColumnsSection, DataSection
from rim_dist.data.formats import format_of, gsm8k, gsm8k_aug
from rim_dist.data.formats.base import from_columns, missing_column
from rim_dist.data.samples import BadSample, SourceRow
from rim_dist.data.synthetic import SyntheticTask
from rim_dist.errors import DataError, first_line


def _from_text(line: int, row: dict[str, Any], columns: ColumnsSection) -> SourceRow:
    filled = {name: value for name, value in row.items() if value is not None}  # every row has the columns of all rows
    if (bad := missing_column(line, filled, "text")) is not None:
        return bad
    text = row["text"]
    if not isinstance(text, str):
        return BadSample(line, f"text is {type(text).__name__}, not text")
    return gsm8k_aug.FORMAT.parse(line, text, columns)


# How a row of a hub data set is read (`data.layout`).
_LAYOUTS: dict[str, Callable[[int, dict[str, Any], ColumnsSection], SourceRow]] = {
    "columns": from_columns,
    "gsm8k": gsm8k.FORMAT.convert,
    "gsm8k_aug": _from_text,
}


def _hub(data: DataSection) -> Iterator[SourceRow]:
    import datasets

    try:
        rows = datasets.load_dataset(
            data.id, data.config_name, split=data.split, revision=data.revision, streaming=data.streaming
        )
        for number, row in enumerate(rows, 1):
            yield _LAYOUTS[data.layout](number, row, data.columns)
    except Exception as error:  # a stream reads its files as it goes
        raise DataError(f"data.id: {data.id!r} cannot be loaded ({first_line(error)})") from error


def read_file(path: str | Path, file_format: str, columns: ColumnsSection) -> Iterator[SourceRow]:
    """Rows of a local file in one of the known formats (`rim_dist.data.formats`)."""
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    return format_of(file_format).read(path, columns)


def read_source(data: DataSection, seed: int) -> Iterator[SourceRow]:
    """All rows of the recipe's source, `data.limit` applied. Deterministic."""
    if data.source == "synthetic":
        walks = data.synthetic
        rows: Iterator[SourceRow] = SyntheticTask(walks.min_steps, walks.max_steps, walks.step_text).training(
            walks.samples, seed
        )
    elif data.source == "hub":
        rows = _hub(data)
    else:
        assert data.path is not None  # checked by DataSection
        rows = read_file(data.path, data.source, data.columns)
    return itertools.islice(rows, data.limit)


def source_name(data: DataSection) -> str:
    """The name of the source in messages."""
    return data.path or data.id or data.source
