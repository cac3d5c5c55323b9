"""Workers that have yet to be heard of: hired ones, and after a restart of the broker those of before. Pure, of the core."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ktray.scheduler.messages import FenceOrphans, KillWorker, SchedulerEvent
from ktray.scheduler.worker_registry import Worker, WorkerRegistry, WorkerShape

LATE = 120.0  # seconds that a worker may take to start: then it is frozen, and another one is hired in its place


class StartupMonitor:
    """Who is waited for, and how long.

    Args:
        registry: the workers that are known.
        outbox: where actions are left.
        dead_after: seconds after which a worker that worked before a restart is taken for dead.
    """

    def __init__(self, registry: WorkerRegistry, outbox: list[Any], dead_after: float) -> None:
        self.registry, self.outbox, self.dead_after = registry, outbox, dead_after
        self._hired: dict[str, float] = {}
        self._survivors: set[str] = set()
        self._cut_off: set[str] = set()
        self._restarted = 0.0
        self._fencing = False

    def restart(self, names: Iterable[str], now: float) -> None:
        """The broker is new, these workers are not: nothing may start until each was heard of, or was silent for too long."""
        self._survivors, self._restarted = set(names), now
        self._fencing = bool(self._survivors)
        self.registry.skip(self._survivors)

    def came(self, name: str) -> None:
        """A worker was heard of."""
        self._survivors.discard(name)

    def gone(self, name: str) -> None:
        """A worker is no more."""
        for names in (self._survivors, self._cut_off):
            names.discard(name)
        self._hired.pop(name, None)

    def is_cut_off(self, name: str) -> bool:
        """Whether a worker came only after what it had been writing was fenced."""
        return name in self._cut_off

    def is_late(self, worker: Worker, now: float) -> bool:
        """Whether a hired worker that nobody has heard of should have come by now."""
        return now - self._hired.setdefault(worker.name, now) > LATE

    def must_wait(self, now: float) -> bool:
        """Whether a stage that seems to wait may be running on a worker of before a restart.

        When they have been silent for `dead_after`, all that no run owns is fenced: only its directories tell what they wrote.
        """
        if not self._fencing:
            return False
        if self._survivors and now < self._restarted + self.dead_after:
            return True
        self._fencing = False
        if self._survivors:
            self._cut_off = set(self._survivors)
            self.outbox.append(FenceOrphans())
        return False

    def silent(self, now: float) -> None:
        """End the workers of before a restart that have not come after `LATE`; until then they may be starting."""
        if now - self._restarted <= LATE:
            return
        for name in sorted(self._survivors):
            self.outbox.append(KillWorker(Worker(name, WorkerShape(), "")))
            self.outbox.append(SchedulerEvent("fenced", worker=name, cause=f"no heartbeat for {LATE:g} s after a restart"))
        self._survivors.clear()

    def forgive(self, seconds: float) -> None:
        """The broker itself slept: silence in that time proves nothing."""
        self._hired = {name: since + seconds for name, since in self._hired.items()}
        self._restarted += seconds
