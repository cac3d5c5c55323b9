"""How a search ends before its end: who wishes it, and how those who wait hear of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from ktray.errors import StoppedEarly

EVERY = 0.2


class Releases(Protocol):
    """Any crew on which somebody waits."""

    def release(self, waiter: str) -> None:
        """End every wait of this waiter at once."""


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

    def heed(self) -> None:
        """Before something is begun: raise what a wish has raised where Python could only ignore it, as in a callback.

        Raises:
            KeyboardInterrupt: there was a wish.
        """
        if self._wished.is_set():
            raise KeyboardInterrupt


def hear_again() -> None:
    """Put Python's handlers back in the operating system; in the main thread, where there are any.

    Ray installs one of its own below Python's when it starts, which writes a stack trace on the terminal, and the default one
    when it ends, which kills the process in the middle of what it tidies up.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)


@contextmanager
def released(crew: Releases, waiters: Callable[[], Iterable[str]], ended: Callable[[], bool]) -> Iterator[None]:
    """End every wait once `ended` says so; again and again, because waiters may just be beginning to wait."""
    over = threading.Event()

    def release() -> None:
        with suppress(StoppedEarly):  # the crew has ended, and with it every wait
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
