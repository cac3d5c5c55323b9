"""A search on a virtual clock: real space, study, rungs, sharing and scheduling; only the stages are not computed."""

from __future__ import annotations

import heapq
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.cost_model.stage_costs import CostModel
from ktray.fingerprint import fingerprint
from ktray.runs.coordinator import TrialCoordinator, TrialSegment
from ktray.scheduler.core import SchedulerCore
from ktray.scheduler.messages import WORKER_DIED, AssignStage, RequestResult, StartWorker
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.worker_registry import Node, Worker, WorkerRegistry
from ktray.search.space import Space
from ktray.search.study import Study
from ktray.search.trial import Trial
from ktray.spec import DataSpec

Seconds = Callable[[Stage, int], float]
"""(stage, epochs that it trains beyond the snapshot it starts from; 0 if it trains none) -> seconds."""
Metrics = Callable[[Stage], Mapping[str, float]]
Dies = Callable[[str, int], float | None]
"""(key, attempts before this one) -> share of the stage's work after which its worker dies; None: it does not."""
FOREVER = float("inf")


@dataclass(frozen=True)
class SimulatedCluster:
    """The machines of a simulated search.

    Attributes:
        workers: each runs one stage at a time, as a GPU does.
        per_node: workers per machine.
        startup_seconds: until a new worker asks for work.
        overhead_seconds: of each stage, beyond its work.
        dies: which attempts end with the death of their worker.
        checkpoint_seconds: a training whose worker died resumes from the last multiple of this.
    """

    workers: int
    per_node: int = 8
    startup_seconds: float = 0.0
    overhead_seconds: float = 0.0
    dies: Dies = lambda key, attempts: None
    checkpoint_seconds: float = FOREVER

    def nodes(self) -> dict[str, Node]:
        """The machines; the last one may be smaller."""
        starts = range(0, self.workers, self.per_node)
        return {f"node-{start}": Node(cpus=min(self.per_node, self.workers - start)) for start in starts}


@dataclass
class Timeline:
    """What a simulated search did.

    Attributes:
        trials: as the study left them.
        makespan: virtual seconds from the first draw to the last result.
        busy: virtual seconds that workers computed, including work that was lost.
        lost: those of `busy` that were lost with a worker.
        unshared: what the trials would have cost if each had run alone.
        computed: (virtual time of publication, key), in order.
        decisions: ``draw``, ``dispatch`` or ``settle`` -> CPU seconds of this process that each took.
    """

    trials: list[Trial] = field(default_factory=list)
    makespan: float = 0.0
    busy: float = 0.0
    lost: float = 0.0
    unshared: float = 0.0
    computed: list[tuple[float, str]] = field(default_factory=list)
    decisions: dict[str, list[float]] = field(default_factory=lambda: {"draw": [], "dispatch": [], "settle": []})

    @contextmanager
    def deciding(self, what: str) -> Iterator[None]:
        """Record the CPU time of the block as one decision."""
        began = time.process_time()
        yield
        self.decisions[what].append(time.process_time() - began)


class VirtualClock:
    """A clock that the simulation sets; call it for the time in seconds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _VirtualStore:
    """Artifacts without files."""

    url = "virtual://"

    def __init__(self) -> None:
        self.found: dict[str, Artifact] = {}

    def find(self, key: str) -> Artifact | None:
        return self.found.get(key)

    def epoch_reached(self, stage: Stage) -> int:
        """Epoch of the latest snapshot that the stage can start from."""
        start = next((self.found[key] for key in stage.resume_from if key in self.found), None)
        return int(start.record["epoch"]) if start else 0

    def seconds_before(self, stage: Stage) -> float:
        start = next((self.found[key] for key in stage.resume_from if key in self.found), None)
        return float(start.record["seconds_alone"]) if start else 0.0


class _NoTracker:
    """A tracker that ignores every call."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


