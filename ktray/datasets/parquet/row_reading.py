"""Reading of encoded images row by row from parquet files of any size."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ktray.datasets.parquet.footers import MIB, Column, ParquetFile, opened
from ktray.errors import UserError
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
        self._batch_rows = [_batch_rows(group) for group in groups]
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

    def batches(self) -> Iterator[Any]:
        """The column of all rows, a few at a time."""
        for group in range(len(self._groups) - 1):
            yield from self._batches_of(group)

    def _batches_of(self, group: int) -> Iterator[Any]:
        for batch in self._file.iter_batches(
            batch_size=self._batch_rows[group], row_groups=[group], columns=[self._column.dotted], use_threads=False
        ):
            values = batch.column(batch.schema.get_field_index(self._column.name))
            values = getattr(values, "storage", values)
            yield values if self._column.child is None else values.field(self._column.child)

    def _open_group(self, group: int) -> None:
        self._begin = self._end = int(self._groups[group])
        self._stop = int(self._groups[group + 1])
        self._batches = self._batches_of(group)

    def _advance(self) -> None:
        values = next(self._batches)
        self._begin, self._end, self._values = self._end, self._end + len(values), values


def _batch_rows(group: Any) -> int:
    """How many rows of a row group are read at once: few if they are large."""
    rows: int = _BATCH_BYTES * group.num_rows // max(group.total_byte_size, 1)
    return max(1, min(_BATCH_ROWS, rows))


def refuse_empty_images(file: ParquetFile) -> None:
    """Check that some row of a file has bytes; null rows cost nothing to read, so the search ends soon.

    Raises:
        UserError: all rows are null, as in files that only name the paths of images.
    """
    import pyarrow

    cursor = _Cursor(file.path, file.image)
    try:
        if any(values.null_count < len(values) for values in cursor.batches()):
            return
    except (pyarrow.ArrowException, OSError, ValueError):
        return  # damage is reported row by row
    raise UserError(
        f"no row of {file.path} holds an image: {file.image.dotted!r} is null everywhere",
        where="data.image",
        instead="Files that only name paths cannot be used; write the images' bytes into them, or use imagefolder.",
    )
