"""Precomputed features: rows of a .npy or .parquet file, looked up by the path of each image."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import progress
from ktray.errors import UserError
from ktray.features import extraction
from ktray.file_kind import require_readable, what_it_is
from ktray.fingerprint import FileVersion, file_version
from ktray.images import Images
from ktray.local_path import local_path
from ktray.spec import Columns, PrecomputedTeacher
from ktray.text import as_read, counted, written_differently

IDENTITY, REVISION = "precomputed_features", 1
TOOLS = (extraction,)

WHERE = "teacher.features"
_NPY, _PARQUET = b"\x93NUMPY", b"PAR1"
_WRITE_AGAIN = "Write or copy it again."
_INSTEAD = "Mend the row, or scale the features, and write the file again."
_FEW_ROWS, _FEW_VALUES = 1_000_000, 100_000_000  # in a parquet; more must be borne out by its size
_MOST_VALUES_OF_A_BYTE = 100
Read = Callable[[Sequence[str]], NDArray[np.float32]]
"""Paths of n images -> their features (n, D) float32, not checked to be finite."""


def feature_files(teacher: PrecomputedTeacher) -> dict[str, Path]:
    """Spec field -> absolute path, for each file of the teacher.

    Raises:
        UserError: a file does not exist.
    """
    named = {"features": teacher.features, "names": teacher.names}
    found = {field: local_path(path, f"teacher.{field}").absolute() for field, path in named.items() if path is not None}
    for field, path in found.items():
        if not path.is_file():
            raise UserError(f"there is no file {path.name} in {path.parent}", f"teacher.{field}")
    return found


def matched_by_row(teacher: PrecomputedTeacher) -> bool:
    """Whether rows are matched to the images of one data set by their order, because the file has no paths."""
    return teacher.names is None and not teacher.features.endswith(".parquet")


def row_numbers(teacher: PrecomputedTeacher, in_order: Sequence[str]) -> Mapping[str, int]:
    """Path of an image -> its row. Reads the paths, but of the features only shape and type.

    Args:
        in_order: paths of all training images of the data set, for a file without paths.

    Raises:
        UserError: not (N, D) floats, different numbers of paths and rows, or a duplicate path.
    """
    found = feature_files(teacher)
    path = found["features"]
    if matched_by_row(teacher):
        count, names = len(_array(path)), tuple(in_order)
        if count != len(names):
            raise UserError(
                f"{path.name} has {counted(count, 'row')}, but the data set has {counted(len(names), 'training image')}",
                WHERE,
                "Without 'names', row i belongs to the i-th training image: give a row for each, or a file of names.",
            )
    elif path.suffix == ".parquet":
        names = _column_of_paths(path, (teacher.columns or Columns()), file_version(path.stat()))
        count = len(names)
    else:
        count, names = len(_array(path)), _names(found["names"], file_version(found["names"].stat()))
        if count != len(names):
            raise UserError(
                f"{path.name} has {counted(count, 'row')}, but {found['names'].name} has {counted(len(names), 'path')}",
                "teacher.names",
            )
    rows = {name: row for row, name in enumerate(names)}
    if len(rows) < len(names):
        name, times = Counter(names).most_common(1)[0]
        raise UserError(f"the path {name!r} occurs {times} times", WHERE, "Give one row per image.")
    return rows


def refuse_missing(rows: Mapping[str, int], names: Sequence[str], of: str) -> None:
    """Raise if there are images without features.

    Args:
        names: paths of the images.
        of: what the images are, for the message, such as ``training images of data.cluster``.

    Raises:
        UserError: the message has their number, the first path, and an example of the paths in the file.
    """
    missing = [name for name in names if name not in rows]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} {of} have no features, the first is {missing[0]!r}",
            WHERE,
            f"Use the paths of the data set; {_similar(missing[0], rows)}.",
        )


def _similar(name: str, rows: Mapping[str, int]) -> str:
    """What the file has in place of a path: one that looks the same, one of a file of the same name, or just its first."""
    read, file = as_read(name), PurePosixPath(name).name
    for known in rows:
        if as_read(known) == read:
            return f"the file has {known!r}: {written_differently(name, known)}"
    of_same_file = (known for known in rows if PureWindowsPath(known).name == file)
    return f"the file has paths such as {next(of_same_file, next(iter(rows), ''))!r}"


def open_features(teacher: PrecomputedTeacher, in_order: Sequence[str]) -> Read:
    """A function that returns the features of images by path. A .npy is memory-mapped, a .parquet is loaded into memory.

    Raises:
        UserError: as `row_numbers`; a row of a .parquet is null or of another length; when called, an image has no features.
    """
    rows = row_numbers(teacher, in_order)
    path = feature_files(teacher)["features"]
    column = (teacher.columns or Columns()).features
    if path.suffix == ".parquet":
        values, unusable = _values(path, column, len(rows))
    else:
        values, unusable = _array(path), {}

    def read(names: Sequence[str]) -> NDArray[np.float32]:
        refuse_missing(rows, names, "images")
        numbers = [rows[name] for name in names]
        found, beyond = _as_float32(np.asarray(values[numbers]))
        of_names = {**beyond, **{at: unusable[row] for at, row in enumerate(numbers) if row in unusable}}
        if of_names:
            at = min(of_names)
            raise UserError(f"row {numbers[at]} of {path.name} ({names[at]}) has {of_names[at]}", WHERE, _INSTEAD)
        return found

    return read


def write(read: Read, images: Images, dtype: str, out: Path) -> dict[str, float]:
    """Write the features of all images in shards, like `extraction.write`; returns `count`, `dim` and `images_per_s`.

    Raises:
        UserError: an image has no features.
        ValueError: a feature is not finite or, in float16, too large; the message names the first such image.
    """
    began, width = time.perf_counter(), 0
    for start in range(0, len(images), extraction.SHARD_ROWS):
        rows = read_rows(read, images, start, start + extraction.SHARD_ROWS)
        with np.errstate(over="ignore"):
            stored = rows.astype(dtype)
        extraction.require_finite(stored, images, start, exact=rows)
        np.save(out / f"features-{start // extraction.SHARD_ROWS:05d}.npy", stored)
        width = rows.shape[1]
        progress.advance("images", len(rows))
    seconds = time.perf_counter() - began
    return {"count": float(len(images)), "dim": float(width), "images_per_s": len(images) / seconds}


def read_rows(read: Read, images: Images, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Features (n, D) float32 of the images in [start, stop).

    Raises:
        UserError, ValueError: as `write`.
    """
    rows = read(images.names[start:stop])
    extraction.require_finite(rows, images, start)
    return rows


