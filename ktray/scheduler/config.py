"""What a scheduler is founded on: the same for its broker and all of its workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ktray.scheduler.resources import RuntimeSettings

BROKER = "broker"
WORKER = "worker-"


@dataclass(frozen=True)
class SchedulerConfig:
    """The founding papers of a scheduler.

    Attributes:
        namespace: Ray namespace of its actors; it carries a hash of the code, plugins included, and of all below.
        store_url: where artifacts are.
        work: cloudpickled function (stage, store, attempt, means) -> (artifact, computed); only workers open it.
        environment: environment variables of its processes.
        name: of this scheduler alone; its attempts begin with it, so that a record says whose it is where several publish.
    """

    namespace: str
    store_url: str
    work: bytes
    runtime: RuntimeSettings
    environment: Mapping[str, str]
    name: str = "scheduler"
