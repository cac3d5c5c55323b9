"""How a search ends before its end: who wishes it, and how those who wait hear of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Protocol, TypeVar

from ktray.errors import StoppedEarly

EVERY = 0.2
TIDY_SECONDS = 3.0  # for threads that wait to hear of an interruption
Result = TypeVar("Result")


class CancelsWaits(Protocol):
    """Any scheduler on which somebody waits."""

    def cancel(self, waiter: str) -> None:
        """End every wait of this waiter at once."""


class Interruption:
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
def released(scheduler: CancelsWaits, waiters: Callable[[], Iterable[str]], ended: Callable[[], bool]) -> Iterator[None]:
    """End every wait once `ended` says so; again and again, because waiters may just be beginning to wait."""
    over = threading.Event()

    def release() -> None:
        with suppress(StoppedEarly):  # the scheduler has ended, and with it every wait
            while not over.wait(EVERY):
                for waiter in list(waiters()) if ended() else ():
                    scheduler.cancel(waiter)

    thread = threading.Thread(target=release, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2)


def together(
    scheduler: CancelsWaits,
    names: Collection[str],
    one: Callable[[str], Result],
    waiter: Callable[[str], str],
    at_once: int,
    stopping: Interruption,
) -> list[Result]:
    """What `one` returns for each name, so many at a time.

    Args:
        one: waits on the scheduler as ``waiter(name)``.

    Raises:
        KeyboardInterrupt: `stopping` was wished; no thread goes on.
    """
    over = threading.Event()
    threads = ThreadPoolExecutor(at_once)
    with released(scheduler, lambda: map(waiter, names), over.is_set):  # in a thread: a broker that is dying may never answer
        futures = [threads.submit(one, name) for name in names]
        try:
            while wait(futures, timeout=EVERY).not_done:
                stopping.heed()
            return [future.result() for future in futures]
        finally:
            over.set()
            threads.shutdown(wait=False, cancel_futures=True)
            wait([future for future in futures if not future.cancelled()], timeout=TIDY_SECONDS)