@dataclass(frozen=True)
class _Attempt:
    assignment: AssignStage
    worked: float
    dies: bool


class _Simulation:
    def __init__(
        self, space: Space, study: Study, clock: VirtualClock, seconds: Seconds, metrics: Metrics, cluster: SimulatedCluster
    ) -> None:
        self.clock, self.seconds, self.metrics, self.cluster = clock, seconds, metrics, cluster
        self.store = _VirtualStore()
        identity: Callable[[DataSpec], str] = lambda spec: fingerprint(spec.model_dump())  # noqa: E731
        tracker: Any = _NoTracker()
        store: Any = self.store
        self.coordinator = TrialCoordinator(space, study, store, identity, tracker, lambda event, trial, text: None)
        registry = WorkerRegistry(cluster.nodes(), stale_after=FOREVER)
        attempts = itertools.count()
        self.core = SchedulerCore(
            self._find, lambda name: ResourceRequest(), registry, lambda: f"a{next(attempts)}", FOREVER, self._expected_seconds
        )
        self.core.scaling.prestart(cluster.workers)
        self.costs = CostModel()  # of the scheduler; the coordinator learns from its own, as in a real search
        self.running: dict[str, TrialSegment] = {}
        self.events: list[tuple[float, int, _Attempt | Worker]] = []  # heap of (time, tie-break, what happens)
        self.tie_breaks = itertools.count()
        self.attempts: Counter[str] = Counter()
        self.checkpointed: dict[str, float] = {}
        self.timeline = Timeline()

    def _find(self, key: str) -> Artifact | None:
        artifact = self.store.find(key)
        if artifact is not None:
            self.costs.add(key, artifact.record)
        return artifact

    def _expected_seconds(self, stage: Stage) -> float:
        return self.costs.seconds(stage, self.core.requests.stages)

    def run(self) -> Timeline:
        self._draw()
        if self.running:
            self._prefetch()
        while True:
            self._draw()
            if self._dispatch():
                continue  # results may lead to promotions, and free a slot for a draw
            if not self.running:
                return self.timeline
            self._advance()

    def _draw(self) -> None:
        while True:
            with self.timeline.deciding("draw"):
                segment = self.coordinator.next()
                if isinstance(segment, str):
                    break
                name = f"{segment.trial.number}@{segment.epoch}"
                self.running[name] = segment
                self.core.requests.add_request(name, name, "simulation", segment.graph.stages, segment.priority, self.clock.now)
        self.timeline.decisions["draw"].pop()  # the last call drew nothing

    def _prefetch(self) -> None:
        """Request what planned draws will need, for workers that are idle."""
        self.core.requests.add_request("prefetch", "", "simulation", self.coordinator.planned_stages(), -1, self.clock.now)

    def _dispatch(self) -> bool:
        """Carry out the scheduler's actions; whether a segment ended."""
        with self.timeline.deciding("dispatch"):
            self.core.dispatch(self.clock.now)
        outbox = self.core.outbox[:]
        self.core.outbox.clear()
        for action in outbox:
            if isinstance(action, StartWorker):
                self._schedule(self.cluster.startup_seconds, action.worker)
            elif isinstance(action, AssignStage):
                self._begin(action)
        results = [action for action in outbox if isinstance(action, RequestResult) and action.request_id in self.running]
        for result in results:
            with self.timeline.deciding("settle"):
                self._settle(result)
        return bool(results)

    def _settle(self, result: RequestResult) -> None:
        segment = self.running.pop(result.request_id)
        if result.failed:
            self.coordinator.fail(segment, result.cause, result.failed)
        else:
            self.coordinator.settle(segment, [outcome["key"] for outcome in result.outcomes if outcome["state"] == "computed"])

    def _schedule(self, seconds: float, event: _Attempt | Worker) -> None:
        heapq.heappush(self.events, (self.clock.now + seconds, next(self.tie_breaks), event))

    def _begin(self, assignment: AssignStage) -> None:
        stage = assignment.stage
        remaining = self._work_of(assignment) - self.checkpointed.get(stage.key, 0.0)
        death = self.cluster.dies(stage.key, self.attempts[stage.key])
        self.attempts.update(computed.key for computed in _computed_together(assignment))
        worked = remaining * (1.0 if death is None else death)
        self._schedule(worked + self.cluster.overhead_seconds, _Attempt(assignment, worked, death is not None))

    def _work(self, stage: Stage) -> float:
        epochs = max(0, int(stage.spec.get("epoch", 0)) - self.store.epoch_reached(stage))
        return self.seconds(stage, epochs)

    def _work_of(self, assignment: AssignStage) -> float:
        """One pass for all stages that are computed together takes as long as for the longest of them."""
        return max(self._work(stage) for stage in _computed_together(assignment))

    def _advance(self) -> None:
        """Move the clock to the next event, and let it happen."""
        self.clock.now, _, event = heapq.heappop(self.events)
        if isinstance(event, Worker):
            event.last_heartbeat, event.polling = self.clock.now, True
            return
        self.timeline.busy += event.worked + self.cluster.overhead_seconds
        if event.dies:
            self._worker_died(event)
        else:
            self._publish(event.assignment)

    def _worker_died(self, attempt: _Attempt) -> None:
        key, every = attempt.assignment.stage.key, self.cluster.checkpoint_seconds
        done = self.checkpointed.get(key, 0.0) + attempt.worked
        if attempt.assignment.stage.name in ("teacher", "student") and every < FOREVER:
            self.checkpointed[key] = done - done % every
        self.timeline.lost += done - self.checkpointed.get(key, 0.0) + self.cluster.overhead_seconds
        for stage in _computed_together(attempt.assignment):
            self.core.running[stage.key].confirmed = True
        self.core.handle_lost_worker(attempt.assignment.worker, WORKER_DIED, "the simulation killed it", self.clock.now)

    def _publish(self, assignment: AssignStage) -> None:
        stages, seconds = _computed_together(assignment), self._work_of(assignment)
        self.timeline.makespan = self.clock.now
        self.core.registry.workers[assignment.worker].polling = True
        for stage in stages:
            metrics = self.metrics(stage)
            record = {
                **{"key": stage.key, "stage": stage.name, "spec": stage.spec, "inputs": stage.inputs, "metrics": metrics},
                "seconds": seconds / len(stages),
                "seconds_alone": seconds + self.store.seconds_before(stage),
                "epoch": stage.spec.get("epoch", 0),
            }
            self.store.found[stage.key] = Artifact(stage.key, Path("/nowhere"), metrics, record)
            self.timeline.computed.append((self.clock.now, stage.key))
            self.core.handle_succeeded_attempt(stage.key, assignment.attempt, True, seconds / len(stages), self.clock.now)


def _computed_together(assignment: AssignStage) -> tuple[Stage, ...]:
    return (assignment.stage, *assignment.stage.computed_with)


def simulate(
    space: Space, study: Study, clock: VirtualClock, seconds: Seconds, metrics: Metrics, cluster: int | SimulatedCluster
) -> Timeline:
    """Run a study to its target on virtual workers.

    Args:
        study: opened with `clock` as its clock.
        seconds: what a stage costs.
        metrics: of a stage; evaluations must assignment the metrics that the space names.
        cluster: or only its number of workers.

    Raises:
        SearchStopped: ten trials in a row failed, for example because a stage's workers died three times.
    """
    cluster = SimulatedCluster(cluster) if isinstance(cluster, int) else cluster
    timeline = _Simulation(space, study, clock, seconds, metrics, cluster).run()
    study.prune_and_close()
    timeline.trials = study.trials()
    timeline.unshared = sum(trial.cost.get("seconds", 0.0) for trial in timeline.trials)
    return timeline
