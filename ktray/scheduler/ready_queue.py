"""Which wanted stages can start now, best first: kept up to date as wants come, go and start, because thousands may wait."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator

Rank = tuple[float, ...]


class ReadyQueue:
    """Keys in the order in which they start. A key stands in line while nothing that it waits for is wanted itself.

    Attributes:
        names: stage name -> how many of that name stand in line.
    """

    def __init__(self) -> None:
        self.names: Counter[str] = Counter()
        self._line: list[tuple[Rank, str]] = []
        self._ranks: dict[str, Rank] = {}
        self._waits: dict[str, frozenset[str]] = {}
        self._missing: dict[str, int] = {}
        self._readers: dict[str, set[str]] = {}
        self._running: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        """Keys as they stand in line now, whatever happens to the line meanwhile."""
        return iter([key for _, key in self._line])

    def __contains__(self, key: str) -> bool:
        return key in self._ranks and key not in self._running and not self._missing[key]

    def of(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that stand in line, as they stand there."""
        return [key for _, key in sorted((self._ranks[key], key) for key in keys if key in self)]

    def behind(self, key: str) -> set[str]:
        """The wanted keys that a wanted one waits for."""
        return {each for each in self._waits[key] if each in self._ranks}

    def readers(self, key: str) -> set[str]:
        """The wanted keys that wait for this one, or would if it were wanted."""
        return self._readers.get(key, set()).copy()

    def enter(self, key: str, waits: Iterable[str], rank: Rank) -> None:
        """A stage is wanted, which waits while any of `waits` is wanted."""
        self._waits[key] = frozenset(waits)
        self._missing[key] = sum(each in self._ranks for each in self._waits[key])
        for each in self._waits[key]:
            self._readers.setdefault(each, set()).add(key)
        for reader in self._readers.get(key, ()):
            self._stand(reader, False)
            self._missing[reader] += 1
        self._ranks[key] = rank
        self._stand(key, True)

    def leave(self, key: str) -> None:
        """A stage is wanted no more; who waited for it may go."""
        self._stand(key, False)
        del self._ranks[key], self._missing[key]
        for each in self._waits.pop(key):
            self._readers[each].discard(key)
            if not self._readers[each]:
                del self._readers[each]
        for reader in self._readers.get(key, ()):
            self._missing[reader] -= 1
            self._stand(reader, True)

    def rank(self, key: str, rank: Rank) -> None:
        """A wanted stage gets another place."""
        if rank != self._ranks[key]:
            self._stand(key, False)
            self._ranks[key] = rank
            self._stand(key, True)

    def start(self, key: str) -> None:
        """A stage runs."""
        self._stand(key, False)
        self._running.add(key)

    def stop(self, key: str) -> None:
        """A stage runs no more, and starts again if it is still wanted."""
        self._running.discard(key)
        self._stand(key, True)

    def _stand(self, key: str, here: bool) -> None:
        if key not in self:
            return
        entry, name = (self._ranks[key], key), key.rpartition("-")[0]
        if here:
            insort(self._line, entry)
            self.names[name] += 1
        else:
            del self._line[bisect_left(self._line, entry)]
            self.names[name] -= 1
            if not self.names[name]:
                del self.names[name]
