"""Labels of parquet files as numbers of classes, matched between files by the names of the classes."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray.datasets.parquet.footers import ParquetFile, columns_of, damage_of, damaged, is_bytes, opened, stored
from ktray.errors import UserError
from ktray.images.file_patterns import some
from ktray.text import as_read, written_differently


@dataclass(frozen=True)
class Labels:
    """The labels of a data set.

    Attributes:
        of_split: split -> (N,) int64, without the splits that have no labels.
        classes: names of the classes by number.
        origin: where names and numbers come from, as a phrase.
        warnings: sentences about what looks wrong.
    """

    of_split: Mapping[str, NDArray[np.int64]] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    origin: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class _FileLabels:
    """The labels of one file.

    Attributes:
        names: name of each value that occurs.
        codes: (N,) index into `names` for each row; -1 where the label is hidden: null, -1, NaN or an empty text.
        declared: names of all classes by number, from the metadata of the file, or None.
        numbered: the names are mere numbers.
        warnings: about the metadata.
    """

    file: ParquetFile
    names: tuple[str, ...]
    codes: NDArray[np.int64]
    declared: tuple[str, ...] | None
    numbered: bool
    warnings: tuple[str, ...]

    @property
    def known(self) -> tuple[str, ...]:
        """The names by which the file knows classes."""
        return self.names if self.declared is None else self.declared


def read_labels(by_split: dict[str, list[ParquetFile]], column: str) -> Labels:
    """Labels as numbers of classes, matched between files by the names of the classes.

    Raises:
        UserError: the column is missing or of another type, some labels are hidden, or names of files do not fit each other.
    """
    read = {split: found for split, files in by_split.items() if (found := _labels_of_split(split, files, column))}
    files = [file for of_split in read.values() for file in of_split]
    _refuse_names_beside_numbers(files)
    _refuse_other_spellings(files)
    _refuse_foreign_classes(read)
    _refuse_shifted_numbers(read)
    declared = list(dict.fromkeys(file.declared for file in files if file.declared is not None))
    used = dict.fromkeys(name for file in files for name in file.names)
    others = sorted(used.keys() - {name for names in declared for name in names})
    if any(file.numbered for file in files):
        others.sort(key=int)
    classes = tuple(dict.fromkeys([name for names in declared for name in names] + others))
    number = {name: at for at, name in enumerate(classes)}
    of_split = {}
    for split, members in read.items():
        rows = [np.array([number[name] for name in file.names], np.int64)[file.codes] for file in members if len(file.codes)]
        of_split[split] = np.concatenate(rows)
    warnings = [warning for file in files for warning in file.warnings]
    if len(used) > 100 and 2 * len(used) > len(of_split["train"]):
        warnings.append(f"the column {column!r} has {len(used)} different values, which are many for labels")
    return Labels(of_split, classes, _origin(files, declared, bool(others), column), tuple(warnings))


def _origin(files: list[_FileLabels], declared: list[tuple[str, ...]], others: bool, column: str) -> str:
    """Where names and numbers of classes come from."""
    if not declared and not any(file.numbered for file in files):
        return f"the texts in {column!r}, sorted"
    if not declared:
        same = ", so the same number is taken for the same class" if len(files) > 1 else ""
        return f"the numbers in {column!r}, sorted; no file names them{same}"
    first = next(file.file.name for file in files if file.declared is not None)
    origin = "names from the files' metadata, in its order"
    if len(declared) > 1:
        origin = f"names from the metadata of each file, which number them differently; in the order of {first}"
    return origin + (f", then the texts in {column!r}" if others else "")


def _labels_of_split(split: str, files: list[ParquetFile], column: str) -> list[_FileLabels]:
    """The labels of a split; empty if all are hidden or the column is absent, as in hubs' test splits."""
    without = [file for file in files if column not in file.schema.names]
    if without and (split == "train" or len(without) < len(files)):
        raise UserError(
            f"{without[0].path} has no column {column!r}",
            where="data.label",
            instead=f"It has {columns_of(without[0].schema)}."
            + (" Folder names are not read as columns." if f"{column}=" in without[0].name else ""),
        )
    found = [_labels_of_file(file, column) for file in files if not without]
    hidden = {labels.file.name: int((labels.codes < 0).sum()) for labels in found}
    total, count = sum(hidden.values()), sum(len(labels.codes) for labels in found)
    if total and (split == "train" or total < count):
        in_files = some(f"{number} in {name}" for name, number in hidden.items() if number)
        raise UserError(
            f"{total} of {count} {split} labels in {column!r} are null, empty or -1, which mean no label: {in_files}",
            where="data.label",
            instead="Remove these rows, or leave 'label' out.",
        )
    return [] if total else found