def check_header(path: Path) -> None:
    """Check that a file is the .npy or .parquet that its name says, and can hold what it claims; reads its header alone.

    Raises:
        UserError: it is another kind of file, cut off, or claims more than its bytes can hold.
    """
    if path.suffix == ".parquet":
        _parquet(path)
    else:
        require_readable(path, WHERE)
        _check_npy(path, WHERE)


def check_names_header(path: Path) -> None:
    """`check_header` for a file of names: a .npy or a text."""
    require_readable(path, "teacher.names")
    if path.suffix == ".npy":
        _check_npy(path, "teacher.names")


def _check_npy(path: Path, where: str) -> None:
    """Compare what the header of a .npy claims with the size of the file.

    Args:
        where: dotted path of the field, for errors.
    """
    with open(path, "rb") as file:
        if file.read(len(_NPY)) != _NPY:
            found, instead = what_it_is(path)
            said = f" but {found}" if found else ""
            raise UserError(f"{path.name} is not a .npy file of numbers{said}", where, instead or "Write it with numpy.save.")
        file.seek(0)
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except Exception as error:  # NumPy evaluates a text of the file, which raises whatever is wrong with it
            raise UserError(f"{path.name} is a damaged .npy file: its header cannot be read", where, _WRITE_AGAIN) from error
        start = file.tell()
    if dtype.hasobject:
        raise UserError(
            f"{path.name} is not a .npy file of numbers: it contains pickled objects", where, "Write an array of numbers."
        )
    if any(type(length) is not int or length < 0 for length in shape):
        raise UserError(f"{path.name} is a damaged .npy file: it claims the shape {shape}", where, _WRITE_AGAIN)
    size, needed = path.stat().st_size, start + math.prod(shape) * dtype.itemsize
    if size != needed:
        what = "is cut off" if size < needed else "contains more than one array"
        raise UserError(
            f"{path.name} {what}: it has {size:,} bytes, and its header claims {shape} of {dtype}, which are {needed:,}",
            where,
            _WRITE_AGAIN,
        )


