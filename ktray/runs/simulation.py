"""The same search on a virtual clock: real space, study, rungs, sharing and scheduling; only the stages are not computed."""

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
from ktray.fingerprint import fingerprint
from ktray.runs.coordinator import TrialCoordinator, TrialSegment
from ktray.scheduler.core import SchedulerCore
from ktray.scheduler.failure_kinds import WORKER_DIED
from ktray.scheduler.messages import AssignStage, RequestResult, StartWorker
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.workers import Node, Worker, WorkerRegistry
from ktray.search.space import Space
from ktray.search.study import Study
from ktray.search.trial import Trial
from ktray.strict import StrictSpec

Seconds = Callable[[Stage, int], float]
"""(stage, epochs that it trains beyond the snapshot it starts from; 0 if it trains none) -> seconds."""
Metrics = Callable[[Stage], Mapping[str, float]]
Dies = Callable[[str, int], float | None]
"""(key, attempts before this one) -> share of the stage's work after which its worker dies; None: it comes to its end."""
FOREVER = float("inf")


@dataclass(frozen=True)
class SimulatedCluster:
    """Where a simulated search runs.

    Attributes:
        workers: each runs one stage at a time, such as one GPU.
        per_node: workers of one machine.
        hire_seconds: until a new process asks for work.
        overhead_seconds: what a stage costs beyond its work.
        dies: which attempts end with the death of their worker.
        checkpoint_seconds: a training that died goes on from a multiple of this.
    """

    workers: int
    per_node: int = 8
    hire_seconds: float = 0.0
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
        busy: virtual seconds that workers computed, in vain or not.
        lost: those of `busy` that died with their worker.
        alone: what the settled trials would have cost, each run alone.
        computed: (virtual time of publication, key), in order.
        decisions: ``draw``, ``dispatch`` or ``settle`` -> CPU seconds of this process that each took.
    """

    trials: list[Trial] = field(default_factory=list)
    makespan: float = 0.0
    busy: float = 0.0
    lost: float = 0.0
    alone: float = 0.0
    computed: list[tuple[float, str]] = field(default_factory=list)
    decisions: dict[str, list[float]] = field(default_factory=lambda: {"draw": [], "dispatch": [], "settle": []})

    @contextmanager
    def deciding(self, what: str) -> Iterator[None]:
        """Count the CPU time of the block as a decision."""
        began = time.process_time()
        yield
        self.decisions[what].append(time.process_time() - began)


class VirtualClock:
    """Seconds that pass only when the simulation says so; call it for the time."""

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
        start = next((self.found[key] for key in stage.starts if key in self.found), None)
        return int(start.record["epoch"]) if start else 0

    def seconds_before(self, stage: Stage) -> float:
        start = next((self.found[key] for key in stage.starts if key in self.found), None)
        return float(start.record["seconds_alone"]) if start else 0.0


class _NoTracker:
    """A tracker that tracks nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


@dataclass(frozen=True)
class _Attempt:
    give: AssignStage
    worked: float
    dies: bool


