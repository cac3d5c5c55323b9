"""The same search on a virtual clock: real space, study, rungs, sharing and scheduling; only the stages are not computed."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.crew.books import Answer, Give, Hire
from ktray.crew.ledger import Ledger
from ktray.crew.needs import Needs
from ktray.crew.roster import Node, Roster
from ktray.drivers.conductor import Conductor, Segment
from ktray.fingerprint import fingerprint
from ktray.search.space import Space
from ktray.search.study import Study
from ktray.search.trial import Trial
from ktray.spec import Spec

Seconds = Callable[[Stage, int], float]
"""(stage, epochs that it trains beyond the snapshot it starts from; 0 if it trains none) -> seconds."""
Metrics = Callable[[Stage], Mapping[str, float]]
FOREVER = float("inf")


@dataclass
class Timeline:
    """What a simulated search did.

    Attributes:
        trials: as the study left them.
        makespan: virtual seconds from the first draw to the last result.
        busy: virtual seconds that workers computed.
        alone: what the settled trials would have cost, each run alone.
        computed: (virtual time of publication, key), in order.
    """

    trials: list[Trial] = field(default_factory=list)
    makespan: float = 0.0
    busy: float = 0.0
    alone: float = 0.0
    computed: list[tuple[float, str]] = field(default_factory=list)


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


class _Mute:
    """A tracker that tracks nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *arguments: None


class _Simulation:
    def __init__(
        self, space: Space, study: Study, clock: VirtualClock, seconds: Seconds, metrics: Metrics, workers: int
    ) -> None:
        self.clock, self.seconds, self.metrics = clock, seconds, metrics
        self.store = _VirtualStore()
        identity: Callable[[Spec], str] = lambda spec: fingerprint(spec.model_dump())  # noqa: E731
        mute: Any = _Mute()
        store: Any = self.store
        self.conductor = Conductor(space, study, store, identity, mute, lambda event, trial, text: None)
        roster = Roster({"virtual": Node(cpus=workers)}, stale=FOREVER)
        attempts = itertools.count()
        self.ledger = Ledger(self.store.find, lambda name: Needs(), roster, lambda: f"a{next(attempts)}", FOREVER, self._length)
        self.ledger.hiring.warm(workers)
        self.live: dict[str, Segment] = {}
        self.ends: list[tuple[float, int, Give, float]] = []
        self.order = itertools.count()
        self.timeline = Timeline()

    def _length(self, stage: Stage) -> float:
        return self.seconds(stage, int(stage.spec.get("epoch", 0)))

    def run(self) -> Timeline:
        while True:
            self._draw()
            if self._act():
                continue  # answers may make promotions due, and free a place for a draw
            if not self.ends:
                return self.timeline
            self._pass()

    def _draw(self) -> None:
        while not isinstance(segment := self.conductor.next(), str):
            name = f"{segment.trial.number}@{segment.epoch}"
            self.live[name] = segment
            self.ledger.demand.request(name, name, "simulation", segment.graph.stages, 0, self.clock.now)

    def _act(self) -> bool:
        """Do what the ledger wants; whether a segment ended."""
        self.ledger.dispatch(self.clock.now)
        answered = False
        while self.ledger.outbox:
            action = self.ledger.outbox.pop(0)
            if isinstance(action, Hire):
                action.worker.beat, action.worker.polling = self.clock.now, True
                self.ledger.dispatch(self.clock.now)
            elif isinstance(action, Give):
                self._begin(action)
            elif isinstance(action, Answer):
                answered = True
                computed = [outcome["key"] for outcome in action.outcomes if outcome["state"] == "computed"]
                self.conductor.settle(self.live.pop(action.request), computed)
        return answered

    def _begin(self, give: Give) -> None:
        epochs = max(0, int(give.stage.spec.get("epoch", 0)) - self.store.epoch_reached(give.stage))
        family = (give.stage, *give.stage.beside)  # one pass for all of them takes as long as for the dearest
        seconds = max(self.seconds(stage, epochs) for stage in family)
        heapq.heappush(self.ends, (self.clock.now + seconds, next(self.order), give, seconds))

    def _pass(self) -> None:
        self.clock.now, _, give, seconds = heapq.heappop(self.ends)
        family = (give.stage, *give.stage.beside)
        self.timeline.busy += seconds
        self.timeline.makespan = self.clock.now
        self.ledger.roster.workers[give.worker].polling = True
        for stage in family:
            record = {
                "seconds": seconds / len(family),
                "seconds_alone": seconds + self.store.seconds_before(stage),
                "epoch": stage.spec.get("epoch", 0),
            }
            self.store.found[stage.key] = Artifact(stage.key, Path("/nowhere"), self.metrics(stage), record)
            self.timeline.computed.append((self.clock.now, stage.key))
            self.ledger.published(stage.key, give.attempt, True, seconds / len(family), self.clock.now)


def simulate(space: Space, study: Study, clock: VirtualClock, seconds: Seconds, metrics: Metrics, workers: int) -> Timeline:
    """Run a study to its target on `workers` virtual workers.

    Args:
        study: opened with `clock` as its clock.
        seconds: what a stage costs.
        metrics: what a stage measures; an evaluation must give the metrics that the space judges by.
    """
    timeline = _Simulation(space, study, clock, seconds, metrics, workers).run()
    study.close()
    timeline.trials = study.trials()
    timeline.alone = sum(trial.cost.get("seconds", 0.0) for trial in timeline.trials)
    return timeline
