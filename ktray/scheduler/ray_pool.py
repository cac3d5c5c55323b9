"""`Pool` over lent workers: the leader works too, and whatever a helper does not return is redone by another worker."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ray
from ray import cloudpickle

from ktray.pool import Item, Result

Helpers = Callable[[], Mapping[str, Any]]
to_bytes: Callable[[Any], bytes] = cloudpickle.dumps


class RayPool:
    """Calls on this worker and on those that are lent to it at the moment.

    Args:
        helpers: name -> actor handle of the workers lent now; called between items, so helpers may come and go.
    """

    def __init__(self, helpers: Helpers) -> None:
        self._helpers = helpers

    @property
    def workers(self) -> int:
        return 1 + len(self._helpers())

    def map(self, function: Callable[[Item, Any], Result], items: Sequence[Item], shared: Any = None) -> list[Result]:
        return _MapCall(function, items, shared).run(self._helpers)


class _MapCall:
    """One call of `map`. The leader and a thread per helper each take the next index until none is left.

    Values travel as bytes, so that all workers get copies that they may write to.
    """

    def __init__(self, function: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> None:
        self.function, self.items, self.shared = function, items, shared
        self.name = uuid.uuid4().hex
        self.changed = threading.Condition()
        self.results: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.waiting = list(reversed(range(len(items))))
        self.sent: dict[int, float] = {}  # index -> when a helper took it
        self.longest_seconds = 0.0
        self.ended = False
        self.function_ref: list[Any] = []

    def run(self, helpers: Helpers) -> list[Any]:
        engaged: set[str] = set()
        try:
            while not self._is_done():
                for name, handle in helpers().items() if len(self.waiting) > 1 else ():
                    if name not in engaged:
                        engaged.add(name)
                        self._start_feeding(handle)
                index = self._take_for_leader(time.monotonic())
                if index is None:
                    with self.changed:
                        if not self._is_done():
                            self.changed.wait(0.05)
                    continue
                began = time.monotonic()
                try:
                    self._note_result(index, self.function(self.items[index], self.shared), began)
                except Exception as error:  # noqa: BLE001 - raised below, if it is the first in the order of the items
                    self._note_error(index, error)
        finally:
            self.ended = True
        if self.errors:
            raise self.errors[min(self.errors)]
        return [self.results[index] for index in range(len(self.items))]

    def _start_feeding(self, handle: Any) -> None:
        if not self.function_ref:
            self.function_ref.append(ray.put(to_bytes((self.function, self.shared))))
        threading.Thread(target=self._feed, args=(handle,), daemon=True).start()

    def _feed(self, handle: Any) -> None:
        """Send one item after the other to a helper."""
        while (index := self._take_for_helper(began := time.monotonic())) is not None:
            item = to_bytes(self.items[index])
            try:
                reply = ray.get(handle.run_item.remote(self.name, self.function_ref, item))
            except ray.exceptions.RayError:
                reply = None
            if reply is None:  # the helper has died, or runs a stage of its own
                with self.changed:
                    if index in self.sent:
                        del self.sent[index]
                        self.waiting.append(index)
                        self.changed.notify_all()
                return
            succeeded, value = cloudpickle.loads(reply)
            if succeeded:
                self._note_result(index, value, began)
            else:
                self._note_error(index, value)

    def _take_for_helper(self, now: float) -> int | None:
        with self.changed:
            index = self._next_waiting()
            if index is not None:
                self.sent[index] = now
            return index

    def _take_for_leader(self, now: float) -> int | None:
        with self.changed:
            index = self._next_waiting()
            if index is not None or not self.sent:
                return index
            oldest = min(self.sent, key=lambda each: self.sent[each])
            if now - self.sent[oldest] < 1.0 + 3 * self.longest_seconds:
                return None
            del self.sent[oldest]  # its helper is slow: the leader computes it, too, and the first result counts
            return oldest

    def _next_waiting(self) -> int | None:
        if self.ended or self.errors:
            # As in a plain loop, nothing starts after the first error.
            self.waiting = [index for index in self.waiting if not self.ended and index < min(self.errors)]
        return self.waiting.pop() if self.waiting else None

    def _note_result(self, index: int, value: Any, began: float) -> None:
        with self.changed:
            self.results.setdefault(index, value)
            self.sent.pop(index, None)
            self.longest_seconds = max(self.longest_seconds, time.monotonic() - began)
            self.changed.notify_all()

    def _note_error(self, index: int, error: BaseException) -> None:
        with self.changed:
            self.sent.pop(index, None)
            if index not in self.results:
                self.errors.setdefault(index, error)
            self.changed.notify_all()

    def _is_done(self) -> bool:
        count = min(self.errors) if self.errors else len(self.items)
        return all(index in self.results for index in range(count))
