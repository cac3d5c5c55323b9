"""Who works here: the workers, what they hold of each node, and who may be hired or given up. Pure: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ktray.crew.cards import free_shares, has_room
from ktray.crew.needs import Needs

RETURN = 600.0  # seconds in which a node that left may come back before its resources are given up
WHOLE, CPUS = "", "cpus"  # parts of a node that may be kept free, beside the names of its cards


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
        cards: names of the GPUs that it has, as it tells; empty until it does.
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
    cards: tuple[str, ...] = ()


@dataclass
class Roster:
    """All workers of one crew.

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

    def fits(self, needs: Needs) -> bool:
        """Whether some node could ever run a stage with these needs."""
        shape = shape_of(needs)
        return shape.cpus <= self.cpus and any(
            node.cpus >= shape.cpus and node.gpus >= shape.gpus and node.memory >= needs.memory_bytes for node in self.known()
        )

    def idle(self, needs: Needs, now: float) -> Worker | None:
        """A worker that can take a stage at once: one that nobody borrowed, else one that is lent."""
        shape = shape_of(needs)
        free = [
            worker
            for worker in self.workers.values()
            if self.available(worker, now) and worker.shape == shape and not self.is_kept(worker)
        ]
        if needs.memory_bytes:
            rooms = {name for name in {worker.node for worker in free} if self._memory_left(name) >= needs.memory_bytes}
            free = [worker for worker in free if worker.node in rooms]
        return min(free, key=lambda worker: (worker.lent_to is not None, self._wastes_gpus(worker.node, shape)), default=None)

    def _wastes_gpus(self, name: str, shape: Shape) -> bool:
        """Whether it were better to do this elsewhere: who trains on a GPU needs the CPUs beside it."""
        return not shape.gpus and self.nodes[name].gpus > 0

    def available(self, worker: Worker, now: float) -> bool:
        """Whether a worker waits for work and was heard of lately."""
        if not worker.polling or worker.leads is not None or worker.leaving:
            return False
        return worker.beat is not None and now - worker.beat <= self.stale and worker.node in self.nodes

    def starting(self, shape: Shape) -> int:
        """How many workers of this shape were hired and have not come yet."""
        return sum(worker.beat is None and worker.shape == shape for worker in self.workers.values())

    def hire(self, shape: Shape) -> Worker | None:
        """A new worker on the node with most room, or None where there is none."""
        rooms = [name for name in self.nodes if name not in self.kept and self._room(name, shape, keep_leaving=True)]
        if not rooms:
            return None
        place = max(rooms, key=lambda name: self._suits(name, shape))
        self._hired += 1
        return self.add(f"worker-{self._hired}", shape, place)

    def _suits(self, name: str, shape: Shape) -> tuple[float, float]:
        free = self._free(name)
        return (free.gpus, free.cpus) if shape.gpus else (-float(self._wastes_gpus(name, shape)), free.cpus)

    def add(self, name: str, shape: Shape, node: str) -> Worker:
        """Enter a worker that was hired now or found alive."""
        self.skip([name])
        self.workers[name] = Worker(name, shape, node)
        return self.workers[name]

    def skip(self, names: Iterable[str]) -> None:
        """Never hire under these names."""
        self._hired = max([self._hired, *(_number(name) for name in names)])

    def give_up(self, shape: Shape, now: float) -> list[Worker]:
        """Idle workers of other shapes that must go so that one of `shape` gets room; none if room is on its way."""
        if any(self._room(name, shape, keep_leaving=False) for name in self.nodes):
            return []
        one_card = 0 < shape.gpus <= 1
        for place, part in [
            (name, part) for name in self.nodes for part in ([*self._cards(name), WHOLE] if one_card else [WHOLE])
        ]:
            chosen: list[Worker] = []
            for worker in [each for each in self._at(place, part) if each.shape != shape]:
                if self.available(worker, now):
                    worker.leaving = True
                    chosen.append(worker)
                    if self._room(place, shape, keep_leaving=False):
                        return chosen
            for worker in chosen:
                worker.leaving = False
        return []

    def make_room(self, shape: Shape, now: float) -> list[Worker]:
        """Idle workers that must go for one of `shape`, although more have to end their work first.

        Meanwhile nothing else begins on the node, or on the card, where most of the room is.
        """
        if any(self._room(name, shape, keep_leaving=False) for name in self.nodes):
            return []
        places = [(name, card) for name in self.nodes for card in (self._cards(name) if shape.gpus else [CPUS])]
        if not places:
            return []

        def progress(place: tuple[str, str]) -> tuple[float, str, str]:
            busy = [each for each in self._at(*place) if not (each.leaving or self.available(each, now))]
            return (-sum(each.shape.gpus if shape.gpus else each.shape.cpus for each in busy), *place)

        name, card = max(places, key=progress)
        self.kept[name] = card
        chosen = [each for each in self._at(name, card) if each.shape != shape and self.available(each, now)]
        for worker in chosen:
            worker.leaving = True
        return chosen

    def quiet(self, needs: Needs, now: float) -> Worker | None:
        """A worker for a stage that must be alone on its node; else None, and nothing begins where it will be alone soonest."""
        shape = shape_of(needs)
        able = [name for name, node in self.nodes.items() if node.cpus >= shape.cpus and node.memory >= needs.memory_bytes]
        busy = {name: sum(each.leads is not None for each in self._at(name, WHOLE)) for name in able}
        for name in sorted(able, key=lambda name: (busy[name], -self.nodes[name].memory, name)):
            here = [each for each in self._at(name, WHOLE) if each.shape == shape and self.available(each, now)]
            if here and not busy[name] and name not in self.kept:
                self.keep(name)
                return here[0]
        if able:
            self.keep(min(able, key=lambda name: (busy[name], -self.nodes[name].memory, name)))
        return None

    def keep(self, name: str) -> None:
        """Let nothing begin on this node until the next dispatch."""
        self.kept[name] = WHOLE

    def is_kept(self, worker: Worker) -> bool:
        """Whether a worker must stay idle, because room is being made where it is."""
        return worker.node in self.kept and self._lies_in(worker, self.kept[worker.node])

    def _at(self, name: str, part: str) -> list[Worker]:
        return [each for each in self.workers.values() if each.node == name and self._lies_in(each, part)]

    def _lies_in(self, worker: Worker, part: str) -> bool:
        return part == WHOLE or (worker.shape.cpus > 0 if part == CPUS else part in worker.cards)

    def _cards(self, name: str, keep_leaving: bool = True) -> dict[str, float]:
        held = [each for each in self.workers.values() if each.node == name and (keep_leaving or not each.leaving)]
        return free_shares(self.nodes[name].gpus, [(each.shape.gpus, each.cards) for each in held])

    def _free(self, name: str, keep_leaving: bool = True) -> Node:
        held = [each for each in self.workers.values() if each.node == name and (keep_leaving or not each.leaving)]
        node = self.nodes[name]
        return Node(node.cpus - sum(each.shape.cpus for each in held), node.gpus - sum(each.shape.gpus for each in held))

    def _room(self, name: str, shape: Shape, keep_leaving: bool) -> bool:
        free = self._free(name, keep_leaving)
        held = sum(each.shape.cpus for each in self.workers.values() if keep_leaving or not each.leaving)
        if free.cpus < shape.cpus or held + shape.cpus > self.cpus:
            return False
        return not shape.gpus or has_room(self._cards(name, keep_leaving), shape.gpus)

    def _memory_left(self, name: str) -> float:
        node = self.nodes.get(name)
        used = sum(each.memory for each in self.workers.values() if each.node == name)
        return (node.memory if node else 0.0) - used


def _number(name: str) -> int:
    digits = name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0
