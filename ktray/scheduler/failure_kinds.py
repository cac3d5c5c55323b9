"""Why a stage failed: which kind of failure it is, and its one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ktray.errors import UserError, disk_is_full

OUT_OF_MEMORY = "out of memory"
DISK_FULL = "disk full"
FAILED = "failed"
DIED = "worker died"
_SAID = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def kind_of(error: BaseException, store: Path) -> str:
    """`OUT_OF_MEMORY`, `DISK_FULL` or `FAILED`, by the error or by what it came from.

    Args:
        store: directory of the store, whose disk may be the full one.
    """
    for each in _chain(error):
        # By name and text: torch is not imported here, and it tells of the host's memory by a plain RuntimeError.
        if isinstance(each, MemoryError) or type(each).__name__ == "OutOfMemoryError":
            return OUT_OF_MEMORY
        if isinstance(each, RuntimeError) and any(said in str(each) for said in _SAID):
            return OUT_OF_MEMORY
    return DISK_FULL if disk_is_full(error, store) else FAILED


def line_of(error: BaseException) -> str:
    """The error in one line of at most 500 characters; a user's error speaks for itself."""
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return text[:500]
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def also_alone(cause: str) -> str:
    """What to say of a stage that ran out of memory twice."""
    what = "its memory does not suffice even with the whole GPU, or machine, for itself"
    return f"{what} ({cause[:300]}); use a smaller batch_size, smaller images or a smaller network"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or seen.__context__
