"""Requests, the stages that they wait for, and the order of those that can start. Pure: no Ray, no clock.

A driver requests stages. Each stage that the store lacks becomes a `PendingStage`, shared by all requests for it, and stays
one until it is published or has failed; while a worker runs it, there is a `RunningStage` for it, too. The `_PendingGraph`
knows which pending stages depend on which, and the order of those that can start. The `RequestTable` answers a request when all
its stages are in the store, or one has failed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ktray.artifact import Artifact, Stage, kind_of
from ktray.scheduler.messages import CANCELLED, Action, FailureKind, RequestResult
from ktray.scheduler.recent_set import REMEMBERED, RecentSet

Rank = tuple[float, ...]


@dataclass
class _Request:
    """Stages that one waiter requests; `waiter` is empty for a prefetch."""

    id: str
    waiter: str
    session: str
    priority: int
    since: float
    keys: tuple[str, ...]
    pending: set[str] = field(default_factory=set)
    states: dict[str, str] = field(default_factory=dict)
    found: dict[str, Artifact] = field(default_factory=dict)


@dataclass
class PendingStage:
    """A stage that is requested and not in the store; it may be running.

    Attributes:
        order: counts the stages as they become pending.
        owner: the request that counts as having caused the computation; empty while there are only prefetches.
        requests: ids of the requests for it.
        waiting_trials: how many of these are not prefetches.
        priorities: priority -> how many of the requests have it.
        seconds: how long it is expected to run.
        critical_path_seconds: how long it and the longest chain of pending stages that depend on it are expected to run.
    """

    stage: Stage
    order: int
    since: float
    owner: str = ""
    requests: set[str] = field(default_factory=set)
    waiting_trials: int = 0
    priorities: Counter[int] = field(default_factory=Counter)
    seconds: float = 0.0
    critical_path_seconds: float = 0.0


@dataclass
class RunningStage:
    """An attempt at a stage, on a worker.

    Stages of one family may run together, under one attempt: then there is one of these for each key.

    Attributes:
        last_progress: when its progress last changed, or it started.
        confirmed: whether a heartbeat of the worker has named it.
        progress_changes: how many times its progress has changed.
        leader: the key by which the worker knows the attempt.
    """

    key: str
    stage: Stage
    attempt: str
    worker: str
    since: float
    last_progress: float
    progress: Mapping[str, float] = field(default_factory=dict)
    confirmed: bool = False
    progress_changes: int = 0
    leader: str = ""


class _PendingGraph:
    """The pending stages with their dependencies; iterating over it gives those that are ready, best first.

    A stage is ready while it does not run and nothing that it depends on is pending. The order is kept up to date with every
    change, because thousands may be pending.

    Attributes:
        ready_counts: stage name -> how many stages of that name are ready.
    """

    def __init__(self) -> None:
        self.ready_counts: Counter[str] = Counter()
        self._order: list[tuple[Rank, str]] = []
        self._ranks: dict[str, Rank] = {}
        self._dependencies: dict[str, frozenset[str]] = {}
        self._open_dependencies: dict[str, int] = {}
        self._dependents: dict[str, set[str]] = {}
        self._running: set[str] = set()

    def __iter__(self) -> Iterator[str]:
        """The keys of the ready stages as they are now, whatever changes meanwhile."""
        return iter([key for _, key in self._order])

    def __contains__(self, key: str) -> bool:
        """Whether a stage is ready; one that is pending otherwise is not in here."""
        return key in self._ranks and key not in self._running and not self._open_dependencies[key]

    def startable_among(self, keys: Iterable[str]) -> list[str]:
        """Those of `keys` that are ready, best first."""
        return [key for _, key in sorted((self._ranks[key], key) for key in keys if key in self)]

    def pending_dependencies(self, key: str) -> set[str]:
        """The pending keys that a pending one depends on."""
        return {dependency for dependency in self._dependencies[key] if dependency in self._ranks}

    def pending_dependents(self, key: str) -> set[str]:
        """The pending keys that depend on this one, or would if it were pending."""
        return self._dependents.get(key, set()).copy()

    def add(self, key: str, dependencies: Iterable[str], rank: Rank) -> None:
        """Add a stage that becomes pending; it waits while any of `dependencies` is pending."""
        self._dependencies[key] = frozenset(dependencies)
        self._open_dependencies[key] = sum(dependency in self._ranks for dependency in self._dependencies[key])
        for dependency in self._dependencies[key]:
            self._dependents.setdefault(dependency, set()).add(key)
        for dependent in self._dependents.get(key, ()):
            self._remove_if_ready(dependent)
            self._open_dependencies[dependent] += 1
        self._ranks[key] = rank
        self._insert_if_ready(key)

    def remove(self, key: str) -> None:
        """Remove a stage that is no longer pending; what depended on it may start."""
        self._remove_if_ready(key)
        del self._ranks[key], self._open_dependencies[key]
        for dependency in self._dependencies.pop(key):
            self._dependents[dependency].discard(key)
            if not self._dependents[dependency]:
                del self._dependents[dependency]
        for dependent in self._dependents.get(key, ()):
            self._open_dependencies[dependent] -= 1
            self._insert_if_ready(dependent)

    def set_rank(self, key: str, rank: Rank) -> None:
        """Move a pending stage to the place that this rank gives it."""
        if rank != self._ranks[key]:
            self._remove_if_ready(key)
            self._ranks[key] = rank
            self._insert_if_ready(key)

    def mark_running(self, key: str) -> None:
        """Take a stage that runs now from those that are ready."""
        self._remove_if_ready(key)
        self._running.add(key)

    def mark_stopped(self, key: str) -> None:
        """Count a stage as not running any more; it is ready again if it is still pending."""
        self._running.discard(key)
        self._insert_if_ready(key)

    def _insert_if_ready(self, key: str) -> None:
        if key in self:
            insort(self._order, (self._ranks[key], key))
            self.ready_counts[kind_of(key)] += 1

    def _remove_if_ready(self, key: str) -> None:
        if key in self:
            del self._order[bisect_left(self._order, (self._ranks[key], key))]
            name = kind_of(key)
            self.ready_counts[name] -= 1
            if not self.ready_counts[name]:
                del self.ready_counts[name]


class RequestTable:
    """Requests and the stages that they wait for.

    Args:
        find: key -> artifact if it is in the store.
        running: keys of the stages that run now, kept by the core.
        outbox: results are appended to it.
        expected_seconds: how long a stage is expected to run; asked when it becomes pending.
        remembered: how many stages that nobody waits for any more are kept, in case their artifact turns out to be missing.

    Attributes:
        open: id -> request that has no result yet.
        pending: key -> stage.
        reused: stage name -> how often a request found a stage in the store, or joined a running computation.
        stages: key -> stage of all that is pending or was requested lately.
    """

    def __init__(
        self,
        find: Callable[[str], Artifact | None],
        running: Collection[str],
        outbox: list[Action],
        expected_seconds: Callable[[Stage], float] = lambda stage: 0.0,
        remembered: int = REMEMBERED,
    ) -> None:
        self.find, self.running, self.outbox, self.expected_seconds = find, running, outbox, expected_seconds
        self.pending: dict[str, PendingStage] = {}
        self.open: dict[str, _Request] = {}
        self.reused: Counter[str] = Counter()
        self.pending_graph = _PendingGraph()
        self._remembered = remembered
        self._prune_at = 2 * remembered
        self.stages: dict[str, Stage] = {}
        self._families: dict[str, set[str]] = {}
        self._in_store = RecentSet[str](remembered)
        self._prefetched = RecentSet[str](remembered)
        self._last_order = 0

    def add_request(
        self, request_id: str, waiter: str, session: str, stages: Sequence[Stage], priority: int, now: float
    ) -> None:
        """Add a request; one with the id of an open one, which Ray repeats after a crash of the broker, changes nothing."""
        if request_id in self.open:
            return
        self._remember_stages(stages)
        request = _Request(request_id, waiter, session, priority, now, tuple(stage.key for stage in stages))
        self.open[request_id] = request
        for stage in stages:
            self._make_request_wait(stage, request, now)
        self._answer_if_complete(request)

    def _remember_stages(self, stages: Iterable[Stage]) -> None:
        """Keep stages by key; those that nobody needs any more are dropped, oldest first."""
        for stage in stages:
            self.stages.pop(stage.key, None)  # so that it becomes the newest
            self.stages[stage.key] = stage
        if len(self.stages) > self._prune_at:
            needed = self.pending.keys() | {key for each in self.pending.values() for key in each.stage.inputs.values()}
            needed |= set(list(self.stages)[-self._remembered :])
            self.stages = {key: stage for key, stage in self.stages.items() if key in needed}
            self._prune_at = 2 * max(self._remembered, len(self.stages))

    def _make_request_wait(self, stage: Stage, request: _Request, now: float) -> None:
        """Have `request` wait for this stage, and for what it reads, unless the store has it."""
        pending = self.pending.get(stage.key)
        if pending is None:
            artifact = self.find(stage.key)
            if artifact is not None:
                self._record_found_artifact(artifact, request)
                return
            pending = self.find_or_add_pending(stage, now)
        request.pending.add(stage.key)
        self._attach_request(pending, request)
        if request.waiter and not pending.owner:
            pending.owner = request.id
        absent = [key for key in stage.inputs.values() if key not in self.pending and not self.is_in_store(key)]
        for key in absent:
            if key in self.stages:
                self._make_request_wait(self.stages[key], request, now)

    def _attach_request(self, pending: PendingStage, request: _Request) -> None:
        if request.id not in pending.requests:
            pending.requests.add(request.id)
            self._update_request_counts(pending, request, 1)

    def _detach_request(self, pending: PendingStage, request: _Request) -> None:
        if request.id in pending.requests:
            pending.requests.discard(request.id)
            self._update_request_counts(pending, request, -1)

    def _update_request_counts(self, pending: PendingStage, request: _Request, step: int) -> None:
        """Update the counts behind a stage's rank; kept as counts, because thousands of requests may share a stage."""
        pending.waiting_trials += step * bool(request.waiter)
        pending.priorities[request.priority] += step
        if not pending.priorities[request.priority]:
            del pending.priorities[request.priority]
        self.pending_graph.set_rank(pending.stage.key, self._rank_of(pending))

    def _record_found_artifact(self, artifact: Artifact, request: _Request) -> None:
        self._in_store.add(artifact.key)
        request.found[artifact.key] = artifact
        causes = request.waiter and artifact.key in self._prefetched
        request.states[artifact.key] = "computed" if causes else "reused"
        if causes:  # a prefetch computed it, so the first to ask counts as having caused it
            self._prefetched.discard(artifact.key)
        elif request.waiter:
            self.reused[kind_of(artifact.key)] += 1

    def find_or_add_pending(self, stage: Stage, now: float) -> PendingStage:
        """The pending stage of this key; a new one belongs to no request yet."""
        if stage.key not in self.pending:
            self._last_order += 1
            self._remember_stages([stage])
            self._in_store.discard(stage.key)
            pending = PendingStage(stage, self._last_order, now, seconds=self.expected_seconds(stage))
            self.pending[stage.key] = pending
            paths = (self.pending[key].critical_path_seconds for key in self.pending_graph.pending_dependents(stage.key))
            pending.critical_path_seconds = pending.seconds + max(paths, default=0.0)
            self.pending_graph.add(stage.key, (*stage.resume_from, *stage.inputs.values()), self._rank_of(pending))
            self._update_critical_paths(pending)
            if stage.family:
                self._families.setdefault(stage.family, set()).add(stage.key)
        return self.pending[stage.key]

    def _update_critical_paths(self, pending: PendingStage) -> None:
        """Update the paths of all that this stage depends on, directly or not."""
        lengthened = [pending]
        while lengthened:
            last = lengthened.pop()
            for key in self.pending_graph.pending_dependencies(last.stage.key):
                dependency = self.pending[key]
                if dependency.critical_path_seconds < dependency.seconds + last.critical_path_seconds:
                    dependency.critical_path_seconds = dependency.seconds + last.critical_path_seconds
                    self.pending_graph.set_rank(key, self._rank_of(dependency))
                    lengthened.append(dependency)

    def _remove_pending(self, key: str) -> PendingStage | None:
        pending = self.pending.pop(key, None)
        if pending is None:
            return None
        self.pending_graph.remove(key)
        family = pending.stage.family
        if family:
            self._families[family].discard(key)
            if not self._families[family]:
                del self._families[family]
        return pending

    def is_in_store(self, key: str) -> bool:
        """Whether the store has this key, or had it when it was last looked for."""
        if key not in self._in_store and self.find(key) is not None:
            self._in_store.add(key)
        return key in self._in_store

    def cancel_requests(self, session: str, waiter: str | None = None) -> None:
        """Cancel the requests of a session, or of one of its waiters; waiters of two sessions may have the same name.

        Stages that already run for them keep running.
        """
        for request in list(self.open.values()):
            if request.session == session and waiter in (None, request.waiter):
                self._drop_request(request)
                self.outbox.append(RequestResult(request.id, kind=CANCELLED, cause="the wait was cancelled"))

    def _drop_request(self, request: _Request) -> None:
        del self.open[request.id]
        for key in request.pending:
            pending = self.pending.get(key)
            if pending is None:
                continue
            self._detach_request(pending, request)
            if pending.owner == request.id:
                pending.owner = min((each for each in pending.requests if self.open[each].waiter), default="")
            if not pending.requests and key not in self.running:
                self._remove_pending(key)

    def _answer_if_complete(self, request: _Request) -> None:
        if request.pending or request.id not in self.open:
            return
        del self.open[request.id]
        outcomes = tuple(
            {
                "key": key,
                "state": request.states[key],
                "seconds": float(request.found[key].record.get("seconds", 0.0)),
                "metrics": dict(request.found[key].metrics),
            }
            for key in request.keys
        )
        self.outbox.append(RequestResult(request.id, outcomes))

    def mark_published(self, artifact: Artifact, computed: bool) -> None:
        """Count an artifact as published: answer requests that only waited for it; `computed` if this scheduler made it."""
        key, name = artifact.key, kind_of(artifact.key)
        self._in_store.add(key)
        pending = self._remove_pending(key)
        if pending is None:
            return
        if computed and not pending.owner:
            self._prefetched.add(key)
        for request in [self.open[each] for each in pending.requests]:
            request.pending.discard(key)
            request.found[key] = artifact
            state = "computed" if pending.owner == request.id else "joined"
            request.states[key] = state if computed else "reused"
            if request.waiter and request.states[key] != "computed":
                self.reused[name] += 1
            self._answer_if_complete(request)

    def fail_stage(self, key: str, kind: FailureKind, cause: str) -> None:
        """Fail a pending stage and all that reads it; each request for any of them ends once, with this cause."""
        dependents = sorted(self.pending_graph.pending_dependents(key))
        pending = self._remove_pending(key)
        for request_id in sorted(pending.requests) if pending else ():
            self._drop_request(self.open[request_id])
            self.outbox.append(RequestResult(request_id, failed=key, cause=cause, kind=kind))
        for dependent in dependents:
            reader = self.pending.get(dependent)
            if reader is not None and key in reader.stage.inputs.values() and dependent not in self.running:
                self.fail_stage(dependent, kind, f"it reads {key}, which failed: {cause}")

    def recompute_input(self, key: str, missing: str, now: float) -> bool:
        """Request an input that turned out to be missing, for those who wait for `key`; whether it will be there."""
        if missing not in self.stages:
            return False
        self._in_store.discard(missing)
        for request in [self.open[each] for each in self.pending[key].requests]:
            self._make_request_wait(self.stages[missing], request, now)
        return missing in self.pending or self.is_in_store(missing)

    def drop_if_unrequested(self, key: str) -> None:
        """Drop a stage that no longer runs, unless a request still waits for it."""
        if key in self.pending and not self.pending[key].requests:
            self._remove_pending(key)

    def ready_stages(self) -> Iterator[PendingStage]:
        """Pending stages that do not run and whose inputs are there, in the order in which they should start.

        Higher priority first, then more waiting trials, then the longer path of dependents, then the older.
        A training also waits while a shorter one that it would continue is pending.
        """
        return (self.pending[key] for key in self.pending_graph if key in self.pending)

    def startable_among(self, keys: Collection[str]) -> list[PendingStage]:
        """Those of `keys` that `ready_stages` would give, in its order."""
        return [self.pending[key] for key in self.pending_graph.startable_among(keys)]

    def other_ready_family_members(self, stage: Stage) -> list[Stage]:
        """The other ready stages of this stage's family, in the order of `ready_stages`."""
        return [pending.stage for pending in self.startable_among(self._families.get(stage.family, set()) - {stage.key})]

    def _rank_of(self, pending: PendingStage) -> tuple[float, float, float, int]:
        trials = pending.waiting_trials or len(pending.requests)  # or prefetches, which stand for trials to come
        return (-max(pending.priorities, default=0), -trials, -pending.critical_path_seconds, pending.order)