def _array(path: Path) -> NDArray[Any]:
    """(N, D) floats, memory-mapped."""
    check_header(path)
    try:
        found: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:  # the file is being replaced
        raise UserError(f"{path.name} is not a .npy file of numbers", WHERE, "Write it with numpy.save.") from error
    if found.ndim != 2 or 0 in found.shape or found.dtype.kind != "f":
        raise UserError(
            f"{path.name} contains an array {found.shape} of {found.dtype}",
            WHERE,
            "Features must be (N, D) of float16, float32 or float64.",
        )
    return found


@lru_cache(maxsize=8)
def _names(path: Path, version: FileVersion) -> tuple[str, ...]:
    check_names_header(path)
    try:
        if path.suffix != ".npy":
            return _lines(path)
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{path.name} is not a list of paths", "teacher.names", "Write one path per line, in UTF-8.") from error
    if not isinstance(found, np.ndarray) or found.ndim != 1 or found.dtype.kind != "U":
        raise UserError(
            f"{path.name} does not contain strings (N,)", "teacher.names", "Write it with numpy.save(path, numpy.array(paths))."
        )
    return tuple(str(name).removeprefix("./") for name in found)


def _lines(path: Path) -> tuple[str, ...]:
    """The paths in a text of one path per line; a path may hold anything but a line break."""
    text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    lines = text.removesuffix("\n").split("\n") if text else []
    if "" in lines:
        raise UserError(
            f"line {lines.index('') + 1} of {path.name} is empty", "teacher.names", "Give the path of one image in each line."
        )
    return tuple(line.removeprefix("./") for line in lines)


@lru_cache(maxsize=8)
def _column_of_paths(path: Path, columns: Columns, version: FileVersion) -> tuple[str, ...]:
    import pyarrow

    schema = (file := _parquet(path)).schema_arrow
    for role, column in columns.model_dump().items():
        count = schema.names.count(column)
        if count != 1:
            raise UserError(
                f"{path.name} has {count or 'no'} column{'s' * (count > 1)} {column!r}",
                f"teacher.columns.{role}",
                f"It has {', '.join(schema.names)}.",
            )
    kind = schema.field(columns.features).type
    if not _is_list(kind) or not pyarrow.types.is_floating(kind.value_type):
        raise UserError(
            f"the column {columns.features!r} contains {kind}", "teacher.columns.features", "Features must be lists of floats."
        )
    found = file.read(columns=[columns.path]).column(0).to_pylist()
    if not found or not all(isinstance(name, str) for name in found):
        raise UserError(f"the column {columns.path!r} must contain only strings", "teacher.columns.path")
    return tuple(name.removeprefix("./") for name in found)


def _is_list(kind: Any) -> bool:
    """Whether an Arrow type is a list of any kind."""
    from pyarrow import types

    checks = (types.is_list, types.is_large_list, types.is_fixed_size_list, types.is_list_view, types.is_large_list_view)
    return any(check(kind) for check in checks)


