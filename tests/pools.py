"""A pool that does what several processes would: foreign order, and everything crosses a border as bytes."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any


class ShuffledPool:
    """Deals the items to its workers in turn and lets the last worker go first, each from its last item backwards.

    Function, item, shared value and result are pickled, as they are on the way to a Ray worker and back.
    """

    def __init__(self, workers: int) -> None:
        self.worker_count = workers
        self.calls = 0

    def map(self, function: Callable[[Any, Any], Any], items: Sequence[Any], shared: Any = None) -> list[Any]:
        results: dict[int, Any] = {}
        for worker in reversed(range(self.worker_count)):
            for index in reversed(range(worker, len(items), self.worker_count)):
                call, item, value = pickle.loads(pickle.dumps((function, items[index], shared)))
                results[index] = pickle.loads(pickle.dumps(call(item, value)))
                self.calls += 1
        return [results[index] for index in range(len(items))]
