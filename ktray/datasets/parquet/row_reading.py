"""Reading of encoded images row by row from parquet files of any size."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ktray.datasets.parquet.footers import MIB, Column, ParquetFile, opened
from ktray.images.source import Unreadable

_BATCH_ROWS = 32
_BATCH_BYTES = 32 * MIB


def row_reader(files: Sequence[ParquetFile]) -> Callable[[int], bytes]:
    """A function row -> bytes of the column of images, with rows numbered across all files in order.

    Reading ascending rows takes one pass; going back reads the row group again from its start. Each thread has its own
    cursor, so memory is a few dozen rows per thread for row groups of any size.

    Raises:
        Unreadable: raised by the returned function: the row is null or of another type, or its page is damaged.
        FileNotFoundError: raised by the returned function: a file was removed.
    """
    starts = np.cumsum([0, *(file.rows for file in files)])
    local = threading.local()

    def read(index: int) -> bytes:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        if getattr(local, "number", None) != number:
            local.number, local.cursor = number, _Cursor(files[number].path, files[number].image)
        value = local.cursor.value(index - int(starts[number]))
        if not isinstance(value, bytes):
            raise Unreadable("the row contains no bytes")
        return value

    return read


class _Cursor:
    """A position in a parquet file: the current batch, and an iterator over the rest of its row group."""

    def __init__(self, path: Path, column: Column) -> None:
        self._column = column
        self._file = opened(path)
        groups = [self._file.metadata.row_group(number) for number in range(self._file.metadata.num_row_groups)]
        self._groups = np.cumsum([0, *(group.num_rows for group in groups)])
        self._batch_rows = [_batch_rows(group, column) for group in groups]
        self._damage: dict[int, tuple[int, str]] = {}  # row group -> its first row that cannot be read, and why
        self._reset()

    def _reset(self) -> None:
        self._begin = self._end = self._stop = 0  # rows of the batch, and the end of its row group
        self._values: Any = None
        self._batches: Any = iter(())

    def value(self, row: int) -> Any:
        import pyarrow

        group = int(np.searchsorted(self._groups, row, side="right")) - 1
        first_damaged, why = self._damage.get(group, (row + 1, ""))
        if row >= first_damaged:  # known, so that a damaged row group is not read again for each of its rows
            raise Unreadable(why)
        try:
            if not self._begin <= row < self._stop:
                self._open_group(group)
            while row >= self._end:
                self._advance()
            return self._values[row - self._begin].as_py()
        except (pyarrow.ArrowException, OSError, ValueError, StopIteration) as error:
            why = f"{type(error).__name__}: {error}"
            self._damage[group] = (max(self._end, int(self._groups[group])), why)
            self._reset()
            raise Unreadable(why) from error

    def _open_group(self, group: int) -> None:
        self._begin = self._end = int(self._groups[group])
        self._stop = int(self._groups[group + 1])
        self._batches = self._file.iter_batches(
            batch_size=self._batch_rows[group], row_groups=[group], columns=[self._column.dotted], use_threads=False
        )

    def _advance(self) -> None:
        batch = next(self._batches)
        values = batch.column(batch.schema.get_field_index(self._column.name))
        values = getattr(values, "storage", values)
        if self._column.child is not None:
            values = values.field(self._column.child)
        self._begin, self._end, self._values = self._end, self._end + len(values), values


def _batch_rows(group: Any, column: Column) -> int:
    """How many rows of a row group are read at once: few if they are large."""
    chunks = [group.column(number) for number in range(group.num_columns)]
    size: int = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == column.dotted)
    rows: int = _BATCH_BYTES * group.num_rows // max(size, 1)
    return max(1, min(_BATCH_ROWS, rows))
