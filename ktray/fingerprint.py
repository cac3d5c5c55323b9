"""The canonical JSON text of a value and its hash, from which all keys are made; hashes of files; seeds."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ktray.errors import UserError

_TEXT = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
TIME_GRANULARITY_NS = 2_000_000_000
_SCALARS = frozenset((str, int, float, bool, type(None)))


def canonical(value: Any, path: str = "") -> str:
    """The one JSON text of `value`: sorted keys, no spaces, shortest round-trip floats.

    Integral floats stay floats (``1.0`` is not ``1``): a spec field has one type, so one text.

    Args:
        value: None, bool, int, finite float, str, or lists, tuples and string-keyed mappings of those.
        path: dotted path of `value`, for the error.

    Raises:
        TypeError: something has no canonical form; the message holds its dotted path.
    """
    try:
        if _is_plain_json(value):  # the usual case and fast: a search makes thousands of keys a second, and `_plain` copies
            return _TEXT.encode(value)
    except ValueError:  # a number is not finite; `_plain` says where
        pass
    return _TEXT.encode(_plain(value, path))


def _is_plain_json(value: Any) -> bool:
    """Whether the JSON encoder gives the canonical text as it is; it would convert keys that are not strings."""
    kind = type(value)
    if kind is dict:
        for key, item in value.items():
            if type(key) is not str or not (type(item) in _SCALARS or _is_plain_json(item)):
                return False
        return True
    if kind is list or kind is tuple:
        for item in value:  # noqa: SIM110
            if not (type(item) in _SCALARS or _is_plain_json(item)):
                return False
        return True
    return kind in _SCALARS


def _plain(value: Any, path: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{path or 'value'}: {value} has no canonical form; use a finite number or null")
        return value
    if isinstance(value, Mapping):
        strangers = [key for key in value if not isinstance(key, str)]
        if strangers:
            raise TypeError(f"{path or 'value'}: the key {strangers[0]!r} is not a string")
        return {key: _plain(item, f"{path}.{key}" if path else key) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}.{index}" if path else str(index)) for index, item in enumerate(value)]
    raise TypeError(f"{path or 'value'}: a {type(value).__name__} has no canonical form")


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value of each leaf of nested mappings. A nested empty mapping is a leaf."""
    if isinstance(value, Mapping) and (value or not path):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}" if path else str(key)).items()}
    return {path: value}


def fingerprint(value: Any) -> str:
    """sha256 (64 hex digits) of the canonical form of `value`."""
    return hashlib.sha256(canonical(value).encode(errors="surrogatepass")).hexdigest()  # file names may hold any bytes


FileVersion = tuple[int, int, int, int, int]


def file_version(state: os.stat_result) -> FileVersion:
    """What stays the same in a path's file only as long as its bytes do; of a link, the state is that of the file it leads to.

    Size, time of modification and time of the last change of any kind in ns, number of the file (inode), number of the device.
    The time of modification alone says little: archives, rsync and `touch` set it, also to that of the file that was there
    before. The other time cannot be set. A copy has a new one, so that it is read again, and found to have the same bytes.
    Files that are written in a row may share both times, so that only the inode tells that a folder or a link now leads to
    another of them.
    """
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev


def version_is_reliable(version: Sequence[int]) -> bool:
    """Whether a file with this version cannot change any more without its version changing, too.

    File systems store times in steps of milliseconds, some network drives of seconds. Within one step a file may change and
    keep its size and times.
    """
    return time.time_ns() - max(version[1:3]) > TIME_GRANULARITY_NS


def file_sha256(path: Path) -> str:
    """sha256 (64 hex digits) of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_sha256(path: Path, expected: str, where: str) -> None:
    """Check that a file has not changed since it was hashed.

    Args:
        expected: its sha256 then.
        where: its dotted path in the spec, for the error.

    Raises:
        UserError: it has changed.
    """
    found = file_sha256(path)
    if found != expected:
        raise UserError(
            f"{path.name} changed after the run was planned: its sha256 was {expected[:12]} and is {found[:12]}",
            where,
            "Run the command again to use the file as it is now.",
        )


def seed_of(*parts: Any) -> int:
    """A seed in [0, 2**63) from `parts`, such as ``seed_of(spec.seed, "shuffle", epoch)``.

    Neighbouring seeds give independent streams, unlike adding a number to a seed.
    """
    return int(fingerprint(list(parts))[:16], 16) >> 1
