"""Bytes out of the rows of parquet files, a few at a time."""

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
    """A function row -> bytes of a column, over all files in their order.

    Ascending rows cost one pass; a step back costs the row group's beginning again. Every thread has its own place, so memory
    is a few dozen rows per thread, whatever the size of a row group.

    Args:
        paths: parquet files.
        counts: number of rows of each file.
        column: dotted name of a binary column, such as ``image.bytes``.

    Raises:
        Unreadable: by the function, not here: the row holds no bytes (null, or another type), or its page is damaged.
        FileNotFoundError: by the function: a file is gone.
    """
    starts = np.cumsum([0, *counts])
    places = threading.local()

    def read(index: int) -> bytes:
        number = int(np.searchsorted(starts, index, side="right")) - 1
        if getattr(places, "number", None) != number:
            places.number, places.cursor = number, _Cursor(paths[number], column)
        value = places.cursor.value(index - int(starts[number]))
        if not isinstance(value, bytes):
            raise Unreadable("the row holds no bytes")
        return value

    return read


class _Cursor:
    """A place in one parquet file: the batch last read, and the batches of its row group that follow."""

    def __init__(self, path: Path, column: str) -> None:
        from pyarrow import parquet

        self._column = column
        # Buffered and not mapped: otherwise a whole column chunk, often hundreds of megabytes, is read at once.
        self._file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, memory_map=False, pre_buffer=False)
        groups = self._file.metadata
        self._groups = np.cumsum([0, *(groups.row_group(i).num_rows for i in range(groups.num_row_groups))])
        self._forget()

    def _forget(self) -> None:
        self._begin = self._end = self._stop = 0  # rows of the batch, and the end of its row group
        self._values: Any = None
        self._batches: Any = iter(())

    def value(self, row: int) -> Any:
        try:
            if not self._begin <= row < self._stop:
                self._enter(int(np.searchsorted(self._groups, row, side="right")) - 1)
            while row >= self._end:
                self._advance()
            return self._values[row - self._begin].as_py()
        except (OSError, ValueError, StopIteration) as error:  # what pyarrow raises on damaged pages
            self._forget()
            raise Unreadable(f"{type(error).__name__}: {error}") from error

    def _enter(self, group: int) -> None:
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
