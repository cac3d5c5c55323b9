"""What the broker's books hold, and the actions that follow from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.crew.roster import Worker


@dataclass(frozen=True)
class Give:
    """Have `worker` run `stage`."""

    worker: str
    stage: Stage
    attempt: str


@dataclass(frozen=True)
class Hire:
    """Start a process for this worker."""

    worker: Worker


@dataclass(frozen=True)
class Dismiss:
    """Tell an idle worker to go."""

    worker: str


@dataclass(frozen=True)
class Fence:
    """Take the scratch directory away from an attempt."""

    key: str
    attempt: str


@dataclass(frozen=True)
class Kill:
    """End a process that no longer answers."""

    worker: Worker


@dataclass(frozen=True)
class Answer:
    """Tell a request how it ended: outcomes per key, or the key that failed, why, and which kind of failure."""

    request: str
    outcomes: tuple[Mapping[str, Any], ...] = ()
    failed: str = ""
    cause: str = ""
    kind: str = ""


@dataclass(frozen=True)
class Event:
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
class Want:
    """A stage that somebody wants and that is not in the store; `priority` is the highest of its requests, 0 without any."""

    stage: Stage
    order: int
    since: float
    owner: str = ""
    requests: set[str] = field(default_factory=set)
    priority: int = 0


@dataclass
class Run:
    """An attempt at a stage, on a worker; `seen` once a heartbeat of the worker named it, `moves` times its work moved."""

    key: str
    stage: Stage
    attempt: str
    worker: str
    since: float
    moved: float
    progress: Mapping[str, float] = field(default_factory=dict)
    seen: bool = False
    moves: int = 0
