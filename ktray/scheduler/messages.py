"""What the parts of a scheduler send each other, and the kinds of failures and events.

The core leaves actions for the broker, the broker answers workers with orders, and workers report how their attempts ended.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from ktray.artifact import Artifact, Stage
from ktray.errors import DamagedArtifact, MissingInput, UserError, disk_is_full
from ktray.pool import StageContext
from ktray.scheduler.resources import RuntimeSettings
from ktray.scheduler.worker_registry import Worker, WorkerShape
from ktray.stores import Store

BROKER_NAME = "broker"
StageFunction = Callable[[Stage, Store, str, StageContext], tuple[Artifact, bool]]
"""(stage, store, attempt, context) -> (artifact, whether this call published it)."""
Prepare = Callable[[str], None]
"""Called by a worker with its device before it asks for its first stage: what the first stage would have to wait for."""

# ---- priorities of requests, beside those of trials (0, and 1 on their last segment)

AHEAD: Final = -1  # before any trial asks: they will
BACKGROUND: Final = -2  # only on workers that trials leave idle

# ---- kinds of failures and of events

FAILED: Final = "failed"
OUT_OF_MEMORY: Final = "out of memory"
DISK_FULL: Final = "disk full"
CANCELLED: Final = "cancelled"  # nothing failed: the waiter or its whole session withdrew the request
FailureKind = Literal["failed", "out of memory", "disk full", "cancelled"]

STARTED: Final = "started"
PUBLISHED: Final = "published"
SPLIT: Final = "split"  # stages that were computed together failed together, and run again one by one
FENCED: Final = "fenced"  # a worker stopped sending heartbeats
LATE: Final = "late"  # a new worker sent no heartbeat within the time that a start may take
WORKER_DIED: Final = "worker died"
DAMAGED: Final = "damaged"  # an artifact was not as it was written; its cause is a sentence for the user
LossKind = Literal["worker died", "out of memory", "fenced", "late"]
EventKind = Literal["started", "published", "failed", "out of memory", "split", "fenced", "late", "worker died", "damaged"]


# ---- core -> broker: actions to carry out


@dataclass(frozen=True)
class AssignStage:
    """Have `worker` run `stage`, and with it the stages in its `computed_with`.

    Attributes:
        small_batches: the stage ran out of memory before, and now takes few images at a time.
    """

    worker: str
    stage: Stage
    attempt: str
    small_batches: bool = False


@dataclass(frozen=True)
class StartWorker:
    """Start a process for this worker."""

    worker: Worker


@dataclass(frozen=True)
class RetireWorker:
    """Have an idle worker exit."""

    worker: str


@dataclass(frozen=True)
class KillWorker:
    """Kill a process that no longer answers."""

    worker: Worker


@dataclass(frozen=True)
class FenceAttempt:
    """Take its scratch directory away from an attempt, so that it can neither write nor publish."""

    key: str
    attempt: str


@dataclass(frozen=True)
class FenceOrphanedAttempts:
    """Fence every attempt of this scheduler that no running stage owns."""


@dataclass(frozen=True)
class RequestResult:
    """How a request ended: outcomes per key, or which key failed, why, and the kind of the failure."""

    request_id: str
    outcomes: tuple[Mapping[str, Any], ...] = ()
    failed: str = ""
    cause: str = ""
    kind: FailureKind | None = None


@dataclass(frozen=True)
class SchedulerEvent:
    """Something that happened, for drivers to count and show; `seconds` is how long the attempt had run."""

    event: EventKind
    key: str = ""
    stage: str = ""
    worker: str = ""
    seconds: float = 0.0
    cause: str = ""


Action = (
    AssignStage
    | StartWorker
    | RetireWorker
    | KillWorker
    | FenceAttempt
    | FenceOrphanedAttempts
    | RequestResult
    | SchedulerEvent
)

# ---- broker -> worker


@dataclass(frozen=True)
class WorkerOrder:
    """The answer to a worker that asks for work.

    Attributes:
        action: ``run`` the assigned stage; ``poll`` again, because there is nothing to do yet; or ``exit``, which ends the
            process.
        helpers: names of the workers that are lent to the attempt.
    """

    action: Literal["run", "poll", "exit"]
    assignment: AssignStage | None = None
    helpers: tuple[str, ...] = ()


# ---- worker -> broker


@dataclass(frozen=True)
class WorkerIdentity:
    """Which worker calls the broker, and what it holds; part of every call."""

    name: str
    node: str
    pid: int
    shape: WorkerShape
    gpu_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended.

    Attributes:
        seconds: how long a successful attempt ran.
        published: (key, whether this attempt published it) of the stage and of those computed with it, after a success.
        failure: the kind of the failure; None after a success.
        cause: of the failure, in one line.
        missing: the key of an input that is not in the store, if that was the cause.
        damage: sentences about damaged artifacts that this worker has moved aside since its last report.
    """

    key: str
    attempt: str
    seconds: float = 0.0
    published: tuple[tuple[str, bool], ...] = ()
    failure: FailureKind | None = None
    cause: str = ""
    traceback: str = ""
    missing: str = ""
    damage: tuple[str, ...] = ()


