"""What the data are, whoever keeps them wherever: a hash of the content."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ktray import plugins
from ktray.fingerprint import file_sha256, fingerprint, mtime_is_reliable
from ktray.images.source import Source
from ktray.spec import DataSpec

_THREADS = 8
_RUN = 64  # files that a thread takes at a time


def identity(spec: DataSpec, cache: Path | None = None) -> str:
    """sha256 (64 hex digits) of the data set's content: its files' names, sizes and bytes, and its labels.

    Where the data lie does not count, nor what the spec makes of them (size, split). Files are hashed in threads.

    Args:
        spec: a data spec.
        cache: folder for one JSON file that remembers hashes by (absolute path, size, mtime_ns); None hashes everything.

    Raises:
        UserError: the data are not where the spec says.
        ValueError: the kind gives neither files nor an identity.
    """
    module = plugins.module_of("dataset", spec)
    splits = module.load(spec)
    if splits.identity is None and not splits.files:
        raise ValueError(f"the data set kind {spec.kind!r} gives neither files nor an identity")
    named = {"train": splits.train, "val": splits.val, "test": splits.test}
    where = {field: getattr(spec, field) for field in module.LOCATION}
    book = cache / f"contents-{fingerprint([spec.kind, where])[:12]}.json" if cache else None
    return fingerprint(
        {
            "files": _manifest(splits.files, book),
            "identity": splits.identity,
            "splits": {name: _meaning(source) for name, source in named.items() if source is not None},
        }
    )


def _meaning(source: Source) -> dict[str, Any]:
    return {
        "names": source.names,
        "labels": None if source.labels is None else source.labels.tolist(),
        "classes": source.classes,
        "boxes": None if source.boxes is None else [boxes.tolist() for boxes in source.boxes],
    }


def _manifest(files: tuple[tuple[str, Path], ...], book: Path | None) -> list[list[Any]]:
    """Sorted [name, size, sha256] of each file."""
    known = _remembered(book)
    paths = [str(path) for _, path in files]
    runs = [paths[start : start + _RUN] for start in range(0, len(paths), _RUN)]
    with ThreadPoolExecutor(_THREADS) as threads:
        entries = [entry for of_run in threads.map(lambda run: [_entry(path, known) for path in run], runs) for entry in of_run]
    if book is not None:
        lines = {
            path: entry for path, entry in zip(paths, entries, strict=True) if entry[1] >= 0 and mtime_is_reliable(entry[1])
        }
        if lines != known:
            book.parent.mkdir(parents=True, exist_ok=True)
            scratch = book.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(lines), encoding="utf-8", errors="surrogateescape")
            scratch.replace(book)
    return sorted([name, entry[0], entry[2]] for (name, _), entry in zip(files, entries, strict=True))


def _entry(path: str, known: dict[str, list[Any]]) -> list[Any]:
    """[size, mtime_ns, sha256] of a file. One that may not be read counts as such: decoding lists it as unreadable."""
    try:
        state = os.stat(path)
        remembered = known.get(path)
        if remembered and remembered[:2] == [state.st_size, state.st_mtime_ns]:
            return remembered
        return [state.st_size, state.st_mtime_ns, file_sha256(Path(path))]
    except OSError:
        return [-1, -1, "unreadable"]


def _remembered(book: Path | None) -> dict[str, list[Any]]:
    if book is None or not book.exists():
        return {}
    try:
        lines = json.loads(book.read_text(encoding="utf-8", errors="surrogateescape"))
    except ValueError:
        return {}  # cut off by a full disk: everything is hashed again
    return lines if isinstance(lines, dict) else {}
