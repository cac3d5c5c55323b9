"""Which workers are hired, lent and told to go, so that what waits finds one of its shape. Pure, a part of the ledger."""

from __future__ import annotations

from collections import Counter
from typing import Any

from ktray.crew.books import Dismiss, Hire, Want
from ktray.crew.roster import Roster, Shape

PATIENCE = 30.0  # seconds that a stage waits for a worker of its shape before others are held back for it


class Hiring:
    """Changes to the roster.

    Args:
        roster: the workers.
        outbox: where actions are left.

    Attributes:
        coming: how many wants of each shape have no worker in this dispatch; whoever dispatches clears it.
        stillborn: workers in a row that died before their first heartbeat.
    """

    def __init__(self, roster: Roster, outbox: list[Any]) -> None:
        self.roster, self.outbox = roster, outbox
        self.coming: Counter[Shape] = Counter()
        self.stillborn = 0

    def warm(self, workers: int) -> None:
        """Hire usual workers before the first stage comes."""
        for _ in range(0 if self.stillborn else workers - len(self.roster.workers)):
            self._hired(Shape())

    def _hired(self, shape: Shape) -> bool:
        worker = self.roster.hire(shape)
        if worker is not None:
            self.outbox.append(Hire(worker))
        return worker is not None

    def hire(self, want: Want, shape: Shape, alone: bool, now: float) -> bool:
        """A worker for a stage that has none, or room for one; whether a worker comes."""
        self.coming[shape] += 1
        if self.roster.starting(shape) >= self.coming[shape] or self._hired(shape):
            return True
        want.blocked = now if want.blocked is None else want.blocked
        leaving = self.roster.give_up(shape, now)
        # Small stages that follow each other would keep a large one waiting for ever: it never finds all its room at once.
        urgent = alone or now - want.blocked >= PATIENCE
        if not leaving and urgent and all(worker.shape != shape for worker in self.roster.workers.values()):
            leaving = self.roster.make_room(shape, now)
        self.outbox += [Dismiss(each.name) for each in leaving]
        return False

    def lend(self, attempt: str, shape: Shape, helpers: int, now: float) -> None:
        """Idle workers, also new ones, of the shape of who leads, for an attempt that may borrow so many."""
        missing = helpers - len(self.helpers(attempt))
        for worker in self.roster.workers.values():
            free = worker.lent_to is None and not self.roster.is_kept(worker) and self.roster.available(worker, now)
            if missing > 0 and worker.shape == shape and free:
                worker.lent_to, missing = attempt, missing - 1
        for _ in range(missing - self.roster.starting(shape)):
            if self.stillborn or not self._hired(shape):
                break

    def helpers(self, attempt: str) -> list[str]:
        """Names of the workers that are lent to an attempt."""
        return [worker.name for worker in self.roster.workers.values() if worker.lent_to == attempt]
