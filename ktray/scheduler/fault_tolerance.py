"""Fault tolerance: which processes and workers are dead, how often a stage is tried again, which stages run exclusively. Pure.

- Liveness: which processes have been silent for too long, which workers do not start, what a restart waits for.
- Retries: how often a stage may lose its worker or an input, and which stages run exclusively after memory ran out.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from ktray.artifact import Stage
from ktray.scheduler.messages import (
    FENCED,
    OUT_OF_MEMORY,
    Action,
    FailureKind,
    FenceOrphanedAttempts,
    KillWorker,
    LossKind,
    SchedulerEvent,
)
from ktray.scheduler.placement import DispatchCapacity
from ktray.scheduler.recent_set import REMEMBERED, RecentSet
from ktray.scheduler.requests import RunningStage
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.worker_registry import Worker, WorkerRegistry, WorkerShape, worker_shape_for

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

    def record_heartbeat(self, process: ProcessId, now: float) -> None:
        """Note that this process is alive now."""
        self._last_heartbeats[process] = now

    def restore(self, processes: Iterable[ProcessId], now: float) -> None:
        """Count as alive, after a restart, those that the broker before this one has heard from."""
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
        """Leave out of all silences a time in which the broker itself was paused: it proves nothing."""
        self._last_heartbeats = {process: last + seconds for process, last in self._last_heartbeats.items()}


class FirstHeartbeatMonitor:
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

    def note_broker_restart(self, names: Iterable[str], now: float) -> None:
        """Await these workers, which may have outlived a broker: no stage starts until all report, or `dead_after` is over."""
        self._survivors, self._restarted = set(names), now
        self._waits = bool(self._survivors)
        self.registry.exclude_names(self._survivors)

    def note_heartbeat(self, name: str) -> None:
        """Note that a worker has sent a heartbeat: it is awaited no more."""
        self._survivors.discard(name)

    def forget(self, name: str) -> None:
        """Drop what is known of a worker that is gone."""
        for names in (self._survivors, self._fenced):
            names.discard(name)
        self._awaited_since.pop(name, None)

    def was_fenced(self, name: str) -> bool:
        """Whether a worker from before the restart reported only after its attempt was fenced."""
        return name in self._fenced

    def is_late(self, worker: Worker, now: float) -> bool:
        """Whether a new worker has sent no heartbeat within `START_TIMEOUT`, counted from the first call for it."""
        return now - self._awaited_since.setdefault(worker.name, now) > START_TIMEOUT

    def must_delay_dispatch(self, now: float) -> bool:
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
            self.outbox.append(FenceOrphanedAttempts())
        return False

    def kill_silent_survivors(self, now: float) -> None:
        """Kill workers from before a restart that stay silent for `START_TIMEOUT`; until then they may have been starting."""
        if now - self._restarted <= START_TIMEOUT:
            return
        for name in sorted(self._survivors):
            self.outbox.append(KillWorker(Worker(name, WorkerShape(), "")))
            cause = f"no heartbeat for {START_TIMEOUT:g} s after a restart"
            self.outbox.append(SchedulerEvent(FENCED, worker=name, cause=cause))
        self._survivors.clear()

    def compensate_pause(self, seconds: float) -> None:
        """Leave out of all silences a time in which the broker itself was paused: it proves nothing."""
        self._awaited_since = {name: since + seconds for name, since in self._awaited_since.items()}
        self._restarted += seconds


MAX_LOSSES = 3  # of workers, or of one input, until a stage fails


@dataclass
class _FailureHistory:
    worker_losses: int = 0
    missing_inputs: Counter[str] = field(default_factory=Counter)
    furthest_epoch: float = 0.0


class FailureCounts:
    """What went wrong with each stage since it was last published or failed, counted; only recent troubles are kept."""

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._histories: OrderedDict[str, _FailureHistory] = OrderedDict()

    def count_worker_loss(self, run: RunningStage, blamed: bool) -> bool:
        """Count the loss of a worker for its stage; returns whether the stage may start again.

        Args:
            blamed: whether the stage may have been the cause.
        """
        history = self._find_or_create_history(run.key)
        epoch = run.progress.get("epoch", 0)
        if epoch > history.furthest_epoch:
            history.furthest_epoch = epoch
            history.worker_losses = 0  # a stage that gets further each time does not kill its workers
        history.worker_losses += blamed
        return history.worker_losses < MAX_LOSSES

    def count_missing_input(self, key: str, missing: str) -> bool:
        """Count that an input of a stage was not in the store, or damaged; returns whether the stage may start again."""
        history = self._find_or_create_history(key)
        history.missing_inputs[missing] += 1
        return history.missing_inputs[missing] < MAX_LOSSES

    def forget(self, key: str) -> None:
        """Drop the counts of a stage that is published or has failed."""
        self._histories.pop(key, None)

    def __len__(self) -> int:
        return len(self._histories)

    def _find_or_create_history(self, key: str) -> _FailureHistory:
        history = self._histories.setdefault(key, _FailureHistory())
        self._histories.move_to_end(key)
        if len(self._histories) > self._remembered:
            self._histories.popitem(last=False)
        return history


class ExclusivityPolicy:
    """Which stages must have their GPU or node to themselves, because memory ran out before, and what each stage gets.

    A stage that raised out-of-memory gets the whole GPU, or without a GPU the whole node, and takes small batches. A stage
    whose worker was killed for the memory of its node may not be to blame, and small batches change what batch norm sees: it
    gets the node to itself and its usual batches.
    """

    def __init__(self, registry: WorkerRegistry, remembered: int = REMEMBERED) -> None:
        self.registry = registry
        self._raised_out_of_memory = RecentSet[str](remembered)
        self._killed_for_memory = RecentSet[str](remembered)

    def note_failure(self, key: str, kind: FailureKind) -> bool:
        """Record a failure of a stage; returns whether it is to run once more, exclusively."""
        if kind != OUT_OF_MEMORY or key in self._raised_out_of_memory:
            return False
        self._raised_out_of_memory.add(key)
        return True

    def note_worker_loss(self, key: str, kind: LossKind) -> None:
        """Record that the stage lost its worker."""
        if kind == OUT_OF_MEMORY:
            self._killed_for_memory.add(key)

    def forget(self, key: str) -> None:
        """Drop what is known of a stage that is published or has failed: it starts with others again."""
        self._raised_out_of_memory.discard(key)
        self._killed_for_memory.discard(key)

    def __contains__(self, key: str) -> bool:
        return key in self._raised_out_of_memory or key in self._killed_for_memory

    def keys(self) -> set[str]:
        """The stages that must run exclusively."""
        return {*self._raised_out_of_memory, *self._killed_for_memory}

    def must_use_small_batches(self, key: str) -> bool:
        """Whether the stage must send fewer images at a time through its network."""
        return key in self._raised_out_of_memory

    def resources_for(self, key: str, usual: ResourceRequest) -> ResourceRequest:
        """What a stage requests now, given its usual request."""
        if key not in self:
            return usual
        gpus = usual.gpus or 0.0
        return usual.model_copy(
            update={"gpus": float(math.ceil(gpus)) if key in self._raised_out_of_memory else gpus, "helpers": 0}
        )

    def reserve_nodes(self, runs: Iterable[tuple[RunningStage, ResourceRequest]]) -> None:
        """Reserve for this dispatch exactly the nodes that these running stages have to themselves."""
        self.registry.reserved.clear()
        for run, request in runs:
            if self._needs_whole_node(run.key, request) and run.worker in self.registry.workers:
                self.registry.reserve(self.registry.workers[run.worker].node)

    def take_worker(
        self, stage: Stage, request: ResourceRequest, capacity: DispatchCapacity, idle_since: float = float("inf")
    ) -> Worker | None:
        """A worker that can run the stage now, no longer idle in `capacity`; None if there is none. Called for every stage.

        For a stage that needs its whole node this is a worker on a node where nothing else runs, which is then reserved.

        Args:
            idle_since: only workers that had no stage after this moment.
        """
        if not self._needs_whole_node(stage.key, request):
            known = {*stage.inputs.values(), *stage.resume_from}
            return capacity.take_available_worker(request, keys=known, idle_since=idle_since)
        shape = worker_shape_for(request)
        if any(worker.shape == shape for worker in self.registry.workers.values()):
            return capacity.take_worker_on_idle_node(request)
        return capacity.take_available_worker(request)  # without a worker of its shape there is no node to reserve yet

    def _needs_whole_node(self, key: str, request: ResourceRequest) -> bool:
        """Whether the stage has its node to itself; one that ran out of a GPU's memory needs no more than the whole GPU."""
        return key in self._killed_for_memory or (key in self._raised_out_of_memory and not request.gpus)
