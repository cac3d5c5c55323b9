"""Kinds of failures and of events, and how an exception becomes a failure of one kind with a cause of one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from ktray.errors import UserError, disk_is_full

FAILED: Final = "failed"
OUT_OF_MEMORY: Final = "out of memory"
DISK_FULL: Final = "disk full"
CANCELLED: Final = "cancelled"  # nothing failed: the waiter, or its whole session, gave the request up
FailureKind = Literal["failed", "out of memory", "disk full", "cancelled"]

STARTED: Final = "started"
PUBLISHED: Final = "published"
SPLIT: Final = "apart"  # stages that were computed together, and failed together, run again one by one
FENCED: Final = "fenced"  # a worker stopped sending heartbeats
LATE: Final = "late"  # a new worker sent no heartbeat within the time that a start may take
WORKER_DIED: Final = "worker died"
LossKind = Literal["worker died", "out of memory", "fenced", "late"]
EventKind = Literal["started", "published", "failed", "out of memory", "apart", "fenced", "late", "worker died"]

_ALLOCATION_ERRORS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def failure_kind(error: BaseException, store: Path) -> FailureKind:
    """`OUT_OF_MEMORY`, `DISK_FULL` or `FAILED`, by the error or by any error that caused it.

    Args:
        store: directory of the store, whose disk may be the full one.
    """
    for cause in _causes(error):
        # By name and text: torch is not imported here, and it reports a lack of host memory as a plain RuntimeError.
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return OUT_OF_MEMORY
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in _ALLOCATION_ERRORS):
            return OUT_OF_MEMORY
    return DISK_FULL if disk_is_full(error, store) else FAILED


def one_line(error: BaseException) -> str:
    """The error in one line of at most 500 characters; a `UserError` without its class name."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text[:500]
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def exclusive_failure(cause: str) -> str:
    """The cause of a stage that ran out of memory again although it ran exclusively."""
    what = "its memory does not suffice even with the whole GPU, or machine, for itself"
    return f"{what} ({cause[:300]}); use a smaller batch_size, smaller images or a smaller network"


def _causes(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
