"""Parquet with named columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rim_dist.config import ColumnsSection
from rim_dist.data.formats.base import Format, from_columns
from rim_dist.data.samples import SourceRow
from rim_dist.errors import DataError


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
                    for row in batch.to_pylist():
                        number += 1
                        yield from_columns(number, row, columns)
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{path}: not a readable Parquet file ({error})") from None


FORMAT = Parquet()
