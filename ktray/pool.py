"""What a stage runs with: the `StageContext` and its `Pool` of workers, which is this process alone or Ray workers."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

SMALL_BATCH_SIZE = 32  # images per batch after a usual batch did not fit into memory

Item = TypeVar("Item")
Result = TypeVar("Result")


class Pool(Protocol):
    """Workers that call one function on many items.

    A function given to `map` is a module-level function of (item, shared). Its result must not depend on which worker runs it,
    nor on what else that worker ran. Items hold paths and small arrays; large arrays lie in files that every worker can map.
    """

    @property
    def worker_count(self) -> int:
        """How many calls can run at the same time."""

    @property
    def worked(self) -> int:
        """How many different workers have computed anything so far, the one that runs the stage included."""

    def map(self, function: Callable[[Item, Any], Result], items: Sequence[Item], shared: Any = None) -> list[Result]:
        """``[function(item, shared) for item in items]``, in the order of `items`; the first error is raised."""


class LocalPool:
    """Calls the function in this process, on one item after the other."""

    worker_count = 1
    worked = 1

    def map(self, function: Callable[[Item, Any], Result], items: Sequence[Item], shared: Any = None) -> list[Result]:
        return [function(item, shared) for item in items]


def _no_progress(values: Mapping[str, float]) -> None:
    """Discard progress."""


@dataclass(frozen=True)
class StageContext:
    """The resources that a stage runs with. None of them may change a result.

    Attributes:
        pool: workers for what can be split.
        device: torch device of the worker that runs the stage, such as ``cpu`` or ``cuda:0``.
        progress: called with a few numbers (``{"epoch": 3, "of": 8}``) whenever the stage has made progress.
        checkpoint_seconds: seconds of work that a killed stage may lose.
        memmap_bytes: data sets with more bytes of pixels than this are decoded from their files while they are read, instead
            of being written to a memmap.
        max_batch_size: most images that go through a network at once; None for a usual batch. Smaller batches change the last
            bit of features, and in training what batch norm sees. So only a stage that ran out of memory gets them, and its
            record says so. A training whose loss is not a mean over images (`Task.mean_over_images`) keeps whole batches.
    """

    pool: Pool = field(default_factory=LocalPool)
    device: str = "cpu"
    progress: Callable[[Mapping[str, float]], None] = _no_progress
    checkpoint_seconds: float = 20.0
    memmap_bytes: int = 20 << 30
    max_batch_size: int | None = None


def release_gpu_memory(after_failure: bool = False) -> None:
    """Return the GPU memory that torch caches to other processes.

    Args:
        after_failure: also collect what the error held, once it is gone. Its frames and objects refer to each other, and the
            memory of CUDA graphs among them stays reserved until they are collected; the next attempt would not fit beside it.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    if after_failure:
        gc.collect()
    torch.cuda.empty_cache()
