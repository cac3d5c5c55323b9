"""The registry of workers: which there are, on which node, and what each holds of it. Pure: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from ktray.scheduler.resources import ResourceRequest

WORKER_PREFIX = "worker-"
RECENT_KEYS = 32  # of what a worker has read or made, by which the next stage finds it
NODE_RETURN_SECONDS = 600.0  # a node that left counts as one that may come back for this long
WHOLE_NODE, CPU_PART = "", "cpus"  # parts of a node that can be reserved; the others are the ids of its GPUs


@dataclass(frozen=True)
class WorkerShape:
    """What one worker holds of its node while it lives."""

    cpus: float = 1.0
    gpus: float = 0.0


def worker_shape_for(request: ResourceRequest) -> WorkerShape:
    """The shape of the worker that serves this request; one with a GPU holds no CPU, so that it never waits for one."""
    return WorkerShape(0.0, request.gpus) if request.gpus else WorkerShape(max(request.cpus, 0.01), 0.0)


def describe_resources(request: ResourceRequest) -> str:
    """The request in words, such as ``1 CPU and 2.0 GiB``."""
    shape = worker_shape_for(request)
    units = f"{shape.gpus:g} GPU" if shape.gpus else f"{shape.cpus:g} CPU"
    return f"{units} and {request.memory_bytes / 2**30:.1f} GiB" if request.memory_bytes else units


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
        last_heartbeat: time of its last heartbeat; None until the first.
        polling: it asked for work and waits for the answer.
        attempt: the attempt that it runs.
        lent_to: the attempt that it helps.
        reserved_memory: bytes of host memory that its stage reserves.
        retiring: it gets no new stage and exits when it next asks for one.
        gpu_ids: names of its GPUs as it reports them; empty until its first heartbeat.
        last_busy: when it last had a stage, as far as heartbeats tell.
        recent: keys of what its last stages read and made, the newest last: it may still have them in memory.
    """

    name: str
    shape: WorkerShape
    node: str
    pid: int = 0
    last_heartbeat: float | None = None
    polling: bool = False
    attempt: str | None = None
    lent_to: str | None = None
    reserved_memory: int = 0
    retiring: bool = False
    gpu_ids: tuple[str, ...] = ()
    last_busy: float = 0.0
    recent: tuple[str, ...] = ()

    def note_stage(self, keys: Iterable[str], now: float) -> None:
        """It begins a stage that reads or makes these keys."""
        new = dict.fromkeys(keys)
        self.last_busy = now
        self.recent = (*(key for key in self.recent if key not in new), *new)[-RECENT_KEYS:]

    def affinity(self, keys: Collection[str]) -> int:
        """How many of these keys its last stages have read or made."""
        return sum(key in keys for key in self.recent)

    def uses(self, part: str) -> bool:
        """Whether it holds anything of a part of its node: `WHOLE_NODE`, `CPU_PART` or the id of a GPU."""
        return part == WHOLE_NODE or (self.shape.cpus > 0 if part == CPU_PART else part in self.gpu_ids)


@dataclass
class WorkerRegistry:
    """All workers of one scheduler.

    Args:
        nodes: node id -> resources.
        cpu_limit: CPUs that all workers together may hold.
        stale_after: a worker without a heartbeat for this many seconds gets no new stage.

    Attributes:
        silent_nodes: nodes where a worker fell silent and from which no heartbeat came since.
        reserved: node -> the part of it where no stage may start: room is being made there for a stage that has waited long,
            or a stage runs there exclusively. Recomputed by each dispatch.
    """

    nodes: Mapping[str, Node]
    cpu_limit: float = float("inf")
    stale_after: float = 3.0
    workers: dict[str, Worker] = field(default_factory=dict)
    silent_nodes: set[str] = field(default_factory=set)
    reserved: dict[str, str] = field(default_factory=dict)
    _departed: dict[str, tuple[Node, float]] = field(default_factory=dict)
    _last_number: int = 0

    def set_alive_nodes(self, nodes: Mapping[str, Node], now: float) -> None:
        """Replace the nodes by those that are alive now."""
        self._departed |= {name: (node, now) for name, node in self.nodes.items() if name not in nodes}
        self._departed = {
            name: departure
            for name, departure in self._departed.items()
            if name not in nodes and now - departure[1] < NODE_RETURN_SECONDS
        }
        self.nodes = nodes
        self.silent_nodes &= nodes.keys() | self._departed.keys()

    def alive_and_departed_nodes(self) -> list[Node]:
        """The nodes that are alive, and those that left a short while ago and may come back."""
        return [*self.nodes.values(), *(node for node, _ in self._departed.values())]

    def could_ever_fit(self, request: ResourceRequest) -> bool:
        """Whether some node could ever serve this request."""
        shape = worker_shape_for(request)
        return shape.cpus <= self.cpu_limit and any(
            node.cpus >= shape.cpus and node.gpus >= shape.gpus and node.memory >= request.memory_bytes
            for node in self.alive_and_departed_nodes()
        )

    def is_available(self, worker: Worker, now: float) -> bool:
        """Whether a worker waits for a stage and sent a heartbeat lately."""
        if not worker.polling or worker.attempt is not None or worker.retiring:
            return False
        return (
            worker.last_heartbeat is not None and now - worker.last_heartbeat <= self.stale_after and worker.node in self.nodes
        )

    def register_new(self, shape: WorkerShape, node: str) -> Worker:
        """Add a worker that is yet to be started, under a new name."""
        self._last_number += 1
        return self.register(f"{WORKER_PREFIX}{self._last_number}", shape, node)

    def register(self, name: str, shape: WorkerShape, node: str) -> Worker:
        """Add a worker under this name."""
        self.exclude_names([name])
        self.workers[name] = Worker(name, shape, node)
        return self.workers[name]

    def node_of(self, name: str) -> str:
        """The node of a worker; empty if there is no such worker."""
        return self.workers[name].node if name in self.workers else ""

    def reserve(self, node: str, part: str = WHOLE_NODE) -> None:
        """Keep stages off this node, or this part of it, until the next dispatch."""
        self.reserved[node] = part

    def must_stay_idle(self, worker: Worker) -> bool:
        """Whether a worker must stay idle because the part of the node that it holds is reserved."""
        return worker.node in self.reserved and worker.uses(self.reserved[worker.node])

    def exclude_names(self, names: Iterable[str]) -> None:
        """Never give any of these names to a new worker."""
        self._last_number = max([self._last_number, *map(_worker_number, names)])


def _worker_number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
