"""Which workers are hired, lent and told to go, so that what waits finds one of its shape. Pure, a part of the core."""

from __future__ import annotations

from typing import Any

from ktray.scheduler import eviction
from ktray.scheduler.messages import RetireWorker, StartWorker
from ktray.scheduler.placement import Placement
from ktray.scheduler.retry_policy import DEATHS
from ktray.scheduler.worker_registry import Worker, WorkerRegistry, WorkerShape

PATIENCE = 30.0  # seconds that a stage waits for a worker of its shape before others are held back for it


class WorkerScaling:
    """Changes to the registry.

    Args:
        registry: the workers.
        outbox: where actions are left.

    Attributes:
        stillborn: workers in a row that died before their first heartbeat, each hired after the one before had died.
    """

    def __init__(self, registry: WorkerRegistry, outbox: list[Any]) -> None:
        self.registry, self.outbox = registry, outbox
        self.stillborn = 0
        self._together = set[str]()
        self._blocked: dict[WorkerShape, float] = {}

    def warm(self, workers: int) -> None:
        """Hire usual workers before the first stage comes."""
        openings = Placement(self.registry, 0.0)
        for _ in range(0 if self.stillborn else workers - len(self.registry.workers)):
            self._hired(WorkerShape(), openings)

    def _hired(self, shape: WorkerShape, openings: Placement) -> bool:
        worker = openings.hire(shape)
        if worker is not None:
            self.outbox.append(StartWorker(worker))
        return worker is not None

    def count_stillborn(self, worker: Worker) -> bool:
        """A worker has died before its first heartbeat; whether to hire no more, since so many in a row did.

        One that goes with its node counts for nothing, and of those that were starting at once only one counts: a node may
        take all of them along before anybody hears that it is gone.
        """
        if worker.node not in self.registry.nodes or worker.name in self._together:
            return False
        self._together = {each.name for each in self.registry.workers.values() if each.beat is None}
        self.stillborn = (self.stillborn + 1) % DEATHS
        return not self.stillborn

    def hire(self, shape: WorkerShape, alone: bool, openings: Placement) -> bool:
        """A worker for a stage that has none, or room for one; False if it must wait for that room."""
        openings.coming[shape] += 1
        if openings.starting[shape] >= openings.coming[shape] or self._hired(shape, openings):
            return True
        leaving = eviction.give_up(openings, shape)
        if any(worker.shape == shape for worker in self.registry.workers.values()):
            self._blocked.pop(shape, None)
        else:
            # Small stages that follow each other would keep a large one waiting for ever: it never finds all its room at once.
            since = self._blocked.setdefault(shape, openings.now)
            if not leaving and (alone or openings.now - since >= PATIENCE):
                leaving = eviction.make(openings, shape)
        self.outbox += [RetireWorker(each.name) for each in leaving]
        return False

    def rest(self, openings: Placement) -> None:
        """Forget since when stages of a shape wait for room where none waits any more; `openings` have seen all that wait."""
        self._blocked = {shape: since for shape, since in self._blocked.items() if openings.coming[shape]}

    def lend(self, attempt: str, shape: WorkerShape, helpers: int, openings: Placement) -> None:
        """Idle workers, also new ones, of the shape of who leads, for an attempt that may borrow so many."""
        missing = helpers - openings.lent[attempt]
        for worker in openings.lendable(shape)[: max(0, missing)]:
            worker.lent_to, missing = attempt, missing - 1
        for _ in range(missing - openings.starting[shape]):
            if self.stillborn or not self._hired(shape, openings):
                break

    def helpers(self, attempt: str) -> list[str]:
        """Names of the workers that are lent to an attempt."""
        return [worker.name for worker in self.registry.workers.values() if worker.lent_to == attempt]