def _batches(path: Path, column: str) -> Iterator[Any]:
    """A column of lists, some rows at a time.

    Raises:
        UserError: the column cannot be read.
    """
    from pyarrow import ArrowException

    try:
        for batch in _parquet(path).iter_batches(columns=[column], batch_size=extraction.SHARD_ROWS):
            yield batch.column(0)
    except ArrowException as error:  # Arrow writes a null row among lists of one length, but does not read it
        raise UserError(
            f"the column {column!r} of {path.name} cannot be read: {' '.join(str(error).split())}",
            WHERE,
            "A row may be null: leave it out, or write the column as lists of any length.",
        ) from error


def _parquet(path: Path) -> Any:
    """The opened file, after a comparison of what it claims with its size: a few bytes can stand for billions of equal rows."""
    from pyarrow import ArrowException, parquet

    require_readable(path, WHERE)
    try:
        found = parquet.ParquetFile(path)
    except (ArrowException, OSError, ValueError) as error:
        is_one = path.open("rb").read(len(_PARQUET)) == _PARQUET
        kind, instead = ("is cut off or damaged", _WRITE_AGAIN) if is_one else what_it_is(path)
        raise UserError(f"{path.name} is not a parquet file{f': it {kind}' if kind else ''}", WHERE, instead) from error
    size, metadata = path.stat().st_size, found.metadata
    values = sum(
        metadata.row_group(group).column(column).num_values
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    )
    if metadata.num_rows > max(size, _FEW_ROWS) or values > max(size * _MOST_VALUES_OF_A_BYTE, _FEW_VALUES):
        raise UserError(
            f"{path.name} claims {metadata.num_rows:,} rows with {values:,} values in {size:,} bytes", WHERE, _WRITE_AGAIN
        )
    return found


def _as_float32(values: NDArray[Any]) -> tuple[NDArray[np.float32], dict[int, str]]:
    """Values (n, D) as float32, and what the rows have that float32 cannot hold; infinite numbers remain as they are."""
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    beyond = np.isinf(found) & np.isfinite(values) if values.dtype.itemsize > 4 else np.zeros((0, 1), np.bool_)
    largest = f"the largest that it holds is {np.finfo(np.float32).max:.2g}"
    return found, {
        row: f"the number {values[row][beyond[row]][0]:.4g}, which is beyond the range of float32: {largest}"
        for row in np.flatnonzero(beyond.any(axis=1)).tolist()
    }


def _values(path: Path, column: str, count: int) -> tuple[NDArray[np.float32], dict[int, str]]:
    """A column of lists as (N, D) float32, and the rows that cannot be used with what they have."""
    from pyarrow import compute

    values, unusable, start = np.zeros((count, 0), np.float32), dict[int, str](), 0
    for found in _batches(path, column):
        lengths = np.asarray(compute.fill_null(compute.list_value_length(found), 0))
        width = values.shape[1] or int(lengths[0])
        wrong = np.flatnonzero(lengths != width) if width else np.arange(1)
        if len(wrong):
            row = start + int(wrong[0])
            if not found[int(wrong[0])].is_valid:
                raise UserError(f"row {row} of {path.name} is null in the column {column!r}", WHERE, "Leave the row out.")
            raise UserError(
                f"row {row} of {path.name} has {counted(int(lengths[wrong[0]]), 'number')}"
                + (f", but the first has {width}" if width else ""),
                WHERE,
                "Features of all images must be equally long.",
            )
        if not start:
            values = np.zeros((count, width), np.float32)
        flat = found.flatten()
        numbers, beyond = _as_float32(flat.to_numpy(zero_copy_only=False).reshape(len(found), width))  # null becomes NaN
        if flat.null_count:
            absent = np.asarray(compute.is_null(flat)).reshape(len(found), width).any(axis=1)
            beyond |= {row: "a null among its numbers" for row in np.flatnonzero(absent).tolist()}
        values[start : start + len(found)] = numbers
        unusable |= {start + row: what for row, what in beyond.items()}
        start += len(found)
    return values, unusable
