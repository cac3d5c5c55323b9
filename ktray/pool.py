"""How one function is called on many workers: `LocalPool` here, `RayPool` in the scheduler. No result depends on which."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

FEW_IMAGES = 32  # what a device holds at once where a usual batch was too much

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


def _silent(values: Mapping[str, float]) -> None:
    """Tell nobody."""


@dataclass(frozen=True)
class StageContext:
    """What a stage is given to work with; none of it may change a result.

    Attributes:
        pool: workers for what can be split.
        device: torch device of the worker that runs the stage, such as ``cpu`` or ``cuda:0``.
        progress: call it with a few numbers (``{"epoch": 3, "of": 8}``) whenever work has moved.
        checkpoint_seconds: how much work a killed stage may lose.
        memmap_bytes: pixels above this are streamed from their files instead of written to a memmap.
        most_images: how many images may go through a network at once; None for a usual batch. Smaller pieces change the last
            bit, and in training what batch norm sees, so only a stage that ran out of memory gets them, and its record says so.
            A training whose task is no mean over images (`Task.mean_over_images`) has whole batches all the same.
    """

    pool: Pool = field(default_factory=LocalPool)
    device: str = "cpu"
    progress: Callable[[Mapping[str, float]], None] = _silent
    checkpoint_seconds: float = 20.0
    memmap_bytes: int = 20 << 30
    most_images: int | None = None
