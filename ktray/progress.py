"""Progress of the stage that runs here, told by the loops deep inside it and heard by whoever watches the stage.

A loop says `moved` and knows nobody: outside a stage, and for the items that another worker does, it is as good as silent.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

# Seconds between two reports of loops. The pace of a stage is the mean time between its reports, and it is called stuck after
# many times its pace: reports of every batch would make a slow next step of a healthy stage, such as a probe, look stuck.
EVERY = 10.0

Tell = Callable[[Mapping[str, float]], None]


class _Listener:
    """Counts what moves, and tells it every few seconds beside what the stage has told itself."""

    def __init__(self, tell: Tell) -> None:
        self._tell, self._at = tell, time.monotonic()
        self._told: Mapping[str, float] = {}
        self._counts: Counter[str] = Counter()

    def tell(self, values: Mapping[str, float]) -> None:
        self._told, self._counts, self._at = dict(values), Counter(), time.monotonic()
        self._tell(values)

    def count(self, what: str, by: int) -> None:
        self._counts[what] += by
        now = time.monotonic()
        if now - self._at >= EVERY:
            self._at = now
            self._tell({**self._told, what: self._counts[what]})


_listener: ContextVar[_Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard(tell: Tell) -> Iterator[Tell]:
    """Hear what moves in this thread, for the time of a `with`.

    Args:
        tell: called every few seconds with what has moved since the stage told something itself: ``{"images": 5120}``.

    Yields:
        `tell` for the stage itself, at once and as often as it likes: ``{"epoch": 3, "of": 8}``. What moves later is told with
        it: ``{"epoch": 3, "of": 8, "step": 17}``.
    """
    listener = _Listener(tell)
    token = _listener.set(listener)
    try:
        yield listener.tell
    finally:
        _listener.reset(token)


def moved(what: str, by: int = 1) -> None:
    """Say that so many more of something are done; under a microsecond, so every batch may say it.

    Args:
        what: their name, as in ``step 17``.
    """
    listener = _listener.get()
    if listener is not None:
        listener.count(what, by)
