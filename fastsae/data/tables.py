"""Parquet files: one column of texts or chats, read row group by row group with pyarrow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastsae.data.documents import Document, field_of


class ParquetFile:
    """The rows of a parquet file, each a document: a string, or a list of messages, in the column `field`.

    A piece is a range of rows in one row group, about `step` bytes of that column.
    Raises: ImportError without pyarrow; ValueError for another file, or one without that column.
    """

    def __init__(self, path: Path, *, field: str, step: int):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise ImportError(f"reading {path} needs pyarrow: pip install 'fastsae-engine[text]'") from error
        self.path = path
        self.field = field
        self._damaged = (pyarrow.ArrowException, OSError)
        try:
            about = pyarrow.parquet.read_metadata(path)
        except self._damaged as error:
            raise ValueError(f"{path} is not a readable parquet file ({_first_line(error)})") from error
        columns = about.schema.to_arrow_schema().names
        if field not in columns:
            raise ValueError(
                f"{path} has no column {field!r}; its columns are {', '.join(columns)}; name one (--text-field)"
            )
        self._pieces: list[tuple[int, int, int]] = []  # row group, first row, end
        for group in range(about.num_row_groups):
            found = about.row_group(group)
            parts = [found.column(i) for i in range(found.num_columns)]
            size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] == field)
            rows = max(1, found.num_rows * step // max(size, 1))
            starts = range(0, found.num_rows, rows)
            self._pieces += [(group, start, min(start + rows, found.num_rows)) for start in starts]
        self._group: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return len(self._pieces)

    def documents(self, piece: int) -> list[Document]:
        group, start, end = self._pieces[piece]
        last = self._group
        if last is None or last[0] != group:
            last = self._group = (group, self._column(group))
        rows = last[1].slice(start, end - start).to_pylist()
        where = f"{self.path}, row group {group}, rows {start:,} to {end:,}"
        return [field_of({self.field: row}, self.field, where) for row in rows]

    def _column(self, group: int) -> Any:
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self.path) as file:
                return file.read_row_group(group, columns=[self.field]).column(self.field)
        except self._damaged as error:
            raise ValueError(f"{self.path} is damaged in row group {group} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
