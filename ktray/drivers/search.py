"""One search from beginning to end: settle what the store knows, start Ray for the rest, add the reference lines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ktray.drivers import references
from ktray.drivers.conductor import Conductor, Tell
from ktray.errors import StageFailed, StoppedEarly
from ktray.pipeline.check import data_loader
from ktray.pipeline.graph import Graph
from ktray.pipeline.identity import data_identity
from ktray.search.space import Space
from ktray.search.study import Study
from ktray.spec import PairSpec
from ktray.stores import Store
from ktray.tracking import Tracker

Show = Callable[[list[dict[str, Any]], Mapping[str, Any]], None]


@dataclass(frozen=True)
class Place:
    """Where a search runs and what it may use; none of it changes a result.

    Attributes:
        home: studies, logs, caches.
        store: where artifacts live.
        address: a Ray cluster that is already there; None starts one on this machine.
        runtime: file with resources per stage kind, or None.
    """

    home: Path
    store: Store
    address: str | None
    runtime: Path | None


@dataclass
class Outcome:
    """What one call of `search` did.

    Attributes:
        reason: why it ended, in a few words.
        stopped: set if it ended before its target.
        demanded: keys of all stages that its trials needed.
        published: those of them that were computed during this call.
    """

    study: str
    reason: str = ""
    stopped: StoppedEarly | None = None
    interrupted: bool = False
    demanded: set[str] = field(default_factory=set)
    published: set[str] = field(default_factory=set)
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


class _Crew:
    """Ray and its crew, started when first needed: a search whose store has everything never waits for them."""

    def __init__(self, place: Place, tracker: Tracker, show: Show, say: Callable[[str], None]) -> None:
        self.place, self.tracker, self.show, self.say = place, tracker, show, say
        self._session: Any = None
        self._watch: Any = None
        self.published: set[str] = set()

    def start(self) -> Any:
        from ktray.crew import client, runtime
        from ktray.drivers.preflight import preflight
        from ktray.drivers.watch import Watch
        from ktray.pipeline.execute import execute

        if self._session is None:
            self._session = runtime.start(self.place.home, self.place.address, runtime.load_runtime(self.place.runtime))
            self.say(f"Ray's own messages go to {self._session.log}")
            for warning in self._session.warnings:
                self.say(warning)
            preflight(self.place.store)
            self._crew = client.connect(self._session, self.place.store.url, execute)
            self._watch = Watch(self._crew, self.place.store, self.tracker, self.show)
        return self._crew

    def stop(self) -> None:
        from ktray.crew import runtime

        if self._watch is not None:
            self._watch.close()
            self.published = self._watch.published
        if self._session is not None:
            runtime.stop(self._session)


def search(
    space: Space,
    place: Place,
    tracker: Tracker,
    stopping: threading.Event,
    *,
    name: str,
    trials: str | None,
    tell: Tell,
    show: Show,
    say: Callable[[str], None],
) -> Outcome:
    """Run the study `name` to its target, or go on with it.

    Args:
        stopping: set it, from any thread, to end within seconds; the same call goes on later.
        trials: the target, absolute or ``+N``; None for the space's budget.
        tell, show, say: what people read: trials, the crew's work, and plain sentences.

    Raises:
        UserError: another driver has this study or home, or the study was begun with another space.
        PreflightFailed: Ray does not start.
    """
    began = time.monotonic()
    outcome = Outcome(name)
    with Study.open(place.home, space, name, trials=trials) as study:
        tracker.start()
        crew = _Crew(place, tracker, show, say)
        conductor = Conductor(study.space, study, place.store, data_identity(place.home / "cache"), tracker, tell)
        try:
            outcome.stopped = _trials(conductor, crew, place, stopping)
            outcome.interrupted = stopping.is_set()
            if not outcome.stopped and not outcome.interrupted:
                conductor.demanded |= _reference_lines(name, conductor, crew, place, say)
                conductor.close()
            outcome.reason = study.reason or ""
        finally:
            crew.stop()
            study.close()
            done = not outcome.interrupted and not outcome.stopped
            tracker.close("FINISHED" if done else "KILLED")
    outcome.demanded = conductor.demanded
    outcome.published = crew.published
    outcome.seconds = time.monotonic() - began
    return outcome


def _trials(conductor: Conductor, crew: _Crew, place: Place, stopping: threading.Event) -> StoppedEarly | None:
    ahead, stopped = conductor.first(conductor.space.budget.concurrent)
    if not ahead or stopped or stopping.is_set():
        return stopped
    from ktray.drivers.tune import run_search

    return run_search(conductor, crew.start(), ahead, place.home / "tune", stopping)


def _reference_lines(name: str, conductor: Conductor, crew: _Crew, place: Place, say: Callable[[str], None]) -> set[str]:
    """Compute what is missing of the reference lines; the keys that they need."""
    best = conductor.study.best()
    if not best:
        return set()
    data = data_loader()(PairSpec.model_validate(dict(best[0].pair)).data.transfer)
    wanted: dict[str, Graph] = references.reference_graphs(best[0], data, conductor.identity)
    folder = place.home / "studies" / name
    if references.settle(wanted, place.store, folder) is None:
        try:
            for line, graph in wanted.items():
                crew.start().obtain(list(graph.stages), f"reference: {line}")
        except StageFailed as failure:
            say(f"a reference line is missing: {failure}")
        references.settle(wanted, place.store, folder)
    return {stage.key for graph in wanted.values() for stage in graph.stages}


def with_concurrent(space: Space, concurrent: int | None) -> Space:
    """The same space with another number of trials at a time; the budget is no part of its identity."""
    if concurrent is None:
        return space
    budget = space.budget.model_copy(update={"concurrent": concurrent})
    return replace(space, document=space.document.model_copy(update={"budget": budget}))