def _labels_of_file(file: ParquetFile, column: str) -> _FileLabels:
    if file.schema.names.count(column) > 1:
        raise UserError(f"{file.path} has several columns named {column!r}", "data.label", "Rename all but one.")
    declared, warnings = _declared_names(file, column)
    values, codes = _distinct_values(file, column)
    if declared is not None:
        names = tuple(_declared_name(value, declared, file, column) for value in values)
    else:
        names = tuple(str(value) for value in values)
    numbered = declared is None and any(type(value) is int for value in values)
    return _FileLabels(file, names, codes, declared, numbered, warnings)


def _declared_name(value: int | bool | str, declared: tuple[str, ...], file: ParquetFile, column: str) -> str:
    if isinstance(value, str):
        if value in declared:
            return value
    elif 0 <= value < len(declared):
        return declared[value]
    raise UserError(
        f"{file.path} has the label {some([repr(value)])} in {column!r}, but its metadata names only {some(declared, 10)}",
        where="data.label",
        instead="Correct the labels or the metadata of the file.",
    )


def _distinct_values(file: ParquetFile, column: str) -> tuple[list[int | bool | str], NDArray[np.int64]]:
    """The values that occur, in order of first occurrence, and the index (N,) of each row's; -1 for hidden labels."""
    from pyarrow import types

    kind = stored(file.schema.field(column).type)
    checks = (types.is_integer, types.is_floating, types.is_decimal, types.is_boolean, types.is_null)
    if not any(check(kind) for check in checks) and str(kind) not in _TEXTS and not is_bytes(kind):
        several = " One image has one label." if types.is_nested(kind) else ""
        raise UserError(
            f"the column {column!r} of {file.path} holds {kind}", "data.label", f"Labels are whole numbers or texts.{several}"
        )
    index: dict[int | bool | str, int] = {}
    codes = [np.zeros(0, np.int64)]
    size = 0
    with damage_of(file.path, column), opened(file.path) as parquet:
        for batch in parquet.iter_batches(batch_size=_BATCH_ROWS, columns=[column], use_threads=False):
            values, of_rows = _values_and_codes(batch.column(batch.schema.get_field_index(column)))
            occurring = np.unique(of_rows[of_rows >= 0], return_index=True)
            number = np.full(len(values) + 1, -1, np.int64)  # the last is that of null, whose code is -1
            for code in occurring[0][np.argsort(occurring[1])].tolist():
                value = _label(values[code], file, column)
                if value is not None and value not in index:
                    index[value] = len(index)
                    size += len(value) if isinstance(value, str) else 1
                number[code] = -1 if value is None else index[value]
            codes.append(number[of_rows])
            if size > _MAX_CHARACTERS:
                raise UserError(
                    f"the column {column!r} of {file.path} has more than {_MAX_CHARACTERS:,} characters of different values",
                    where="data.label",
                    instead="Name the column of the labels.",
                )
    joined = np.concatenate(codes)
    if len(joined) != file.rows:
        raise damaged(file.path, f"the column {column!r} has {len(joined)} of {file.rows} rows")
    return list(index), joined


_BATCH_ROWS = 16_384
_MAX_CHARACTERS = 10_000_000
_TEXTS = ("string", "large_string", "string_view")


def _values_and_codes(array: Any) -> tuple[list[Any], NDArray[np.int64]]:
    """The distinct values of an Arrow array, and the index (n,) of each element's; -1 for null."""
    from pyarrow import ArrowNotImplementedError, ExtensionArray, int64, types

    if isinstance(array, ExtensionArray):
        return _values_and_codes(array.storage)
    if types.is_null(array.type):
        return [], np.full(len(array), -1, np.int64)
    if not types.is_dictionary(array.type):
        try:
            array = array.dictionary_encode()
        except ArrowNotImplementedError:  # of rare types, such as half floats
            return array.to_pylist(), np.arange(len(array))
        values, codes = array.dictionary.to_pylist(), np.arange(len(array.dictionary))
    else:
        values, codes = _values_and_codes(array.dictionary)
    return values, np.append(codes, -1)[array.indices.cast(int64()).fill_null(-1).to_numpy(zero_copy_only=False)]


def _label(value: Any, file: ParquetFile, column: str) -> int | bool | str | None:
    """A label as a whole number, truth value or text; None if it is hidden: null, -1, NaN or an empty text."""
    if isinstance(value, bytes):  # texts without a note that they are texts, as Spark and Impala write them
        value = value.decode()
    if isinstance(value, bool | str) or value is None:
        return None if value == "" else value
    if not isinstance(value, int):
        if value != value:
            return None
        if math.isinf(value) or value != int(value) or abs(value) > 2**53:
            raise UserError(
                f"the column {column!r} of {file.path} holds numbers such as {value:.6g}",
                where="data.label",
                instead="Labels are whole numbers or texts.",
            )
    return None if value == -1 else int(value)


