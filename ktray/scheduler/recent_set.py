"""A set of limited size, which drops its oldest keys: what the scheduler remembers of stages and workers that are gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

REMEMBERED = 20_000  # entries; messages about ended attempts arrive seconds late, not thousands of attempts late
Key = TypeVar("Key", bound=Hashable)


class RecentSet(Generic[Key]):
    """A set of the keys that were added last, at most `limit` of them; adding one again makes it the newest."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self.limit = limit
        self._keys: OrderedDict[Key, None] = OrderedDict()

    def add(self, key: Key) -> None:
        """Add this key as the newest; beyond the limit the oldest is dropped."""
        self._keys[key] = None
        self._keys.move_to_end(key)
        if len(self._keys) > self.limit:
            self._keys.popitem(last=False)

    def discard(self, key: Key) -> None:
        """Remove this key, if it is there."""
        self._keys.pop(key, None)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys)