class _Simulation:
    def __init__(
        self, space: Space, study: Study, clock: VirtualClock, seconds: Seconds, metrics: Metrics, site: SimulatedCluster
    ) -> None:
        self.clock, self.seconds, self.metrics, self.site = clock, seconds, metrics, site
        self.store = _VirtualStore()
        identity: Callable[[StrictSpec], str] = lambda spec: fingerprint(spec.model_dump())  # noqa: E731
        mute: Any = _NoTracker()
        store: Any = self.store
        self.coordinator = TrialCoordinator(space, study, store, identity, mute, lambda event, trial, text: None)
        registry = WorkerRegistry(site.nodes(), stale_after=FOREVER)
        attempts = itertools.count()
        self.core = SchedulerCore(
            self.store.find, lambda name: ResourceRequest(), registry, lambda: f"a{next(attempts)}", FOREVER, self._length
        )
        self.core.scaling.prestart(site.workers)
        self.live: dict[str, TrialSegment] = {}
        self.ahead: list[tuple[float, int, _Attempt | Worker]] = []
        self.order = itertools.count()
        self.attempts: Counter[str] = Counter()
        self.kept: dict[str, float] = {}
        self.timeline = Timeline()

    def _length(self, stage: Stage) -> float:
        return self.seconds(stage, int(stage.spec.get("epoch", 0)))

    def run(self) -> Timeline:
        self._draw()
        if self.live:
            self._prefetch()
        while True:
            self._draw()
            if self._act():
                continue  # answers may make promotions due, and free a place for a draw
            if not self.live:
                return self.timeline
            self._pass()

    def _draw(self) -> None:
        while True:
            with self.timeline.deciding("draw"):
                leg = self.coordinator.next()
                if isinstance(leg, str):
                    break
                name = f"{leg.trial.number}@{leg.epoch}"
                self.live[name] = leg
                self.core.requests.add_request(name, name, "simulation", leg.graph.stages, leg.priority, self.clock.now)
        self.timeline.decisions["draw"].pop()  # there was nothing to draw

    def _prefetch(self) -> None:
        """What planned draws will need, for workers that have nothing else to do."""
        self.core.requests.add_request("prefetch", "", "simulation", self.coordinator.certain(), -1, self.clock.now)

    def _act(self) -> bool:
        """Do what the core wants; whether a leg ended."""
        with self.timeline.deciding("dispatch"):
            self.core.dispatch(self.clock.now)
        outbox = self.core.outbox[:]
        self.core.outbox.clear()
        for action in outbox:
            if isinstance(action, StartWorker):
                self._at(self.site.hire_seconds, action.worker)
            elif isinstance(action, AssignStage):
                self._begin(action)
        answers = [action for action in outbox if isinstance(action, RequestResult) and action.request in self.live]
        for answer in answers:
            with self.timeline.deciding("settle"):
                self._settle(answer)
        return bool(answers)

    def _settle(self, answer: RequestResult) -> None:
        leg = self.live.pop(answer.request)
        if answer.failed:
            self.coordinator.fail(leg, answer.cause, answer.failed)
        else:
            self.coordinator.settle(leg, [each["key"] for each in answer.outcomes if each["state"] == "computed"])

    def _at(self, seconds: float, what: _Attempt | Worker) -> None:
        heapq.heappush(self.ahead, (self.clock.now + seconds, next(self.order), what))

    def _begin(self, give: AssignStage) -> None:
        stage = give.stage
        rest = self._work_of(give) - self.kept.get(stage.key, 0.0)
        share = self.site.dies(stage.key, self.attempts[stage.key])
        self.attempts.update(each.key for each in _family(give))
        worked = rest * (1.0 if share is None else share)
        self._at(worked + self.site.overhead_seconds, _Attempt(give, worked, share is not None))

    def _work(self, stage: Stage) -> float:
        epochs = max(0, int(stage.spec.get("epoch", 0)) - self.store.epoch_reached(stage))
        return self.seconds(stage, epochs)

    def _work_of(self, give: AssignStage) -> float:
        """One pass for a whole family takes as long as for the dearest of it."""
        return max(self._work(stage) for stage in _family(give))

    def _pass(self) -> None:
        """To the next thing that happens."""
        self.clock.now, _, event = heapq.heappop(self.ahead)
        if isinstance(event, Worker):
            event.last_heartbeat, event.polling = self.clock.now, True
            return
        self.timeline.busy += event.worked + self.site.overhead_seconds
        if event.dies:
            self._bury(event)
        else:
            self._publish(event.give)

    def _bury(self, attempt: _Attempt) -> None:
        key, every = attempt.give.stage.key, self.site.checkpoint_seconds
        done = self.kept.get(key, 0.0) + attempt.worked
        if attempt.give.stage.name in ("teacher", "student") and every < FOREVER:
            self.kept[key] = done - done % every
        self.timeline.lost += done - self.kept.get(key, 0.0) + self.site.overhead_seconds
        for each in _family(attempt.give):
            self.core.running[each.key].confirmed = True
        self.core.worker_lost(attempt.give.worker, WORKER_DIED, "the simulation killed it", self.clock.now)

    def _publish(self, give: AssignStage) -> None:
        family, seconds = _family(give), self._work_of(give)
        self.timeline.makespan = self.clock.now
        self.core.registry.workers[give.worker].polling = True
        for stage in family:
            record = {
                "seconds": seconds / len(family),
                "seconds_alone": seconds + self.store.seconds_before(stage),
                "epoch": stage.spec.get("epoch", 0),
            }
            self.store.found[stage.key] = Artifact(stage.key, Path("/nowhere"), self.metrics(stage), record)
            self.timeline.computed.append((self.clock.now, stage.key))
            self.core.attempt_succeeded(stage.key, give.attempt, True, seconds / len(family), self.clock.now)


def _family(give: AssignStage) -> tuple[Stage, ...]:
    return (give.stage, *give.stage.beside)


def simulate(
    space: Space, study: Study, clock: VirtualClock, seconds: Seconds, metrics: Metrics, site: int | SimulatedCluster
) -> Timeline:
    """Run a study to its target on virtual workers.

    Args:
        study: opened with `clock` as its clock.
        seconds: what a stage costs.
        metrics: what a stage measures; an evaluation must give the metrics that the space judges by.
        site: or only its number of workers.

    Raises:
        StoppedEarly: ten trials in a row failed, as by a stage whose workers died three times.
    """
    site = SimulatedCluster(site) if isinstance(site, int) else site
    timeline = _Simulation(space, study, clock, seconds, metrics, site).run()
    study.close()
    timeline.trials = study.trials()
    timeline.alone = sum(trial.cost.get("seconds", 0.0) for trial in timeline.trials)
    return timeline
