"""Who works here: the workers, what they hold of each node, and who may be hired or given up. Pure: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ktray.scheduler.resources import ResourceRequest

RETURN = 600.0  # seconds in which a node that left may come back before its resources are given up
WHOLE, CPUS = "", "cpus"  # parts of a node that may be kept free, beside the names of its cards


@dataclass(frozen=True)
class WorkerShape:
    """What one worker holds of its node while it lives."""

    cpus: float = 1.0
    gpus: float = 0.0


def shape_of(needs: ResourceRequest) -> WorkerShape:
    """The worker that a stage with these needs runs on; one with a GPU holds no CPU, so that it never waits for one."""
    return WorkerShape(0.0, needs.gpus) if needs.gpus else WorkerShape(max(needs.cpus, 0.01), 0.0)


def said(needs: ResourceRequest) -> str:
    """Needs in words, such as ``1 CPU and 2.0 GiB``."""
    shape = shape_of(needs)
    what = f"{shape.gpus:g} GPU" if shape.gpus else f"{shape.cpus:g} CPU"
    return f"{what} and {needs.memory_bytes / 2**30:.1f} GiB" if needs.memory_bytes else what


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
        cards: names of the GPUs that it has, as it tells; empty until it does.
    """

    name: str
    shape: WorkerShape
    node: str
    pid: int = 0
    beat: float | None = None
    polling: bool = False
    leads: str | None = None
    lent_to: str | None = None
    memory: int = 0
    leaving: bool = False
    cards: tuple[str, ...] = ()

    def lies_in(self, part: str) -> bool:
        """Whether it holds something of a part of its node: `WHOLE`, `CPUS` or a card."""
        return part == WHOLE or (self.shape.cpus > 0 if part == CPUS else part in self.cards)


@dataclass
class WorkerRegistry:
    """All workers of one scheduler.

    Args:
        nodes: node id -> resources.
        cpus: at most so many CPUs for workers, over all nodes.
        stale: a worker without heartbeat for so many seconds gets no new work.

    Attributes:
        kept: node -> card, `CPUS` or `WHOLE`: where room is being made for a stage that has waited, or where one must be alone,
            and where nothing else begins. Whoever dispatches clears it first.
    """

    nodes: Mapping[str, Node]
    cpus: float = float("inf")
    stale: float = 3.0
    workers: dict[str, Worker] = field(default_factory=dict)
    silent: set[str] = field(default_factory=set)  # nodes where a worker fell silent and none was heard of since
    kept: dict[str, str] = field(default_factory=dict)
    _left: dict[str, tuple[Node, float]] = field(default_factory=dict)
    _hired: int = 0

    def see(self, nodes: Mapping[str, Node], now: float) -> None:
        """Take note of the nodes that are there now."""
        self._left |= {name: (node, now) for name, node in self.nodes.items() if name not in nodes}
        self._left = {name: left for name, left in self._left.items() if name not in nodes and now - left[1] < RETURN}
        self.nodes = nodes

    def known(self) -> list[Node]:
        """The nodes that are there, and those that left a short while ago and may come back."""
        return [*self.nodes.values(), *(node for node, _ in self._left.values())]

    def fits(self, needs: ResourceRequest) -> bool:
        """Whether some node could ever run a stage with these needs."""
        shape = shape_of(needs)
        return shape.cpus <= self.cpus and any(
            node.cpus >= shape.cpus and node.gpus >= shape.gpus and node.memory >= needs.memory_bytes for node in self.known()
        )

    def available(self, worker: Worker, now: float) -> bool:
        """Whether a worker waits for work and was heard of lately."""
        if not worker.polling or worker.leads is not None or worker.leaving:
            return False
        return worker.beat is not None and now - worker.beat <= self.stale and worker.node in self.nodes

    def hire(self, shape: WorkerShape, node: str) -> Worker:
        """Enter a worker that is yet to start."""
        self._hired += 1
        return self.add(f"worker-{self._hired}", shape, node)

    def add(self, name: str, shape: WorkerShape, node: str) -> Worker:
        """Enter a worker that was hired now or found alive."""
        self.skip([name])
        self.workers[name] = Worker(name, shape, node)
        return self.workers[name]

    def node_of(self, name: str) -> str:
        """Where a worker is; empty if it is no more."""
        return self.workers[name].node if name in self.workers else ""

    def keep(self, name: str, part: str = WHOLE) -> None:
        """Let nothing begin on this node, or this part of it, until the next dispatch."""
        self.kept[name] = part

    def is_kept(self, worker: Worker) -> bool:
        """Whether a worker must stay idle, because room is being made where it is."""
        return worker.node in self.kept and worker.lies_in(self.kept[worker.node])

    def skip(self, names: Iterable[str]) -> None:
        """Never hire under these names."""
        self._hired = max([self._hired, *(_number(name) for name in names)])


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
