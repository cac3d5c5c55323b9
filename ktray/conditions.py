"""Conditions under which the running stage computed what its key does not say, such as the batch size on a GPU.

They change no more than the last bits of a result, and stand in its record: deep inside a stage, code calls `note`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

KEPT_ROWS = "kept_rows"
"""Noted where features were not extracted again, with the `seconds` that this would have taken in all."""

KEPT_PROJECTION = "kept_projection"
"""Noted where a projection was not fitted again, with the `seconds` that it took."""

_noted: ContextVar[dict[str, Any] | None] = ContextVar("conditions", default=None)


@contextmanager
def collecting() -> Iterator[dict[str, Any]]:
    """Within a `with`, collect what this thread notes, and yield the dictionary that it goes into."""
    found: dict[str, Any] = {}
    token = _noted.set(found)
    try:
        yield found
    finally:
        _noted.reset(token)


def note(name: str, value: Mapping[str, Any]) -> None:
    """Note what holds for a part of the work, as JSON values; the last of a name counts. Outside a stage it does nothing."""
    found = _noted.get()
    if found is not None:
        found[name] = dict(value)


def add(name: str, amounts: Mapping[str, float]) -> None:
    """Note amounts that add up to those noted before under this name, such as seconds."""
    before = (_noted.get() or {}).get(name, {})
    note(name, {what: round(before.get(what, 0.0) + amount, 3) for what, amount in amounts.items()})
