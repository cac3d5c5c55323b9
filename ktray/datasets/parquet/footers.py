"""What the footers of parquet files say: whether the files are intact, and which column has the images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktray.errors import UserError

MIB = 1 << 20
_BUFFER_BYTES = MIB


@dataclass(frozen=True)
class ParquetFile:
    """A parquet file whose footer has been read.

    Attributes:
        name: path relative to the data set's root.
        schema: pyarrow.Schema.
        metadata: pyarrow.parquet.FileMetaData.
        columns: names and types of the columns, for messages.
    """

    name: str
    path: Path
    rows: int
    schema: Any
    metadata: Any
    columns: str


@dataclass(frozen=True)
class Column:
    """A column of a file, or with `child` a field of a column of structs."""

    name: str
    child: str | None = None

    @property
    def dotted(self) -> str:
        """The path by which parquet knows it, such as ``image.bytes``."""
        return self.name if self.child is None else f"{self.name}.{self.child}"


def some(items: Iterable[str], shown: int = 5) -> str:
    """The first few of some texts."""
    found = list(items)
    return ", ".join(found[:shown]) + (f" and {len(found) - shown} more" if len(found) > shown else "")


def opened(path: Path) -> Any:
    """The open `pyarrow.parquet.ParquetFile`; checksums of pages are verified where the file has them."""
    from pyarrow import parquet

    # Buffered, not memory-mapped: otherwise a whole column chunk, often hundreds of megabytes, is read at once.
    return parquet.ParquetFile(
        path, buffer_size=_BUFFER_BYTES, memory_map=False, pre_buffer=False, page_checksum_verification=True
    )


def open_file(name: str, path: Path) -> ParquetFile:
    """Read the footer of a file.

    Raises:
        UserError: it is no parquet file, or is damaged.
    """
    with damage_of(path), opened(path) as file:
        metadata, schema = file.metadata, file.schema_arrow
        columns = [f"{name} ({schema.field(at).type})" for at, name in enumerate(schema.names)]
        rows = sum(metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        if rows != metadata.num_rows or any(metadata.row_group(group).num_rows < 0 for group in range(metadata.num_row_groups)):
            raise ValueError(f"its footer says {metadata.num_rows} rows, and those of its row groups {rows}")
    return ParquetFile(name, path, rows, schema, metadata, some(columns, 20))


@contextmanager
def damage_of(path: Path, column: str = "") -> Iterator[None]:
    """Turns pyarrow's errors about a file into one that says what the file is."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        what = f"the column {column!r} of {path} cannot be read" if column else f"{path} is not a parquet file"
        why, instead = _diagnosis(path, " ".join(str(error).split()))
        raise UserError(f"{what}: {why}", where="data.path", instead=instead) from error


def _diagnosis(path: Path, error: str) -> tuple[str, str]:
    """Why a file cannot be read, and what to do."""
    try:
        with open(path, "rb") as file:
            start, size = file.read(200), os.fstat(file.fileno()).st_size
            file.seek(max(0, size - 4))
            end = file.read(4)
    except OSError as unreadable:
        return f"{unreadable.strerror}", "Change its permissions."
    if not size:
        return "it is empty", "Fetch it again."
    if start.startswith(b"version https://git-lfs"):
        return "it is the pointer of a file in Git LFS", "Fetch the file itself: git lfs pull."
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page", "Fetch the file itself; the address may need a login."
    if b"PARE" in (start[:4], end):
        return "it is encrypted", "Write it without encryption."
    if start.startswith(b"PAR1") and end != b"PAR1":
        return "its end is missing", "Fetch it again."
    if start.startswith(b"PAR1"):
        return f"it is damaged: {error}", "Fetch it again."
    return f"it begins with {start[:12]!r}", "Give parquet files, or leave it out by a pattern in 'path'."


_MAX_LABEL_BYTES = 1 << 30
MIB = 1 << 20


