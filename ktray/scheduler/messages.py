"""What the broker's books hold, and the actions that follow from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.scheduler.worker_registry import Worker


@dataclass(frozen=True)
class AssignStage:
    """Have `worker` run `stage`, and with it what is beside it; with `few` images at once if it ran out of memory before."""

    worker: str
    stage: Stage
    attempt: str
    few: bool = False


@dataclass(frozen=True)
class StartWorker:
    """Start a process for this worker."""

    worker: Worker


@dataclass(frozen=True)
class RetireWorker:
    """Tell an idle worker to go."""

    worker: str


@dataclass(frozen=True)
class FenceAttempt:
    """Take the scratch directory away from an attempt."""

    key: str
    attempt: str


@dataclass(frozen=True)
class FenceOrphans:
    """Take the scratch directories away from all attempts of this scheduler that no run owns."""


@dataclass(frozen=True)
class KillWorker:
    """End a process that no longer answers."""

    worker: Worker


@dataclass(frozen=True)
class RequestResult:
    """Tell a request how it ended: outcomes per key, or the key that failed, why, and which kind of failure."""

    request: str
    outcomes: tuple[Mapping[str, Any], ...] = ()
    failed: str = ""
    cause: str = ""
    kind: str = ""


@dataclass(frozen=True)
class SchedulerEvent:
    """Something that drivers count and show."""

    event: str
    key: str = ""
    stage: str = ""
    worker: str = ""
    seconds: float = 0.0
    cause: str = ""


@dataclass
class Request:
    """Stages that one waiter wants; `waiter` is empty for a prefetch."""

    name: str
    waiter: str
    session: str
    priority: int
    since: float
    keys: tuple[str, ...]
    pending: set[str] = field(default_factory=set)
    states: dict[str, str] = field(default_factory=dict)
    found: dict[str, Artifact] = field(default_factory=dict)


@dataclass
class PendingStage:
    """A stage that somebody wants and that is not in the store.

    Attributes:
        trials: how many of its requests are of trials that wait.
        priorities: how many of its requests have which priority.
        seconds: how long it is thought to run.
        path: how long it and the longest chain of wants that wait for it are thought to run.
    """

    stage: Stage
    order: int
    since: float
    owner: str = ""
    requests: set[str] = field(default_factory=set)
    trials: int = 0
    priorities: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    path: float = 0.0


@dataclass
class RunningStage:
    """An attempt at a stage, on a worker; `seen` once a heartbeat of the worker named it, `moves` times its work moved.

    A family that one worker makes has a run per key, all under one attempt; `leader` is the key that the worker knows it by.
    """

    key: str
    stage: Stage
    attempt: str
    worker: str
    since: float
    moved: float
    progress: Mapping[str, float] = field(default_factory=dict)
    seen: bool = False
    moves: int = 0
    leader: str = ""
