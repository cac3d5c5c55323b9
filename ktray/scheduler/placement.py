"""What the registry offers at one moment: counted once, then kept up to date while the core gives, hires and lends."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from ktray.scheduler.gpu_slots import SLACK, free_shares, has_room
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.worker_registry import Worker, WorkerRegistry, WorkerShape, shape_of


class Placement:
    """Valid for one turn of the core, in which workers only become fewer.

    Attributes:
        starting: shape -> workers that were hired and have not come yet.
        coming: shape -> stages that have no worker in this turn.
        lent: attempt -> workers that are lent to it.
    """

    def __init__(self, registry: WorkerRegistry, now: float) -> None:
        self.registry, self.now = registry, now
        self.starting: Counter[WorkerShape] = Counter()
        self.coming: Counter[WorkerShape] = Counter()
        self.lent: Counter[str] = Counter()
        self._idle: dict[WorkerShape, list[Worker]] = {}
        self._full: set[WorkerShape] = set()
        unborrowed: list[Worker] = []
        borrowed: list[Worker] = []
        for worker in registry.workers.values():  # nearly all of a thousand are busy: little is asked of each
            if worker.beat is None:
                self.starting[worker.shape] += 1
            elif worker.lent_to is not None:
                self.lent[worker.lent_to] += 1
                borrowed.append(worker)
            elif worker.leads is None:
                unborrowed.append(worker)
        for group in (borrowed, unborrowed):  # taken from the end: those that are lent come last
            for worker in sorted(
                reversed(group), key=lambda worker: self._wastes_gpus(worker.node, worker.shape), reverse=True
            ):
                if registry.available(worker, now):
                    self._idle.setdefault(worker.shape, []).append(worker)

    def _wastes_gpus(self, name: str, shape: WorkerShape) -> bool:
        """Whether it were better to do this elsewhere: who trains on a GPU needs the CPUs beside it."""
        node = self.registry.nodes.get(name)
        return node is not None and node.gpus > 0 and not shape.gpus

    @cached_property
    def staff(self) -> dict[str, list[Worker]]:
        """Node -> its workers, those who are leaving included."""
        found: dict[str, list[Worker]] = {name: [] for name in self.registry.nodes}
        for worker in self.registry.workers.values():
            found.setdefault(worker.node, []).append(worker)
        return found

    @cached_property
    def _held(self) -> dict[str, WorkerShape]:
        """Node -> what its workers hold, those who are leaving included."""
        cpus, gpus = dict.fromkeys(self.registry.nodes, 0.0), dict.fromkeys(self.registry.nodes, 0.0)
        for worker in self.registry.workers.values():
            cpus[worker.node] = cpus.get(worker.node, 0.0) + worker.shape.cpus
            gpus[worker.node] = gpus.get(worker.node, 0.0) + worker.shape.gpus
        return {name: WorkerShape(cpus[name], gpus[name]) for name in cpus}

    @cached_property
    def _memory(self) -> dict[str, float]:
        """Node -> bytes that are left."""
        left = {name: node.memory for name, node in self.registry.nodes.items()}
        for worker in self.registry.workers.values():
            left[worker.node] = left.get(worker.node, 0.0) - worker.memory
        return left

    def idle(self) -> list[Worker]:
        """All who wait for work, of any shape, also where room is being kept."""
        return [worker for idle in self._idle.values() for worker in idle if not worker.leaving]

    def take(self, needs: ResourceRequest, place: str | None = None) -> Worker | None:
        """A worker that can run a stage at once: one that nobody borrowed, else one that is lent; only on `place` if given.

        Of several one on a node without a GPU, if the stage needs none.
        """
        idle = self._idle.get(shape_of(needs), [])
        for index in reversed(range(len(idle))):
            worker = idle[index]
            if worker.leaving or worker.node != (place or worker.node) or self.registry.is_kept(worker):
                continue
            if self._memory[worker.node] >= needs.memory_bytes:
                del idle[index]
                self._memory[worker.node] -= needs.memory_bytes
                return worker
        return None

    def lendable(self, shape: WorkerShape) -> list[Worker]:
        """Idle workers that nobody borrowed, in the order in which they would be taken."""
        free = [worker for worker in reversed(self._idle.get(shape, ())) if worker.lent_to is None and not worker.leaving]
        return [worker for worker in free if not self.registry.is_kept(worker)] if self.registry.kept else free

    def hire(self, shape: WorkerShape) -> Worker | None:
        """A new worker on the node with most room, or None where there is none; without need of a GPU rather beside none."""
        place = None if shape in self._full else self._roomiest(shape)
        if place is None:
            self._full.add(shape)
            return None
        held, beside = self._held[place], self.staff[place]
        worker = self.registry.hire(shape, place)
        beside.append(worker)
        self._held[place] = WorkerShape(held.cpus + shape.cpus, held.gpus + shape.gpus)
        self.starting[shape] += 1
        return worker

    def _roomiest(self, shape: WorkerShape) -> str | None:
        if sum(held.cpus for held in self._held.values()) + shape.cpus > self.registry.cpus:
            return None
        found, most = None, (False, -2.0, -2.0)
        for name, node in self.registry.nodes.items():
            cpus, gpus = node.cpus - self._held[name].cpus, node.gpus - self._held[name].gpus
            # A silent node comes last: Ray takes a minute to notice that one is gone.
            heard = name not in self.registry.silent
            room = (heard, gpus if shape.gpus else -float(self._wastes_gpus(name, shape)), cpus)
            if cpus < shape.cpus or gpus < shape.gpus - SLACK or room <= most or name in self.registry.kept:
                continue
            if not shape.gpus or has_room(self.cards(name), shape.gpus):
                found, most = name, room
        return found

    def cards(self, place: str, leaving: bool = True) -> dict[str, float]:
        """Card -> share that is free on a node; without `leaving`, as it will be once those who are leaving are gone."""
        held = [(each.shape.gpus, each.cards) for each in self.staff[place] if leaving or not each.leaving]
        return free_shares(self.registry.nodes[place].gpus, held)
