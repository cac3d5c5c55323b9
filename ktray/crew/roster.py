"""Who works here: the workers, what they hold of each node, and who may be hired or given up. Pure: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ktray.crew.needs import Needs


@dataclass(frozen=True)
class Shape:
    """What one worker holds of its node while it lives."""

    cpus: float = 1.0
    gpus: float = 0.0


def shape_of(needs: Needs) -> Shape:
    """The worker that a stage with these needs runs on; one with a GPU holds no CPU, so that it never waits for one."""
    return Shape(0.0, needs.gpus) if needs.gpus else Shape(max(needs.cpus, 0.01), 0.0)


@dataclass(frozen=True)
class Node:
    """Resources of one machine; memory in bytes."""

    cpus: float
    gpus: float = 0.0
    memory: float = float("inf")


@dataclass
class Worker:
    """One worker process as the broker sees it.

    Attributes:
        beat: time of the last heartbeat, None until the first.
        polling: it asked for work and waits for the answer.
        leads: attempt of the stage that it runs.
        lent_to: attempt of the stage that it helps.
        leaving: it will be told to go.
    """

    name: str
    shape: Shape
    node: str
    pid: int = 0
    beat: float | None = None
    polling: bool = False
    leads: str | None = None
    lent_to: str | None = None
    memory: int = 0
    leaving: bool = False


@dataclass
class Roster:
    """All workers of one crew.

    Args:
        nodes: node id -> resources.
        cpus: at most so many CPUs for workers, over all nodes.
        stale: a worker without heartbeat for so many seconds gets no new work.
    """

    nodes: Mapping[str, Node]
    cpus: float = float("inf")
    stale: float = 3.0
    workers: dict[str, Worker] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)  # nodes where a worker fell silent and none was heard of since
    _hired: int = 0

    def fits(self, needs: Needs) -> bool:
        """Whether some node could ever run a stage with these needs."""
        shape = shape_of(needs)
        return shape.cpus <= self.cpus and any(
            node.cpus >= shape.cpus and node.gpus >= shape.gpus and node.memory >= needs.memory_bytes
            for node in self.nodes.values()
        )

    def available(self, worker: Worker, now: float) -> bool:
        """Whether a worker waits for work and was heard of lately."""
        fresh = worker.beat is not None and now - worker.beat <= self.stale
        return worker.polling and fresh and worker.leads is None and not worker.leaving

    def hire(self, shape: Shape, node: str) -> Worker:
        """Enter a worker that is yet to start."""
        self._hired += 1
        return self.add(f"worker-{self._hired}", shape, node)

    def add(self, name: str, shape: Shape, node: str) -> Worker:
        """Enter a worker that was hired now or found alive."""
        self.skip([name])
        self.workers[name] = Worker(name, shape, node)
        return self.workers[name]

    def skip(self, names: Iterable[str]) -> None:
        """Never hire under these names."""
        self._hired = max([self._hired, *(_number(name) for name in names)])


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
