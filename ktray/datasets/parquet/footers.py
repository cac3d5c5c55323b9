"""What the footers of parquet files say: whether the files are intact, and which column has the images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktray.errors import UserError
from ktray.file_kind import require_readable, what_it_is
from ktray.images.file_patterns import some

MIB = 1 << 20
_BUFFER_BYTES = MIB


@dataclass(frozen=True)
class Column:
    """A column of a file, or with `child` a field of a column of structs."""

    name: str
    child: str | None = None

    @property
    def dotted(self) -> str:
        """The path by which parquet knows it, such as ``image.bytes``."""
        return self.name if self.child is None else f"{self.name}.{self.child}"


@dataclass(frozen=True)
class ParquetFile:
    """What is known of a parquet file from its footer.

    Attributes:
        name: path relative to the data set's root.
        rows: number of rows.
        schema: pyarrow.Schema.
        image: the column of encoded images.
    """

    name: str
    path: Path
    rows: int
    schema: Any
    image: Column


def opened(path: Path) -> Any:
    """The open `pyarrow.parquet.ParquetFile`; checksums of pages are verified where the file has them."""
    from pyarrow import parquet

    # Buffered, not memory-mapped: otherwise a whole column chunk, often hundreds of megabytes, is read at once.
    return parquet.ParquetFile(
        path, buffer_size=_BUFFER_BYTES, memory_map=False, pre_buffer=False, page_checksum_verification=True
    )


def open_file(name: str, path: Path, image: str | None, label: str | None) -> ParquetFile:
    """Read the footer of a file.

    Args:
        image: name of the column of images; null: the only one that can hold images.
        label: name of the column of labels, if they are wanted.

    Raises:
        UserError: it is no parquet file, is damaged, or has no such column of images or several.
    """
    require_readable(path, "data.path")
    with damage_of(path), opened(path) as file:
        column = _image_column(path, file.schema_arrow, image, label)
        _check_sizes(path, file.metadata)
        return ParquetFile(name, path, file.metadata.num_rows, file.schema_arrow, column)


def columns_of(schema: Any) -> str:
    """Names and types of the columns, for messages."""
    return some((f"{name} ({schema.field(at).type})" for at, name in enumerate(schema.names)), 20) or "no columns"


@contextmanager
def damage_of(path: Path, column: str = "") -> Iterator[None]:
    """Turns pyarrow's errors about a file into one that says what the file is."""
    import pyarrow

    try:
        yield
    except UnicodeEncodeError as error:
        name = os.fsencode(path).decode("utf-8", "backslashreplace")
        raise UserError(f"the name of {name} is not UTF-8", where="data.path", instead="Rename it.") from error
    except UnicodeDecodeError as error:
        what = f"the column {column!r} of {path}" if column else f"{path}"
        wrong = error.object[error.start : error.start + 1].hex()
        instead = "Write the column as UTF-8 text." if column else "Write its names of columns as UTF-8."
        raise UserError(f"{what} has text that is not UTF-8: the byte 0x{wrong}", "data.path", instead) from error
    except (pyarrow.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        why, instead = _diagnosis(path, " ".join(str(error).split()))
        what = f"the column {column!r} cannot be read: {path}" if column else str(path)
        raise UserError(f"{what} {why}", where="data.path", instead=instead) from error


def _diagnosis(path: Path, error: str) -> tuple[str, str]:
    """Why a file cannot be read, as the end of a sentence, and what to do."""
    try:
        found, instead = what_it_is(path)
        with open(path, "rb") as file:
            start = file.read(4)
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4))
            end = file.read(4)
    except OSError as unreadable:
        return f"cannot be read: {unreadable.strerror}", "Change its permissions."
    if b"PARE" in (start, end):
        return "is encrypted", "Write it without encryption."
    if start == b"PAR1":
        return ("has no end", _AGAIN) if end != b"PAR1" else (f"is damaged: {error}", _AGAIN)
    return f"is no parquet file: it {found or f'begins with {start!r}'}", instead or "Leave it out by a pattern in 'path'."


_AGAIN = "Fetch it again."


def _check_sizes(path: Path, footer: Any) -> None:
    """Compare what the footer claims with itself, before anything is named, read or hashed.

    It asks for row groups alone: pyarrow ends the process where the description of a column chunk is damaged.

    Raises:
        UserError: the row groups have other rows, or there are more rows than images fit.
    """
    groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
    if footer.num_rows != sum(group.num_rows for group in groups) or any(group.num_rows < 0 for group in groups):
        raise damaged(path, f"its footer says {footer.num_rows} rows, but not those of its row groups")
    held = sum(group.total_byte_size for group in groups)
    if footer.num_rows > MIB and footer.num_rows > held:
        raise damaged(path, f"it cannot hold images in {footer.num_rows:,} rows: there are only {held:,} bytes of columns")


def damaged(path: Path, why: str) -> UserError:
    """The error to raise about a damaged file."""
    return UserError(f"{path} is damaged: {why}", where="data.path", instead=_AGAIN)


def stored(kind: Any) -> Any:
    """The type of the values: that of a dictionary's entries, and what an extension type is stored as."""
    from pyarrow import BaseExtensionType, types

    while types.is_dictionary(kind) or isinstance(kind, BaseExtensionType):
        kind = kind.value_type if types.is_dictionary(kind) else kind.storage_type
    return kind


def is_bytes(kind: Any) -> bool:
    """Whether an Arrow type holds bytes of any length."""
    return str(stored(kind)) in ("binary", "large_binary", "binary_view")


def _image_column(path: Path, schema: Any, wanted: str | None, label: str | None) -> Column:
    from pyarrow import types

    found = []
    for part in schema:
        kind = stored(part.type)
        if is_bytes(kind):
            found.append(Column(part.name))
        elif types.is_struct(kind) and any(inner.name == "bytes" and is_bytes(inner.type) for inner in kind):
            found.append(Column(part.name, "bytes"))
    chosen = [column for column in found if wanted in (None, column.name)]
    if wanted is None and len(chosen) > 1:  # texts are sometimes written as bytes
        chosen = [column for column in chosen if column.name != label]
    if len(chosen) == 1 and schema.names.count(chosen[0].name) == 1:
        return chosen[0]
    names = some(dict.fromkeys(column.name for column in found)) or "none"
    if chosen and len({column.name for column in chosen}) == 1:
        raise UserError(f"{path} has several columns named {chosen[0].name!r}", "data.image", "Rename one of them.")
    if wanted is None and len(chosen) > 1:
        raise UserError(f"several columns of {path} can hold images", "data.image", f"Name one of {names}.")
    raise UserError(
        f"{path} has no column {f'{wanted!r} ' if wanted else ''}of encoded images",
        where="data.image",
        instead=f"Columns that can hold images: {names}. The file has {columns_of(schema)}.",
    )
