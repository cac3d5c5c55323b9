"""Liveness: which processes have been silent for too long, which workers do not start, what a restart waits for. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ktray.scheduler.messages import FENCED, Action, FenceOrphans, KillWorker, SchedulerEvent
from ktray.scheduler.worker_registry import Worker, WorkerRegistry, WorkerShape

START_TIMEOUT = 120.0  # seconds that a worker may take to start; after that it counts as frozen and is replaced


@dataclass(frozen=True)
class ProcessId:
    """One process of the operating system; `created` (seconds since 1970) tells it from a later one with the same id."""

    node: str
    pid: int
    created: float


class ProcessLiveness:
    """When each process of a trial was last heard from.

    A process that has ended is treated like a frozen one: killing it again does nothing.

    Args:
        dead_after: seconds of silence.
    """

    def __init__(self, dead_after: float) -> None:
        self._dead_after = dead_after
        self._last_heartbeats: dict[ProcessId, float] = {}

    def heartbeat(self, process: ProcessId, now: float) -> None:
        """This process is alive."""
        self._last_heartbeats[process] = now

    def restore(self, processes: Iterable[ProcessId], now: float) -> None:
        """After a restart: these were alive when the broker before this one last heard from them."""
        for process in processes:
            self._last_heartbeats.setdefault(process, now)

    def alive(self) -> list[ProcessId]:
        """All processes that count as alive."""
        return list(self._last_heartbeats)

    def remove_silent(self, now: float) -> list[ProcessId]:
        """The processes that have been silent for too long; each is returned once."""
        silent = [process for process, last in self._last_heartbeats.items() if now - last > self._dead_after]
        for process in silent:
            del self._last_heartbeats[process]
        return silent

    def compensate_pause(self, seconds: float) -> None:
        """The broker itself was paused for this long, so silence during that time proves nothing."""
        self._last_heartbeats = {process: last + seconds for process, last in self._last_heartbeats.items()}


class StartupMonitor:
    """Workers that have sent no heartbeat yet: new ones and, after a restart of the broker, those from before.

    Args:
        registry: the workers that are known.
        outbox: actions are appended to it.
        dead_after: seconds of silence after which a worker from before a restart counts as dead.
    """

    def __init__(self, registry: WorkerRegistry, outbox: list[Action], dead_after: float) -> None:
        self.registry, self.outbox, self.dead_after = registry, outbox, dead_after
        self._awaited_since: dict[str, float] = {}
        self._survivors: set[str] = set()
        self._fenced: set[str] = set()
        self._restarted = 0.0
        self._waits = False

    def restart(self, names: Iterable[str], now: float) -> None:
        """The broker restarted, and these workers may be alive: no stage starts until all report, or `dead_after` is over."""
        self._survivors, self._restarted = set(names), now
        self._waits = bool(self._survivors)
        self.registry.skip_names(self._survivors)

    def note_heartbeat(self, name: str) -> None:
        """A worker has sent a heartbeat."""
        self._survivors.discard(name)

    def forget(self, name: str) -> None:
        """A worker is gone."""
        for names in (self._survivors, self._fenced):
            names.discard(name)
        self._awaited_since.pop(name, None)

    def was_fenced(self, name: str) -> bool:
        """Whether a worker from before the restart reported only after its attempt was fenced."""
        return name in self._fenced

    def is_late(self, worker: Worker, now: float) -> bool:
        """Whether a new worker has sent no heartbeat within `START_TIMEOUT`."""
        return now - self._awaited_since.setdefault(worker.name, now) > START_TIMEOUT

    def must_wait(self, now: float) -> bool:
        """Whether stages that seem to be waiting may still be running on workers from before a restart.

        Once these have been silent for `dead_after`, every attempt without a running stage is fenced: the broker does not know
        what they ran, and only their scratch directories tell.
        """
        if not self._waits:
            return False
        if self._survivors and now < self._restarted + self.dead_after:
            return True
        self._waits = False
        if self._survivors:
            self._fenced = set(self._survivors)
            self.outbox.append(FenceOrphans())
        return False

    def kill_missing(self, now: float) -> None:
        """Kill workers from before a restart that stay silent for `START_TIMEOUT`; until then they may have been starting."""
        if now - self._restarted <= START_TIMEOUT:
            return
        for name in sorted(self._survivors):
            self.outbox.append(KillWorker(Worker(name, WorkerShape(), "")))
            cause = f"no heartbeat for {START_TIMEOUT:g} s after a restart"
            self.outbox.append(SchedulerEvent(FENCED, worker=name, cause=cause))
        self._survivors.clear()

    def compensate_pause(self, seconds: float) -> None:
        """The broker itself was paused for this long, so silence during that time proves nothing."""
        self._awaited_since = {name: since + seconds for name, since in self._awaited_since.items()}
        self._restarted += seconds
