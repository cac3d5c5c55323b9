"""`Pool` over borrowed workers: the leader works too, and whatever a helper does not bring back is done by another."""

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


class RayPool:
    """Calls on this worker and on those that are lent to it at the moment.

    Args:
        helpers: name -> actor handle of the workers lent now; asked between items, so help may come later or go.
    """

    def __init__(self, helpers: Helpers) -> None:
        self._helpers = helpers

    @property
    def workers(self) -> int:
        return 1 + len(self._helpers())

    def map(self, function: Callable[[Item, Any], Result], items: Sequence[Item], shared: Any = None) -> list[Result]:
        return _Call(function, items, shared).lead(self._helpers)


class _Call:
    """One `map`. Threads, one per helper, take the next index; values travel as bytes, so that all get writable copies."""

    def __init__(self, function: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any) -> None:
        self.function, self.items, self.shared = function, items, shared
        self.name = uuid.uuid4().hex
        self.change = threading.Condition()
        self.results: dict[int, Any] = {}
        self.errors: dict[int, BaseException] = {}
        self.waiting = list(reversed(range(len(items))))
        self.lent: dict[int, float] = {}
        self.longest = 0.0
        self.over = False
        self.box: list[Any] = []

    def lead(self, helpers: Helpers) -> list[Any]:
        serving: set[str] = set()
        try:
            while not self._is_done():
                for name, handle in helpers().items() if len(self.waiting) > 1 else ():
                    if name not in serving:
                        serving.add(name)
                        self._engage(handle)
                index = self._take(time.monotonic(), for_helper=False)
                if index is None:
                    with self.change:
                        if not self._is_done():
                            self.change.wait(0.05)
                    continue
                began = time.monotonic()
                try:
                    self._settle(index, self.function(self.items[index], self.shared), began)
                except Exception as error:  # noqa: BLE001 - raised below, if it is the first in the order of the items
                    self._refuse(index, error)
        finally:
            self.over = True
        if self.errors:
            raise self.errors[min(self.errors)]
        return [self.results[index] for index in range(len(self.items))]

    def _engage(self, handle: Any) -> None:
        if not self.box:
            self.box.append(ray.put(cloudpickle.dumps((self.function, self.shared))))
        threading.Thread(target=self._serve, args=(handle,), daemon=True).start()

    def _serve(self, handle: Any) -> None:
        while (index := self._take(began := time.monotonic(), for_helper=True)) is not None:
            try:
                reply = ray.get(handle.help.remote(self.name, self.box, cloudpickle.dumps(self.items[index])))
            except ray.exceptions.RayError:
                reply = None
            if reply is None:  # dead, or called away to a stage of its own
                with self.change:
                    if index in self.lent:
                        del self.lent[index]
                        self.waiting.append(index)
                        self.change.notify_all()
                return
            good, value = cloudpickle.loads(reply)
            if good:
                self._settle(index, value, began)
            else:
                self._refuse(index, value)

    def _take(self, now: float, for_helper: bool) -> int | None:
        with self.change:
            if self.over or self.errors:
                # Like one loop would: nothing after the first error is begun.
                self.waiting = [index for index in self.waiting if not self.over and index < min(self.errors)]
            if self.waiting:
                index = self.waiting.pop()
                if for_helper:
                    self.lent[index] = now
                return index
            if for_helper or not self.lent:
                return None
            index = min(self.lent, key=lambda each: self.lent[each])
            if now - self.lent[index] < 1.0 + 3 * self.longest:
                return None
            del self.lent[index]  # slow to answer: done here as well, whoever comes first counts
            return index

    def _settle(self, index: int, value: Any, began: float) -> None:
        with self.change:
            self.results.setdefault(index, value)
            self.lent.pop(index, None)
            self.longest = max(self.longest, time.monotonic() - began)
            self.change.notify_all()

    def _refuse(self, index: int, error: BaseException) -> None:
        with self.change:
            self.lent.pop(index, None)
            if index not in self.results:
                self.errors.setdefault(index, error)
            self.change.notify_all()

    def _is_done(self) -> bool:
        count = min(self.errors) if self.errors else len(self.items)
        return all(index in self.results for index in range(count))
