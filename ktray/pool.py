"""How one function is called on many workers. `LocalPool` here, `RayPool` in the crew; results never depend on which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool(Protocol):
    """Workers that call one function on many items.

    A function given to `map` is a module-level function of (item, shared); it must not depend on which worker runs it, nor
    on what else that worker ran. Items hold paths and small arrays; big arrays live in files that every worker can map.
    """

    @property
    def workers(self) -> int:
        """How many calls can run at the same time."""

    def map(self, function: Callable[[Item, Any], Result], items: Sequence[Item], shared: Any = None) -> list[Result]:
        """``[function(item, shared) for item in items]``, in the order of `items`; the first error is raised."""


class LocalPool:
    """One process, one call after the other."""

    workers = 1

    def map(self, function: Callable[[Item, Any], Result], items: Sequence[Item], shared: Any = None) -> list[Result]:
        return [function(item, shared) for item in items]
