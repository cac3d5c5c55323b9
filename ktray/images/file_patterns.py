"""Parquet or tar files at a path, which is a file, a folder or a pattern, and the split that each of them is for."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from ktray.errors import UserError
from ktray.images.split_words import split_words, splits_of
from ktray.text import first_few

_MAX_ENTRIES = 300_000
_SHOWN = 256  # characters of a name in messages, as many as file names have


def list_files(source: Path, suffixes: tuple[str, ...]) -> tuple[dict[str, Path], dict[str, int]]:
    """Relative name -> path of each file, sorted by name, and what was left out, by suffix.

    What exists under the name as given comes before any pattern, so brackets in the name of a folder are no pattern.

    Args:
        suffixes: of the files, with their dots; the first one names their kind.

    Raises:
        UserError: there is no such file, or a folder cannot be read.
    """
    if source.is_file():
        return {_as_text(source.name): source}, {}
    root = source
    while not root.is_dir():
        root = root.parent
    found, left_out = _matching(root, source.relative_to(root).parts, suffixes)
    if "[" in source.relative_to(root).as_posix():
        parts = tuple(part.replace("[", "[[]") for part in source.relative_to(root).parts)
        literal, _ = _matching(root, parts, suffixes)
        if literal and found and literal != found:
            raise UserError(
                f"the brackets in {source} fit some files as part of their names and others as a choice of characters",
                where="data.path",
                instead="Write [[] for a bracket that is part of a name.",
            )
        found = found or literal
    if not found:
        others = some(f"{count} {what}" for what, count in left_out.most_common())
        raise UserError(
            f"there are no {suffixes[0][1:]} files at {source}{f' (but {others})' if others else ''}",
            where="data.path",
            instead="Give a file, a folder or a pattern." + (" Braces are no pattern." if "{" in str(source) else ""),
        )
    names = {_as_text(file.relative_to(root).as_posix()): file for file in found}
    return dict(sorted(names.items())), dict(left_out.most_common())


def _as_text(name: str) -> str:
    """A file name as text; names may contain bytes that are not UTF-8 and cannot be written to JSON."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _matching(root: Path, parts: tuple[str, ...], suffixes: tuple[str, ...]) -> tuple[set[Path], Counter[str]]:
    """The files below `root` that match the parts of a pattern, and what was left out.

    Files with one of the suffixes are taken; others only if a pattern matches no such file.
    """
    pattern = (*(parts or ("**",)), *("*" if not parts or parts[-1] == "**" else ""))
    found, others, left_out = set[Path](), set[Path](), Counter[str]()
    for entry in _walk(root, pattern, left_out):
        if _is(entry, "dir"):
            left_out["folders"] += pattern[-2:] != ("**", "*")
        elif not _is(entry, "file"):
            left_out["broken links and special files"] += 1
        else:
            (found if entry.name.lower().endswith(suffixes) else others).add(Path(entry.path))
    if others and not found and pattern[-2:] != ("**", "*"):
        return others, +left_out
    return found, +left_out + Counter(file.suffix.lower() or "without suffix" for file in others)


def _walk(root: Path, pattern: tuple[str, ...], left_out: Counter[str]) -> Iterator[os.DirEntry[str]]:
    """The entries that match the last part of a pattern, in folders that match the parts before; ** is any number of folders.

    Hidden files and folders are skipped, and links are followed, but not to a folder that the link lies in.

    Raises:
        UserError: a folder cannot be read, or there are too many entries.
    """
    pending: list[tuple[str, int, frozenset[tuple[int, int]]]] = [(str(root), 0, frozenset())]
    seen = 0
    while pending:
        folder, at, above = pending.pop()
        state = os.stat(folder)
        here = (state.st_dev, state.st_ino)
        if here in above:
            left_out["links to a folder above them"] += 1
            continue
        any_depth = pattern[at] == "**"
        if any_depth:
            pending.append((folder, at + 1, above))
        entries = _entries(folder)
        seen += len(entries)
        if seen > _MAX_ENTRIES:
            raise UserError(
                f"there are more than {_MAX_ENTRIES:,} files and folders below {root}",
                where="data.path",
                instead="Give the folder of the files themselves.",
            )
        for entry in entries:
            hidden = entry.name.startswith(".") and not pattern[at].startswith(".")
            if hidden or not (any_depth or fnmatchcase(entry.name, pattern[at])):
                continue
            if at == len(pattern) - 1:
                yield entry
            elif _is(entry, "dir"):
                pending.append((entry.path, at if any_depth else at + 1, above | {here}))


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:  # skipping it silently would hide missing files
        raise UserError(
            f"the folder {folder} cannot be read: {error.strerror}", "data.path", "Change its permissions."
        ) from error


