"""What the scheduler's parts send each other: the core's actions, the broker's orders to workers, the workers' reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ktray.artifact import Stage
from ktray.scheduler.failure_kinds import EventKind, FailureKind
from ktray.scheduler.workers import Worker, WorkerShape

# ---- core -> broker: actions to carry out


@dataclass(frozen=True)
class AssignStage:
    """Have `worker` run `stage`, and with it the stages in its `beside`.

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
class FenceOrphans:
    """Fence every attempt of this scheduler that no running stage owns."""


@dataclass(frozen=True)
class RequestResult:
    """How a request ended: outcomes per key, or which key failed, why, and the kind of the failure."""

    request: str
    outcomes: tuple[Mapping[str, Any], ...] = ()
    failed: str = ""
    cause: str = ""
    kind: FailureKind | None = None


@dataclass(frozen=True)
class SchedulerEvent:
    """Something that drivers count and show; `seconds` is how long the attempt had run."""

    event: EventKind
    key: str = ""
    stage: str = ""
    worker: str = ""
    seconds: float = 0.0
    cause: str = ""


Action = AssignStage | StartWorker | RetireWorker | KillWorker | FenceAttempt | FenceOrphans | RequestResult | SchedulerEvent

# ---- broker -> worker: answers to a poll and to a heartbeat


@dataclass(frozen=True)
class RunStage:
    """Run this stage; the named workers are lent to it."""

    stage: Stage
    attempt: str
    helpers: tuple[str, ...]
    small_batches: bool


@dataclass(frozen=True)
class PollAgain:
    """There is nothing to do yet."""


@dataclass(frozen=True)
class Exit:
    """End the process."""


Order = RunStage | PollAgain | Exit


@dataclass(frozen=True)
class HeartbeatReply:
    """Whether the worker must exit, because its attempt was fenced; else the names of the workers lent to its attempt."""

    must_exit: bool
    helpers: tuple[str, ...] = ()


# ---- worker -> broker


@dataclass(frozen=True)
class WorkerIdentity:
    """What a worker says about itself in every call."""

    name: str
    node: str
    pid: int
    shape: WorkerShape
    gpu_ids: tuple[str, ...] = ()


@dataclass(frozen=True)
class AttemptSucceeded:
    """An attempt ended well.

    Attributes:
        published: (key, whether this attempt published it) of the stage and of those computed beside it.
        seconds: how long the attempt ran.
    """

    key: str
    attempt: str
    seconds: float
    published: tuple[tuple[str, bool], ...]


@dataclass(frozen=True)
class AttemptFailed:
    """An attempt raised.

    Attributes:
        missing: the key of an input that is not in the store, if that was the cause.
    """

    key: str
    attempt: str
    kind: FailureKind
    cause: str
    traceback: str = ""
    missing: str = ""


Report = AttemptSucceeded | AttemptFailed
