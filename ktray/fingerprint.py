"""One canonical form of a value, and its hash: the identity of everything that ktray computes."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktray.errors import UserError

_TEXT = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
TICK_NS = 2_000_000_000
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
        if _as_json(value):  # nearly always: a search takes thousands of keys a second, and `_plain` copies what it looks at
            return _TEXT.encode(value)
    except ValueError:  # a number that is not finite; `_plain` says where
        pass
    return _TEXT.encode(_plain(value, path))


def _as_json(value: Any) -> bool:
    """Whether JSON's own encoder gives the canonical text, which of keys that are no text it would make text."""
    kind = type(value)
    if kind is dict:
        for key, item in value.items():  # noqa: SIM110 - `all` takes twice as long, and this is the hottest loop of a search
            if type(key) is not str or not (type(item) in _SCALARS or _as_json(item)):
                return False
        return True
    if kind is list or kind is tuple:
        for item in value:  # noqa: SIM110
            if not (type(item) in _SCALARS or _as_json(item)):
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
    """Dotted path -> value of the leaves of nested mappings; an empty mapping inside is a leaf."""
    if isinstance(value, Mapping) and (value or not path):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{path}.{key}" if path else str(key)).items()}
    return {path: value}


def fingerprint(value: Any) -> str:
    """sha256 (64 hex digits) of the canonical form of `value`."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def settled(mtime_ns: int) -> bool:
    """Whether a file that was last changed then would show the next change by another time.

    A clock of files ticks in milliseconds, on some network drives in seconds: within a tick, size and time may stay the same.
    """
    return time.time_ns() - mtime_ns > TICK_NS


def file_sha256(path: Path) -> str:
    """sha256 (64 hex digits) of a file's bytes, read in blocks."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_sha256(path: Path, expected: str, where: str) -> None:
    """Refuse a file that is not what it was when it was hashed.

    Raises:
        UserError: it changed since; `where` is its dotted path in the spec.
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

    Neighbouring seeds give unrelated streams, which adding numbers to a seed does not.
    """
    return int(fingerprint(list(parts))[:16], 16) >> 1
