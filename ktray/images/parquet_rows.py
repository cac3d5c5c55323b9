"""Random access to binary values in parquet files, with little memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ktray.images.source import Unreadable

_BATCH_ROWS = 32
_BUFFER_BYTES = 1 << 20


def row_reader(paths: tuple[Path, ...], counts: tuple[int, ...], column: str) -> Callable[[int], bytes]:
    """A function row -> bytes of a column, with rows numbered across all files in order.

    Reading ascending rows takes one pass; going back reads the row group again from its start. Each thread has its own
    cursor, so memory is a few dozen rows per thread for row groups of any size.

    Args:
        paths: parquet files.
        counts: number of rows of each file.
        column: dotted name of a binary column, such as ``image.bytes``.

    Raises:
        Unreadable: raised by the returned function: the row is null or of another type, or its page is damaged.
        FileNotFoundError: raised by the returned function: a file was removed.
    """
    starts = np.cumsum([0, *counts])
    local = threading.local()

    def read(index: int) -> bytes:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        if getattr(local, "number", None) != number:
            local.number, local.cursor = number, _Cursor(paths[number], column)
        value = local.cursor.value(index - int(starts[number]))
        if not isinstance(value, bytes):
            raise Unreadable("the row contains no bytes")
        return value

    return read


class _Cursor:
    """A position in a parquet file: the current batch, and an iterator over the rest of its row group."""

    def __init__(self, path: Path, column: str) -> None:
        from pyarrow import parquet

        self._column = column
        # Buffered, not memory-mapped: otherwise a whole column chunk, often hundreds of megabytes, is read at once.
        self._file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, memory_map=False, pre_buffer=False)
        groups = self._file.metadata
        self._groups = np.cumsum([0, *(groups.row_group(i).num_rows for i in range(groups.num_row_groups))])
        self._reset()

    def _reset(self) -> None:
        self._begin = self._end = self._stop = 0  # rows of the batch, and the end of its row group
        self._values: Any = None
        self._batches: Any = iter(())

    def value(self, row: int) -> Any:
        try:
            if not self._begin <= row < self._stop:
                self._open_group(int(np.searchsorted(self._groups, row, side="right")) - 1)
            while row >= self._end:
                self._advance()
            return self._values[row - self._begin].as_py()
        except (OSError, ValueError, StopIteration) as error:  # raised by pyarrow for damaged pages
            self._reset()
            raise Unreadable(f"{type(error).__name__}: {error}") from error

    def _open_group(self, group: int) -> None:
        self._begin = self._end = int(self._groups[group])
        self._stop = int(self._groups[group + 1])
        self._batches = self._file.iter_batches(
            batch_size=_BATCH_ROWS, row_groups=[group], columns=[self._column], use_threads=False
        )

    def _advance(self) -> None:
        values = next(self._batches).column(0)
        for field in self._column.split(".")[1:]:
            values = values.field(field)
        self._begin, self._end, self._values = self._end, self._end + len(values), values
