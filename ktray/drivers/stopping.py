"""How a search ends before its end: who wishes it, and how those who wait hear of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktray.crew.client import Crew

EVERY = 0.2


class Stopping:
    """The wish to stop, told by a signal handler in the main thread.

    Attributes:
        orderly: whether processes run that must be ended in order. Before that, whatever is interrupted can be left as it is.
    """

    def __init__(self) -> None:
        self.orderly = False
        self._wished = threading.Event()

    def is_set(self) -> bool:
        return self._wished.is_set()

    def wish(self) -> None:
        """Stop.

        Raises:
            KeyboardInterrupt: nothing runs yet, or this is the second wish.
        """
        again = self._wished.is_set()
        self._wished.set()
        if again or not self.orderly:
            raise KeyboardInterrupt


@contextmanager
def released(crew: Crew, waiters: Callable[[], Iterable[str]], ended: Callable[[], bool]) -> Iterator[None]:
    """End every wait once `ended` says so; again and again, because waiters may just be beginning to wait."""
    over = threading.Event()

    def release() -> None:
        while not over.wait(EVERY):
            for waiter in list(waiters()) if ended() else ():
                crew.release(waiter)

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2)
