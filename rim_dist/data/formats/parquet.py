"""Parquet with named columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rim_dist.config import ColumnsSection
from rim_dist.data.formats.base import Format, from_columns
from rim_dist.data.samples import BadSample, SourceRow
from rim_dist.errors import DataError, first_line


class Parquet(Format):
    """Parquet with named columns (`data.columns`): question, steps, answer."""

    binary_endings = (".parquet",)
    precedence = 4
    streams = True

    def recognises(self, path: Path, line: str | None) -> bool:  # noqa: ARG002 - a binary file
        return path.suffix in self.binary_endings

    def read(self, path: Path, columns: ColumnsSection) -> Iterator[SourceRow]:
        import pyarrow
        import pyarrow.parquet

        try:
            number = 0
            with pyarrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=1024):
                    for row in _rows(batch):
                        number += 1
                        yield BadSample(number, "not UTF-8") if row is None else from_columns(number, row, columns)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path}: not a readable Parquet file ({first_line(error)})") from None


def _rows(batch: Any) -> list[dict[str, Any] | None]:
    """The rows of a batch; None for one whose text is not UTF-8."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        return [None] if len(batch) == 1 else [row for i in range(len(batch)) for row in _rows(batch.slice(i, 1))]


FORMAT = Parquet()
