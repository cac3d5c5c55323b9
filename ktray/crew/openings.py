"""What the roster offers at one moment: counted once, then kept up to date while the ledger gives, hires and lends."""

from __future__ import annotations

from collections import Counter
from functools import cached_property

from ktray.crew.needs import Needs
from ktray.crew.roster import Roster, Shape, Worker, shape_of


class Openings:
    """Valid for one turn of the ledger, in which workers only become fewer.

    Attributes:
        starting: shape -> workers that were hired and have not come yet.
        lent: attempt -> workers that are lent to it.
    """

    def __init__(self, roster: Roster, now: float) -> None:
        self.roster = roster
        self.starting: Counter[Shape] = Counter()
        self.lent: Counter[str] = Counter()
        self._idle: dict[Shape, list[Worker]] = {}
        self._full: set[Shape] = set()
        unborrowed: list[Worker] = []
        borrowed: list[Worker] = []
        for worker in roster.workers.values():  # nearly all of a thousand are busy: little is asked of each
            if worker.beat is None:
                self.starting[worker.shape] += 1
            elif worker.lent_to is not None:
                self.lent[worker.lent_to] += 1
                borrowed.append(worker)
            elif worker.leads is None:
                unborrowed.append(worker)
        for worker in reversed(borrowed):  # taken from the end: those that are lent come last
            self._offer(worker, now)
        for worker in reversed(unborrowed):
            self._offer(worker, now)

    def _offer(self, worker: Worker, now: float) -> None:
        if self.roster.available(worker, now):
            self._idle.setdefault(worker.shape, []).append(worker)

    @cached_property
    def _held(self) -> dict[str, Shape]:
        """Node -> what its workers hold, those who are leaving included."""
        cpus, gpus = dict.fromkeys(self.roster.nodes, 0.0), dict.fromkeys(self.roster.nodes, 0.0)
        for worker in self.roster.workers.values():
            cpus[worker.node] = cpus.get(worker.node, 0.0) + worker.shape.cpus
            gpus[worker.node] = gpus.get(worker.node, 0.0) + worker.shape.gpus
        return {name: Shape(cpus[name], gpus[name]) for name in cpus}

    @cached_property
    def _memory(self) -> dict[str, float]:
        """Node -> bytes that are left."""
        left = {name: node.memory for name, node in self.roster.nodes.items()}
        for worker in self.roster.workers.values():
            left[worker.node] = left.get(worker.node, 0.0) - worker.memory
        return left

    def take(self, needs: Needs) -> Worker | None:
        """A worker that can run a stage at once: one that nobody borrowed, else one that is lent."""
        idle = self._idle.get(shape_of(needs), [])
        for index in reversed(range(len(idle))):
            worker = idle[index]
            if not worker.leaving and self._memory[worker.node] >= needs.memory_bytes:
                del idle[index]
                self._memory[worker.node] -= needs.memory_bytes
                return worker
        return None

    def lendable(self, shape: Shape) -> list[Worker]:
        """Idle workers that nobody borrowed, in the order of the roster."""
        return [worker for worker in reversed(self._idle.get(shape, ())) if worker.lent_to is None and not worker.leaving]

    def hire(self, shape: Shape) -> Worker | None:
        """A new worker on the node with most room, or None where there is none."""
        place = None if shape in self._full else self._roomiest(shape)
        if place is None:
            self._full.add(shape)
            return None
        held, worker = self._held[place], self.roster.hire(shape, place)
        self._held[place] = Shape(held.cpus + shape.cpus, held.gpus + shape.gpus)
        self.starting[shape] += 1
        return worker

    def _roomiest(self, shape: Shape) -> str | None:
        if sum(held.cpus for held in self._held.values()) + shape.cpus > self.roster.cpus:
            return None
        found, most = None, (False, -1.0, -1.0)
        for name, node in self.roster.nodes.items():
            cpus, gpus = node.cpus - self._held[name].cpus, node.gpus - self._held[name].gpus
            # A silent node comes last: Ray takes a minute to notice that one is gone.
            room = (name not in self.roster.silent, gpus if shape.gpus else 0.0, cpus)
            if cpus >= shape.cpus and gpus >= shape.gpus - 1e-6 and room > most:
                found, most = name, room
        return found

    def give_up(self, shape: Shape) -> list[Worker]:
        """Idle workers of other shapes that must go so that one of `shape` gets room; none if room is on its way."""
        others = {worker.name for each, idle in self._idle.items() if each != shape for worker in idle if not worker.leaving}
        if not others:
            return []
        staff: dict[str, list[Worker]] = {name: [] for name in self.roster.nodes}
        for worker in self.roster.workers.values():
            staff.setdefault(worker.node, []).append(worker)
        if any(self._will_have_room(place, shape, staff) for place in self.roster.nodes):
            return []
        for place in self.roster.nodes:
            chosen: list[Worker] = []
            for worker in staff[place]:
                if worker.name in others:
                    worker.leaving = True
                    chosen.append(worker)
                    if self._will_have_room(place, shape, staff):
                        return chosen
            for worker in chosen:
                worker.leaving = False
        return []

    def _will_have_room(self, place: str, shape: Shape, staff: dict[str, list[Worker]]) -> bool:
        """Whether a node has room once those who are leaving are gone."""
        node, stay = self.roster.nodes[place], [worker for worker in staff[place] if not worker.leaving]
        cpus = node.cpus - sum(worker.shape.cpus for worker in stay)
        gpus = node.gpus - sum(worker.shape.gpus for worker in stay)
        if cpus < shape.cpus or gpus < shape.gpus - 1e-6:
            return False
        held = sum(worker.shape.cpus for worker in self.roster.workers.values() if not worker.leaving)
        return held + shape.cpus <= self.roster.cpus
