"""The identity of a data set: a hash of its content, wherever it is stored."""

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
_FILES_PER_TASK = 64  # files per task of a thread


def identity(spec: DataSpec, cache: Path | None = None) -> str:
    """sha256 (64 hex digits) of the data set's content: its files' names, sizes and bytes, and its labels.

    Neither the location of the data nor the spec's processing (size, split) affects it. Files are hashed in threads.

    Args:
        spec: a data spec.
        cache: folder for a JSON file of known hashes by (absolute path, size, mtime_ns); None hashes everything.

    Raises:
        UserError: there are no data at the location in the spec.
        ValueError: the kind provides neither files nor an identity.
    """
    module = plugins.module_of("dataset", spec)
    splits = module.load(spec)
    if splits.identity is None and not splits.files:
        raise ValueError(f"the data set kind {spec.kind!r} provides neither files nor an identity")
    named = {"train": splits.train, "val": splits.val, "test": splits.test}
    location = {field: getattr(spec, field) for field in module.LOCATION}
    cache_file = cache / f"contents-{fingerprint([spec.kind, location])[:12]}.json" if cache else None
    return fingerprint(
        {
            "files": _manifest(splits.files, cache_file),
            "identity": splits.identity,
            "splits": {name: _annotations(source) for name, source in named.items() if source is not None},
        }
    )


def _annotations(source: Source) -> dict[str, Any]:
    return {
        "names": source.names,
        "labels": None if source.labels is None else source.labels.tolist(),
        "classes": source.classes,
        "boxes": None if source.boxes is None else [boxes.tolist() for boxes in source.boxes],
    }


def _manifest(files: tuple[tuple[str, Path], ...], cache_file: Path | None) -> list[list[Any]]:
    """Sorted [name, size, sha256] of each file."""
    known = _cached_entries(cache_file)
    paths = [str(path) for _, path in files]
    chunks = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]

    def hash_all(chunk: list[str]) -> list[list[Any]]:
        return [_entry(path, known) for path in chunk]

    with ThreadPoolExecutor(_THREADS) as threads:
        entries = [entry for of_chunk in threads.map(hash_all, chunks) for entry in of_chunk]
    if cache_file is not None:
        lines = {
            path: entry for path, entry in zip(paths, entries, strict=True) if entry[1] >= 0 and mtime_is_reliable(entry[1])
        }
        if lines != known:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            scratch = cache_file.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(lines), encoding="utf-8", errors="surrogateescape")
            scratch.replace(cache_file)
    return sorted([name, entry[0], entry[2]] for (name, _), entry in zip(files, entries, strict=True))


def _entry(path: str, known: dict[str, list[Any]]) -> list[Any]:
    """[size, mtime_ns, sha256] of a file. A file that cannot be read gets a fixed entry: decoding reports it."""
    try:
        state = os.stat(path)
        cached = known.get(path)
        if cached and cached[:2] == [state.st_size, state.st_mtime_ns]:
            return cached
        return [state.st_size, state.st_mtime_ns, file_sha256(Path(path))]
    except OSError:
        return [-1, -1, "unreadable"]


def _cached_entries(cache_file: Path | None) -> dict[str, list[Any]]:
    if cache_file is None or not cache_file.exists():
        return {}
    try:
        lines = json.loads(cache_file.read_text(encoding="utf-8", errors="surrogateescape"))
    except ValueError:
        return {}  # truncated, e.g. by a full disk: everything is hashed again
    return lines if isinstance(lines, dict) else {}
