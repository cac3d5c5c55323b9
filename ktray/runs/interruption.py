"""How a search or a run ends before its end: the request to stop, and how threads that wait for stages hear of it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

from ktray.errors import StoppedEarly

POLL_SECONDS = 0.2
CLEANUP_SECONDS = 3.0  # for threads that wait to notice an interruption
FORCE_AFTER_SECONDS = 8.0  # from Ctrl-C until the end is forced
Result = TypeVar("Result")


class _CancelsWaits(Protocol):
    """Any scheduler on which somebody waits."""

    def cancel_waits(self, waiter: str) -> None:
        """End every wait of this waiter at once."""


class Interruption:
    """The request to stop, made by a signal handler in the main thread.

    Attributes:
        needs_cleanup: whether processes run that must be stopped in order. Before that, everything can be left as it is.
    """

    def __init__(self) -> None:
        self.needs_cleanup = False
        self._requested = threading.Event()

    def is_requested(self) -> bool:
        return self._requested.is_set()

    def request(self) -> None:
        """Ask everything to stop.

        Raises:
            KeyboardInterrupt: nothing needs cleaning up yet, or this is the second request.
        """
        again = self._requested.is_set()
        self._requested.set()
        if again or not self.needs_cleanup:
            raise KeyboardInterrupt

    def raise_if_requested(self) -> None:
        """Call this before starting something: the `KeyboardInterrupt` of a request may have been lost in a callback.

        Raises:
            KeyboardInterrupt: a stop was requested.
        """
        if self._requested.is_set():
            raise KeyboardInterrupt


@contextmanager
def stop_on_signals(
    interruption: Interruption, inform: Callable[[str], None], force: Callable[[], None] | None = None
) -> Iterator[None]:
    """Ctrl-C and SIGTERM request a stop: an orderly one where processes run, the second time an immediate one.

    Args:
        inform: called with a line for the user.
        force: called, in a thread, if stopping takes too long. A signal in the middle of an import may leave its lock taken.
    """
    timer = threading.Timer(FORCE_AFTER_SECONDS, force or (lambda: None))
    timer.daemon = True

    def stop(number: int, frame: Any) -> None:
        if not interruption.is_requested():
            timer.start()
            if interruption.needs_cleanup:
                inform("ktray: stopping; once more ends at once")
        interruption.request()

    def ignore_interrupt(error: sys.UnraisableHookArgs) -> None:
        if error.exc_type is not KeyboardInterrupt:  # `Interruption.raise_if_requested` raises that one again
            original_hook(error)

    original_hook, sys.unraisablehook = sys.unraisablehook, ignore_interrupt
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        timer.cancel()
        sys.unraisablehook = original_hook
        for number, handler in before.items():
            signal.signal(number, handler)


def restore_signal_handlers() -> None:
    """Install Python's signal handlers again; does nothing outside the main thread, where there are none.

    Ray replaces them below Python: when it starts, by a handler that writes a stack trace to the terminal, and when it ends,
    by the default one, which would kill this process in the middle of its cleanup.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)


@contextmanager
def cancelling_waits(
    scheduler: _CancelsWaits, waiters: Callable[[], Iterable[str]], ended: Callable[[], bool]
) -> Iterator[None]:
    """Cancel every wait once `ended` says so; repeatedly, because waiters may just be about to wait."""
    over = threading.Event()

    def cancel() -> None:
        with suppress(StoppedEarly):  # the scheduler has ended, and with it every wait
            while not over.wait(POLL_SECONDS):
                for waiter in list(waiters()) if ended() else ():
                    scheduler.cancel_waits(waiter)

    thread = threading.Thread(target=cancel, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2)


def run_concurrently(
    scheduler: _CancelsWaits,
    names: Collection[str],
    work: Callable[[str], Result],
    waiter: Callable[[str], str],
    concurrent: int,
    interruption: Interruption,
) -> list[Result]:
    """``[work(name) for name in names]``, `concurrent` of them at a time, each in a thread.

    Args:
        work: waits on the scheduler as ``waiter(name)``.

    Raises:
        KeyboardInterrupt: a stop was requested; no thread goes on.
    """
    over = threading.Event()
    threads = ThreadPoolExecutor(concurrent)
    with cancelling_waits(scheduler, lambda: map(waiter, names), over.is_set):  # a broker that is dying may never answer
        futures = [threads.submit(work, name) for name in names]
        try:
            while wait(futures, timeout=POLL_SECONDS).not_done:
                interruption.raise_if_requested()
            return [future.result() for future in futures]
        finally:
            over.set()
            threads.shutdown(wait=False, cancel_futures=True)
            wait([future for future in futures if not future.cancelled()], timeout=CLEANUP_SECONDS)