def check_sizes(file: ParquetFile, column: str, label: str | None) -> None:
    """Compare what the footer claims with the size of the file, before anything is read or hashed.

    Raises:
        UserError: columns end behind the file, most of the file belongs to no column, there are more rows than images fit, no
            row has an image, or the labels take more than a gibibyte.
    """
    size, total, image_bytes, label_bytes, nulls = file.path.stat().st_size, 0, 0, 0, 0
    for group in map(file.metadata.row_group, range(file.metadata.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            start = min(chunk.dictionary_page_offset or chunk.data_page_offset, chunk.data_page_offset)
            if start < 0 or chunk.total_compressed_size < 0 or start + chunk.total_compressed_size > size:
                raise damaged(file, f"its footer places {chunk.path_in_schema!r} behind its end")
            total += chunk.total_compressed_size
            if chunk.path_in_schema == column:
                image_bytes += chunk.total_uncompressed_size
                known = chunk.statistics if chunk.is_stats_set else None
                nulls += known.null_count if known is not None and known.has_null_count else 0
            elif chunk.path_in_schema == label:
                label_bytes += chunk.total_uncompressed_size
    if size > 2 * total + file.metadata.serialized_size + 64 * MIB:
        raise damaged(file, f"it has {size:,} bytes, of which its columns take {total:,}")
    if file.rows > MIB and file.rows > image_bytes:
        raise damaged(file, f"it cannot hold images in {file.rows:,} rows: the column {column!r} has {image_bytes:,} bytes")
    if label_bytes > _MAX_LABEL_BYTES:
        raise UserError(f"the column {label!r} of {file.path} has {label_bytes:,} bytes", "data.label", "Labels are short.")
    if nulls == file.rows > 0:
        raise UserError(
            f"no row of {file.path} holds an image: {column!r} is null everywhere",
            where="data.image",
            instead="Files that only name paths cannot be used; write the images' bytes into them, or use imagefolder.",
        )


def damaged(file: ParquetFile, why: str) -> UserError:
    """The error to raise about a damaged file."""
    return UserError(f"{file.path} is damaged: {why}", where="data.path", instead="Fetch it again.")


def stored(kind: Any) -> Any:
    """The type of the values: that of a dictionary's entries, and what an extension type is stored as."""
    from pyarrow import BaseExtensionType, types

    while types.is_dictionary(kind) or isinstance(kind, BaseExtensionType):
        kind = kind.value_type if types.is_dictionary(kind) else kind.storage_type
    return kind


def is_bytes(kind: Any) -> bool:
    """Whether an Arrow type holds bytes of any length."""
    return str(stored(kind)) in ("binary", "large_binary", "binary_view")


def image_columns(files: list[ParquetFile], wanted: str | None, label: str | None) -> dict[str, Column]:
    """Name of each file -> its column of bytes; it has the same name in all files.

    Raises:
        UserError: a file has no such column, several, or two of that name.
    """
    columns = {file.name: _image_column(file, wanted, label) for file in files}
    examples = {column.name: name for name, column in columns.items()}
    if len(examples) > 1:
        found = some(f"{column} in {name}" for column, name in examples.items())
        raise UserError(f"the images are in differently named columns: {found}", "data.image", "Rename them alike.")
    return columns


def _image_column(file: ParquetFile, wanted: str | None, label: str | None) -> Column:
    from pyarrow import types

    found = []
    for part in file.schema:
        kind = stored(part.type)
        if is_bytes(kind):
            found.append(Column(part.name))
        elif types.is_struct(kind) and any(inner.name == "bytes" and is_bytes(inner.type) for inner in kind):
            found.append(Column(part.name, "bytes"))
    chosen = [column for column in found if wanted in (None, column.name)]
    if wanted is None and len(chosen) > 1:  # texts are sometimes written as bytes
        chosen = [column for column in chosen if column.name != label]
    if len(chosen) == 1 and file.schema.names.count(chosen[0].name) == 1:
        return chosen[0]
    names = some(dict.fromkeys(column.name for column in found)) or "none"
    if chosen and len({column.name for column in chosen}) == 1:
        raise UserError(f"{file.path} has several columns named {chosen[0].name!r}", "data.image", "Rename one of them.")
    if wanted is None and len(chosen) > 1:
        raise UserError(f"several columns of {file.path} can hold images", "data.image", f"Name one of {names}.")
    raise UserError(
        f"{file.path} has no column {f'{wanted!r} ' if wanted else ''}of encoded images",
        where="data.image",
        instead=f"Columns that can hold images: {names}. The file has {file.columns or 'no columns'}.",
    )