def _declared_names(file: ParquetFile, column: str) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The names of the classes by number, from the hub's metadata in a file, or None; and warnings."""
    raw = (file.schema.metadata or {}).get(b"huggingface")
    if raw is None:
        return None, ()
    try:
        features = (json.loads(raw).get("info") or {}).get("features") or {}
        if isinstance(features, list):  # [{"name": ..., "dtype": {"class_label": ...}}], as in the hub's data-set cards
            features = {feature["name"]: feature.get("dtype") for feature in features}
        feature = features.get(column) or {}
        feature = {} if isinstance(feature, str) else feature.get("class_label") or feature
        names = feature.get("names") or None
        if isinstance(names, dict):
            names = [names[str(number)] for number in range(len(names))]
        if names is None:
            return None, ()
        if not isinstance(names, list) or not all(isinstance(name, str | int) for name in names):
            raise TypeError("the names of classes are no list of texts")
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        why = "it is no JSON" if isinstance(error, ValueError | RecursionError) else "it has another form than the hub's"
        return None, (f"the metadata of {file.name} cannot be used, because {why}; its labels are taken as they are",)
    declared = tuple(map(str, names))
    twice = some(repr(name) for name, count in Counter(declared).items() if count > 1)
    if twice:
        raise UserError(f"the metadata of {file.path} names several classes {twice}", "data.label", "Rename all but one.")
    return declared, ()


def _refuse_names_beside_numbers(files: list[_FileLabels]) -> None:
    """Raise if one file only numbers its labels, another one names them, and the names are not these numbers."""
    numbered = [file for file in files if file.numbered]
    named = [file for file in files if not file.numbered and file.names and not _names_are_numbers(file)]
    if numbered and named:
        raise _unmatched(
            f"{numbered[0].file.name} only numbers its labels ({some(numbered[0].names, 10)}), "
            f"but {named[0].file.name} names them ({some(named[0].known, 10)})",
        )


def _names_are_numbers(file: _FileLabels) -> bool:
    if file.declared is not None:
        return file.declared == tuple(map(str, range(len(file.declared))))
    return all(re.fullmatch("0|-?[1-9][0-9]{0,17}", name) for name in file.names)


def _refuse_other_spellings(files: list[_FileLabels]) -> None:
    """Raise if files spell a class differently. Classes that one file tells apart, such as `Rock` and `rock`, are different."""
    spellings: dict[str, dict[str, _FileLabels]] = defaultdict(dict)
    for file in files:
        for name in file.known:
            spellings[as_read(name)].setdefault(name, file)
    for names in spellings.values():
        apart = any(len(names.keys() & set(file.known)) > 1 for file in names.values())
        if len(names) > 1 and not apart and len(next(iter(names))) > 1:
            (one, first), (other, second) = list(names.items())[:2]
            raise _unmatched(
                f"{first.file.name} has the class {some([repr(one)])} ({some(first.known, 10)}), "
                f"and {second.file.name} the class {some([repr(other)])} ({some(second.known, 10)}); "
                f"{written_differently(one, other)}"
            )


def _refuse_foreign_classes(read: Mapping[str, list[_FileLabels]]) -> None:
    """Raise if a split has labels, but none of the classes of the training images."""
    used = {split: dict.fromkeys(name for file in files for name in file.names) for split, files in read.items()}
    for split, names in used.items():
        if names and not names.keys() & used["train"].keys():
            raise _unmatched(
                f"the {split} files have other classes ({some(names, 10)}) than the training files ({some(used['train'], 10)})"
            )


def _refuse_shifted_numbers(read: Mapping[str, list[_FileLabels]]) -> None:
    """Raise if no file names the numbers, and one split counts from 0 where another counts from 1."""
    used = {
        split: sorted({int(name) for file in files if file.numbered for name in file.names}) for split, files in read.items()
    }
    train = used["train"]
    for split, numbers in used.items():
        shifts = {one - other for one, other in zip(numbers, train, strict=False)}
        if len(train) == len(numbers) > 1 and len(shifts) == 1 and shifts != {0}:
            raise _unmatched(
                f"the {split} files number their classes from {numbers[0]} to {numbers[-1]}, "
                f"the training files from {train[0]} to {train[-1]}, and no file names them"
            )


def _unmatched(problem: str) -> UserError:
    return UserError(
        f"labels cannot be matched between files: {problem}",
        where="data.label",
        instead="Write the same names of classes into all files, or give files that agree by a pattern in 'path'.",
    )
