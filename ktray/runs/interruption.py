"""How a search or a run ends before its end: the request to stop, and how threads that wait for stages hear of it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TypeVar

from ktray.errors import SearchStopped, StageFailed, UserError

POLL_SECONDS = 0.2
CLEANUP_SECONDS = 3.0  # for threads that wait to notice an interruption
FORCE_AFTER_SECONDS = 7.0  # from Ctrl-C, or the end of Ray, until the end is forced
FORCE_SEARCH_AFTER_SECONDS = 12.0  # of a search that has begun, which prints its summary first
GRACE_SECONDS = 30.0  # for what waits for Ray, after Ctrl-C in a Python session
LOSS_SECONDS = 2.0  # until the end of Ray is noticed, and for what waits for it to return by itself
Result = TypeVar("Result")


class _CancelsRequests(Protocol):
    """Any scheduler on which somebody waits."""

    def cancel_requests(self, waiter: str) -> None:
        """End every wait of this waiter at once."""


class Interruption:
    """Why the work has to stop before its end: a request, made by a signal handler in the main thread, or the end of Ray.

    Args:
        force: called if stopping takes too long, or with the second request, and never returns. Without it a second request
            raises KeyboardInterrupt, as in a Python session, which goes on afterwards.

    Attributes:
        needs_cleanup: whether processes run that must be stopped in order. Before that, everything can be left as it is.
        force_after: seconds from a request until the end is forced.
        loss: what has ended Ray, if it has ended on its own; then nothing that waits for it returns.
    """

    def __init__(self, force: Callable[[], object] | None = None) -> None:
        self.needs_cleanup = False
        self.force_after = FORCE_AFTER_SECONDS
        self.loss: SearchStopped | None = None
        self._force = force
        self._requested, self._lost = threading.Event(), threading.Event()
        self._timer: threading.Timer | None = None

    @property
    def ends_process(self) -> bool:
        """Whether this process ends with the work, so that nothing in it need be left in order."""
        return self._force is not None

    def is_requested(self) -> bool:
        """Whether the user wants an end."""
        return self._requested.is_set()

    def must_end(self) -> bool:
        """Whether the work cannot go on, for whatever reason."""
        return self._requested.is_set() or self._lost.is_set()

    def request(self) -> None:
        """Ask everything to stop.

        Raises:
            KeyboardInterrupt: nothing needs cleaning up yet, or this is the second request.
        """
        again = self._requested.is_set()
        self._requested.set()
        self._force_later()
        if again and self._force is not None:
            self._force()
        if again or not self.needs_cleanup:
            raise KeyboardInterrupt

    def lose(self, cause: str) -> None:
        """Ray has ended on its own; called by the thread that watches it.

        Args:
            cause: such as ``its GCS (process 4711) is gone``.
        """
        self.loss = SearchStopped(f"Ray has ended: {cause}; the same command goes on from here")
        self._lost.set()
        self._force_later()

    def await_loss(self) -> SearchStopped | None:
        """What has ended Ray; waits a moment for it, because an error of Ray may arrive before its cause is known."""
        self._lost.wait(LOSS_SECONDS)
        return self.loss

    def raise_if_requested(self) -> None:
        """Call this before starting something: the `KeyboardInterrupt` of a request may have been lost in a callback.

        Raises:
            KeyboardInterrupt: a stop was requested.
            SearchStopped: Ray has ended.
        """
        if self._requested.is_set():
            raise KeyboardInterrupt
        if self.loss is not None:
            raise self.loss

    def _force_later(self) -> None:
        if self._force is not None and self._timer is None:
            self._timer = threading.Timer(self.force_after, self._force)
            self._timer.daemon = True
            self._timer.start()

    def forget_force(self) -> None:
        """The work has ended in order: nothing is forced any more."""
        if self._timer is not None:
            self._timer.cancel()


@contextmanager
def stop_on_signals(interruption: Interruption, inform: Callable[[str], None]) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP request a stop: an orderly one where processes run, the second time an immediate one.

    A SIGHUP that is ignored, as below nohup, stays ignored.

    Args:
        inform: called with a line for the user.
    """
    terminals = _terminals()

    def stop(number: int, frame: Any) -> None:
        if number == signal.SIGHUP:
            discard_output_to_closed(terminals)
        if not interruption.is_requested() and interruption.needs_cleanup:
            inform("ktray: stopping; once more ends at once")
        interruption.request()

    def ignore_interrupt(error: sys.UnraisableHookArgs) -> None:
        if error.exc_type is not KeyboardInterrupt:  # `Interruption.raise_if_requested` raises that one again
            original_hook(error)

    original_hook, sys.unraisablehook = sys.unraisablehook, ignore_interrupt
    before = {number: signal.signal(number, stop) for number in _stop_signals()}
    try:
        yield
    finally:
        interruption.forget_force()
        sys.unraisablehook = original_hook
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminals() -> list[int]:
    """The descriptors of stdout and stderr that are terminals; either stream may be absent, or be no file."""
    found = []
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):
            found += [stream.fileno()] if os.isatty(stream.fileno()) else []
    return found


