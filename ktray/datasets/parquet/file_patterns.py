"""The parquet files at a path, which is a file, a folder or a pattern."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from ktray.datasets.parquet.footers import some
from ktray.errors import UserError

SUFFIXES = (".parquet", ".parq", ".pq")
_MAX_ENTRIES = 300_000


def list_files(source: Path) -> tuple[dict[str, Path], dict[str, int]]:
    """Relative name -> path of each parquet file, sorted by name, and what was left out, by suffix.

    What exists under the name as given comes before any pattern, so brackets in the name of a folder are no pattern.
    """
    if source.is_file():
        return {_as_text(source.name): source}, {}
    root = source
    while not root.is_dir():
        root = root.parent
    found, left_out = _matching(root, source.relative_to(root).parts)
    if "[" in source.relative_to(root).as_posix():
        literal, _ = _matching(root, tuple(part.replace("[", "[[]") for part in source.relative_to(root).parts))
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
            f"there are no parquet files at {source}{f' (but {others})' if others else ''}",
            where="data.path",
            instead="Give a file, a folder or a pattern." + (" Braces are no pattern." if "{" in str(source) else ""),
        )
    names = {_as_text(file.relative_to(root).as_posix()): file for file in found}
    return dict(sorted(names.items())), dict(left_out.most_common())


def _as_text(name: str) -> str:
    """A file name as text; names may contain bytes that are not UTF-8 and cannot be written to JSON."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _matching(root: Path, parts: tuple[str, ...]) -> tuple[set[Path], Counter[str]]:
    """The files below `root` that match the parts of a pattern, and what was left out.

    Files with a suffix of parquet files are taken; others only if a pattern matches no such file.
    """
    pattern = (*(parts or ("**",)), *("*" if not parts or parts[-1] == "**" else ""))
    found, others, left_out = set[Path](), set[Path](), Counter[str]()
    for entry in _walk(root, pattern, left_out):
        if _is(entry, "dir"):
            left_out["folders"] += pattern[-2:] != ("**", "*")
        elif not _is(entry, "file"):
            left_out["broken links and special files"] += 1
        else:
            (found if entry.name.lower().endswith(SUFFIXES) else others).add(Path(entry.path))
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
                instead="Give the folder of the parquet files themselves.",
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
