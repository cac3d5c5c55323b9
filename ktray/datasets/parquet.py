"""Encoded images in a column of parquet files, as published on data-set hubs.

The column holds the bytes themselves or a struct with a field `bytes`. The split of a file follows from the first word of its
name, or else of its folder: `train-00000-of-00002.parquet`, `validation/0000.parquet`. Rows are streamed, so only a few dozen
are in memory at a time.

Source: your own files, in the layout of Hugging Face's image data sets.
"""

from __future__ import annotations

import glob
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

from ktray.errors import UserError
from ktray.images import Source, Splits, data_folder, decode
from ktray.images.source import Unreadable
from ktray.spec import Split
from ktray.strict import StrictSpec

REVISION = 1
LOCATION: tuple[str, ...] = ("path",)
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SPLIT = re.compile(r"(train|validation|valid|val|test)(?![a-z])")


class Spec(StrictSpec):
    """`path` is a file, a folder or a pattern (`/p/**/*.parquet`); with `label: null`, no labels are read."""

    kind: Literal["parquet"] = "parquet"
    path: str
    image: str | None = Field(default=None, description="column with the images; null: the only column that can hold images")
    label: str | None = Field(default=None, description="column with the labels, integers or strings")
    size: int = Field(default=64, ge=8, le=2048, description="side in pixels to which images are resized")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")


def load(spec: Spec) -> Splits:
    """Find the files and read their footers and label columns.

    Raises:
        UserError: there are no files, a file belongs to no split, or a column is missing or of the wrong type.
    """
    files = _files(spec.path)
    by_split = _by_split(files)
    footers = {path: _footer(path) for _, path in files}
    columns = {_image_column(schema, spec.image, path) for path, (_, schema) in footers.items()}
    if len(columns) > 1:
        raise UserError(f"the files disagree about the image column: {', '.join(columns)}", where="data.image")
    column = columns.pop()
    values = {split: _label_values([path for _, path in split_files], spec.label) for split, split_files in by_split.items()}
    known = {value for labels in values.values() for value in labels or ()}
    classes = _classes(footers[files[0][1]][1], spec.label, known)
    numbers = {value: number for number, value in enumerate(classes)}
    sources = {}
    for split, split_files in by_split.items():
        counts = tuple(footers[path][0] for _, path in split_files)
        encoded = row_reader(tuple(path for _, path in split_files), counts, column)
        labels = values[split]
        sources[split] = Source(
            names=tuple(f"{split_files[i][0]}#{row}" for i, count in enumerate(counts) for row in range(count)),
            read=lambda index, encoded=encoded: decode(encoded(index), spec.size),  # type: ignore[misc]
            labels=None if labels is None else np.array([numbers[value] for value in labels], np.int64),
            classes=() if labels is None else tuple(classes.values()),
            encoded=encoded,
        )
    return Splits(train=sources["train"], val=sources.get("val"), test=sources.get("test"), files=files)


def _files(path: str) -> tuple[tuple[str, Path], ...]:
    """(relative name, path) of each parquet file, sorted by name."""
    source = data_folder(path)
    if source.is_file():
        return ((source.name, source),)
    pattern = source / "**" / "*.parquet" if source.is_dir() else source
    found = [Path(match) for match in glob.glob(str(pattern), recursive=True) if Path(match).is_file()]
    if not found:
        raise UserError(
            f"there are no parquet files at {source}", where="data.path", instead="Give a file, a folder or a pattern."
        )
    root = source
    while not root.is_dir():
        root = root.parent
    return tuple(sorted((file.relative_to(root).as_posix(), file) for file in found))


def _by_split(files: tuple[tuple[str, Path], ...]) -> dict[str, list[tuple[str, Path]]]:
    """Files by split; a single file, or files without any split in their names, are all for training."""
    splits = {name: _split_of(name) for name, _ in files}
    if len(files) == 1 or set(splits.values()) == {None}:
        return {"train": list(files)}
    by_split: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for name, path in files:
        split = splits[name]
        if split is None:
            raise UserError(
                f"{name} belongs to no split, although other files do",
                where="data.path",
                instead="Start its name with train, val or test, or leave it out by a pattern in 'path'.",
            )
        by_split[split].append((name, path))
    if "train" not in by_split:
        raise UserError("there are no training files", where="data.path", instead="Name them train*.parquet.")
    return by_split


def _split_of(name: str) -> str | None:
    words = (_SPLIT.match(part) for part in reversed(name.lower().split("/")))
    return next((_SPLITS[word[1]] for word in words if word), None)


def _footer(path: Path) -> tuple[int, Any]:
    """Number of rows, and the Arrow schema with its metadata."""
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            return file.metadata.num_rows, file.schema_arrow
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a parquet file: {error}", where="data.path", instead="Fetch it again.") from error


def _image_column(schema: Any, wanted: str | None, path: Path) -> str:
    """Dotted name of the binary column; `image.bytes` for a struct."""
    from pyarrow import types

    def is_bytes(kind: Any) -> bool:
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    found: dict[str, str] = {}
    for field in schema:
        if is_bytes(field.type):
            found[field.name] = field.name
        elif types.is_struct(field.type) and any(part.name == "bytes" and is_bytes(part.type) for part in field.type):
            found[field.name] = f"{field.name}.bytes"
    if wanted is None and len(found) == 1:
        return next(iter(found.values()))
    if wanted in found:
        return found[wanted]
    problem = f"{path} has no column {wanted!r} of encoded images" if wanted else f"{path}: which column has the images?"
    raise UserError(problem, where="data.image", instead=f"Columns that can hold images: {', '.join(found) or 'none'}.")


def _label_values(paths: list[Path], column: str | None) -> list[Any] | None:
    """The labels of all rows; None if no column is given or all labels are hidden (null or -1), as in hubs' test splits."""
    from pyarrow import parquet, types

    if column is None:
        return None
    values: list[Any] = []
    for path in paths:
        with parquet.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                known = ", ".join(file.schema_arrow.names)
                raise UserError(f"{path} has no column {column!r}", where="data.label", instead=f"It has {known}.")
            kind = file.schema_arrow.field(column).type
            if not (types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind)):
                raise UserError(f"the column {column!r} holds {kind}", where="data.label", instead="Use integers or strings.")
            values += file.read(columns=[column]).column(0).to_pylist()
    hidden = sum(value is None or value == -1 for value in values)
    if 0 < hidden < len(values):
        raise UserError(f"{hidden} of {len(values)} values of {column!r} are null or -1", where="data.label")
    return None if hidden else values


def _classes(schema: Any, column: str | None, known: set[Any]) -> dict[Any, str]:
    """Label value -> class name, in class order: from the hub's metadata if present, else the sorted values."""
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = metadata.get("info", {}).get("features", {}).get(column, {}).get("names")
    if names and known <= set(range(len(names))):
        return dict(enumerate(names))
    return {value: str(value) for value in sorted(known)}


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