def _stop_signals() -> list[signal.Signals]:
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


def discard_output_to_closed(terminals: Iterable[int]) -> None:
    """Discard from now on what is written to terminals that have been closed: every write to them would fail.

    Args:
        terminals: descriptors of this process that were terminals.
    """
    for descriptor in terminals:
        if not os.isatty(descriptor):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)


def restore_signal_handlers() -> None:
    """Install Python's signal handlers again; does nothing outside the main thread, where there are none.

    Ray replaces them below Python: when it starts, by a handler that writes a stack trace to the terminal, and when it ends,
    by the default one, which would kill this process in the middle of its cleanup.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)


def run_until_ended(work: Callable[[], Result], interruption: Interruption, grace: float | None = None) -> Result:
    """``work()`` in a thread of its own, so that a call of Ray that does not return holds up nobody.

    Args:
        grace: seconds for `work` to return by itself after a request. By default few if this process ends anyway, and many
            if it goes on: a thread that uses Ray while its connection is closed makes Ray end the whole process.

    Raises:
        KeyboardInterrupt: a stop was requested, and `work` has not returned.
        SearchStopped: Ray has ended.
    """
    returned, results, errors = threading.Event(), list[Result](), list[BaseException]()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
            errors.append(error)
        returned.set()

    threading.Thread(target=run, daemon=True).start()
    if grace is None:
        grace = CLEANUP_SECONDS if interruption.ends_process else GRACE_SECONDS
    ending_since: float | None = None
    while not returned.wait(POLL_SECONDS):
        if interruption.must_end():
            ending_since = ending_since or time.monotonic()
            allowed = grace if interruption.loss is None else min(grace, LOSS_SECONDS)
            if time.monotonic() - ending_since >= allowed:
                interruption.raise_if_requested()
    if errors and not isinstance(errors[0], UserError | StageFailed):
        if not interruption.is_requested():
            interruption.await_loss()
        interruption.raise_if_requested()  # the error is its consequence: what ends a search may end Ray at the same moment
    if errors:
        raise errors[0]
    if interruption.loss is not None and not interruption.is_requested():
        raise interruption.loss
    return results[0]


@contextmanager
def cancelling_waits(
    scheduler: _CancelsRequests, waiters: Callable[[], Iterable[str]], ended: Callable[[], bool]
) -> Iterator[None]:
    """Cancel every wait once `ended` says so; repeatedly, because waiters may just be about to wait."""
    over = threading.Event()

    def cancel() -> None:
        with suppress(SearchStopped):  # the scheduler has ended, and with it every wait
            while not over.wait(POLL_SECONDS):
                for waiter in list(waiters()) if ended() else ():
                    scheduler.cancel_requests(waiter)

    thread = threading.Thread(target=cancel, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(timeout=2)


def run_concurrently(
    scheduler: _CancelsRequests,
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
    futures: dict[str, Future[Result]] = {name: Future() for name in names}
    waiting = deque(names)

    def run() -> None:
        while waiting and not over.is_set():
            with suppress(IndexError):  # another thread took the last one
                name = waiting.popleft()
                if futures[name].set_running_or_notify_cancel():
                    _settle(futures[name], work, name)

    with cancelling_waits(scheduler, lambda: map(waiter, names), over.is_set):  # a broker that is dying may never answer
        for _ in range(min(concurrent, len(names))):
            # No executor: its threads are waited for when this process ends, even if they wait for a Ray that is gone.
            threading.Thread(target=run, daemon=True).start()
        try:
            return run_until_ended(lambda: [future.result() for future in futures.values()], interruption, 0.0)
        finally:
            over.set()
            wait([future for future in futures.values() if not future.cancel()], timeout=CLEANUP_SECONDS)


def _settle(future: Future[Result], work: Callable[[str], Result], name: str) -> None:
    try:
        future.set_result(work(name))
    except BaseException as error:  # noqa: BLE001 - raised again in the calling thread
        future.set_exception(error)