def _is(entry: os.DirEntry[str], what: Literal["dir", "file"]) -> bool:
    try:
        return entry.is_dir() if what == "dir" else entry.is_file()
    except OSError:  # a link to itself
        return False


def names_by_split(names: list[str], source: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Names by split, and warnings. A single file, or files without any word of a split, are all for training.

    Raises:
        UserError: it is not clear which split a file is for, or there are no training files.
    """
    if source.is_file() or not any(splits_of(names).values()):
        _refuse_hidden_words(names)
        while not source.exists():  # a pattern
            source = source.parent
        other = " and ".join(split_words(source.name).keys() - {"train", "trainval"})
        return {"train": names}, [f"all rows are for training, although {source.name} speaks of {other}"] if other else []
    found: dict[str, list[str]] = defaultdict(list)
    without = []
    for name, split in splits_of(names).items():
        found[split].append(name) if split else without.append(name)
    if without:
        raise UserError(
            f"{some(without)} belong{'s' * (len(without) == 1)} to no split, although other files do",
            where="data.path",
            instead="Put train, val or test into the name or the folder of each, or leave it out by a pattern in 'path'.",
        )
    if "train" not in found:
        others = "; ".join(f"{some(members)} for {split}" for split, members in found.items())
        first = next(iter(found.values()))[0]
        raise UserError(
            f"there are no training files, only {others}", where="data.path", instead=f"Name them train*{Path(first).suffix}."
        )
    return found, []


_HIDDEN_TRAIN = re.compile(r"train|(?<![a-z])tr(?![a-z])")
_HIDDEN_OTHER = re.compile(r"test|valid|(?<![a-z])(?:te|ts|va)(?![a-z])")


def _refuse_hidden_words(names: list[str]) -> None:
    """Raise if words of different splits are shortened or parts of longer words: `tr.parquet` and `te.parquet`."""
    train = [name for name in names if _HIDDEN_TRAIN.search(name.lower())]
    other = [name for name in names if _HIDDEN_OTHER.search(name.lower()) and name not in train]
    if train and other:
        raise UserError(
            f"{train[0]} and {other[0]} may be files of different splits",
            where="data.path",
            instead=f"Set the words train, val and test apart, as in my-train{Path(train[0]).suffix}, "
            "or give the files of one split alone.",
        )


def refuse_the_same_file_twice(files: Mapping[str, Path]) -> None:
    """Refuse names of which two are links to one file.

    Raises:
        UserError: it names both.
    """
    first: dict[tuple[int, int], str] = {}
    for name, path in files.items():
        state = path.stat()
        other = first.setdefault((state.st_dev, state.st_ino), name)
        if other != name:
            raise UserError(
                f"{other} and {name} are the same file, so that its images would be there twice",
                where="data.path",
                instead="Remove one of the links, or leave it out by a pattern in 'path'.",
            )


_SHARD = re.compile(r"(.*?)(\d+)-of-(\d+)(.*)")


def missing_parts(names: Iterable[str]) -> list[str]:
    """A warning for each series such as `train-00001-of-00004.parquet` with parts missing."""
    series: dict[tuple[str, str], set[int]] = defaultdict(set)
    for match in filter(None, (_SHARD.fullmatch(name) for name in names)):
        series[match[1], match[3]].add(int(match[2]))
    return [
        f"there are only {len(parts)} of the {int(total)} files {start}*-of-{total}"
        for (start, total), parts in series.items()
        if len(parts) < int(total)
    ]


def some(items: Iterable[str], shown: int = 5) -> str:
    """The first few of some texts, each cut to a length that can be read."""
    found = [item if len(item) <= _SHOWN else f"{item[:_SHOWN]}..." for item in items]
    return first_few(found, shown)