# ---- from driver to broker and workers


@dataclass(frozen=True)
class SchedulerConfig:
    """What the broker of a scheduler and all of its workers are given.

    Attributes:
        namespace: Ray namespace of its actors; contains a hash of the code (plugins included), environment, runtime, store
            and stage function.
        store_url: the store of the artifacts.
        stage_function: cloudpickled `StageFunction`; only workers unpickle it.
        runtime_env: of its actors; None where they inherit all that they need.
        name: unique to this scheduler; the names of its attempts begin with it, so that a record tells which of several
            schedulers published it.
        prepare: cloudpickled `Prepare`; empty for none.
    """

    namespace: str
    store_url: str
    stage_function: bytes
    runtime: RuntimeSettings
    runtime_env: Mapping[str, Any] | None
    name: str = "scheduler"
    prepare: bytes = b""


# ---- from an exception to a failure

_ALLOCATION_ERRORS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")


def failure_kind(error: BaseException, store: Path) -> FailureKind:
    """`OUT_OF_MEMORY`, `DISK_FULL` or `FAILED`, by the error or by any error that caused it.

    Args:
        store: directory of the store, whose disk may be the full one.
    """
    for cause in _exception_chain(error):
        # By name and text: torch is not imported here, and it reports a lack of host memory as a plain RuntimeError.
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
            return OUT_OF_MEMORY
        if isinstance(cause, RuntimeError) and any(text in str(cause) for text in _ALLOCATION_ERRORS):
            return OUT_OF_MEMORY
    return DISK_FULL if disk_is_full(error, store) else FAILED


def describe_error(error: BaseException) -> str:
    """The error in one line of at most 500 characters.

    A sentence that ktray wrote stands alone: a name of Python's would tell its reader nothing. Other errors have their class,
    because a text such as ``'k'`` says nothing without it.
    """
    text = " ".join(str(error).split())
    is_sentence = isinstance(error, UserError | MissingInput | DamagedArtifact) or type(error) is ValueError
    if text and is_sentence:
        return text[:500]
    return f"{type(error).__name__}: {text}"[:500] if text else type(error).__name__


def repeated_out_of_memory_text(cause: str) -> str:
    """The cause of a stage that ran out of memory again although it ran exclusively."""
    what = "it ran out of memory even with the whole GPU, or machine, to itself"
    return f"{what} ({cause[:300]}); use a smaller batch_size, smaller images or a smaller network"


def _exception_chain(error: BaseException) -> Iterator[BaseException]:
    current: BaseException | None = error
    while current is not None:
        yield current
        current = current.__cause__ or current.__context__
