"""One search from beginning to end: settle what the store knows, start Ray for the rest, add the reference lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ktray.cost_model.stage_costs import learned
from ktray.errors import PreflightFailed, StageFailed, StoppedEarly
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_check import data_loader
from ktray.pipeline.pair_graph import Graph
from ktray.runs import reference_lines
from ktray.runs.coordinator import TrialCoordinator
from ktray.runs.data_check import same_data
from ktray.runs.interruption import Interruption, hear_again
from ktray.runs.stage_logger import track_missed
from ktray.runs.study_status import naming_stuck, noting
from ktray.search.journal import folder
from ktray.search.space import Space
from ktray.search.study import Study
from ktray.search.trial import Trial
from ktray.spec import PairSpec
from ktray.stores import Store
from ktray.tracking import Tracker

MOST_AT_A_TIME = 64  # trials: each waits in a process of its own on the machine that draws, however many workers there are
TRACKER_SECONDS = {True: 20.0, False: 3.0}  # who interrupts does not wait for a slow tracker: its spool keeps what is left


class Display(Protocol):
    """What a person is shown; called from several threads."""

    def begin(self, study: Study) -> None:
        """The study as it is before anything runs; its `trials` stay up to date."""

    def trial(self, event: str, trial: Trial, text: str) -> None:
        """A trial was paused, completed, pruned or failed."""

    def work(self, events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        """What the scheduler did since the last call, and what it does now."""

    def say(self, text: str) -> None:
        """A sentence."""


@dataclass(frozen=True)
class SearchSettings:
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
class SearchOutcome:
    """What one call of `search` did.

    Attributes:
        reason: why it ended, in a few words.
        stopped: set if it ended before its target.
        published: keys of the artifacts that were computed by the scheduler of this call.
        reused: keys of the other artifacts that its trials rest on; another search may have published them meanwhile.
    """

    study: str
    reason: str = ""
    stopped: StoppedEarly | None = None
    interrupted: bool = False
    published: set[str] = field(default_factory=set)
    reused: set[str] = field(default_factory=set)
    seconds: float = 0.0


class _LazyScheduler:
    """Ray and its scheduler, started when first needed: a search whose store has everything never waits for them."""

    def __init__(self, place: SearchSettings, tracker: Tracker, stopping: Interruption, screen: Display, name: str) -> None:
        self.place, self.tracker, self.stopping, self.say = place, tracker, stopping, screen.say
        self.folder = folder(place.home, name)
        self.show = naming_stuck(noting(self.folder, screen.work), screen.say)
        self._session: Any = None
        self._scheduler: Any = None
        self._watch: Any = None
        self.published: set[str] = set()

    def start(self) -> Any:
        from ktray.pipeline.execute import execute
        from ktray.runs.event_follower import EventFollower
        from ktray.runs.preflight import preflight
        from ktray.scheduler import client, ray_session, resources

        if self._scheduler is None:
            given = resources.load_runtime(self.place.runtime)
            self.stopping.heed()
            self.stopping.orderly = True
            self._session = ray_session.start(self.place.home, self.place.address, given)
            hear_again()
            self.say(f"Ray's own messages go to {self._session.log}")
            for warning in self._session.warnings:
                self.say(warning)
            preflight(self.place.store, given)
            self._scheduler = client.connect(self._session, self.place.store.url, execute)
            self._watch = EventFollower(self._scheduler, self.place.store, self.tracker, self.show)
        return self._scheduler

    def obtain(self, wanted: Mapping[str, Graph]) -> None:
        """Have the stages of these graphs published; what cannot be is said."""
        from ktray.runs.interruption import released
        from ktray.scheduler.client import WaitCancelled

        scheduler = self.start()
        with released(scheduler, lambda: list(wanted), self.stopping.is_set):
            for waiter, graph in wanted.items():
                try:
                    scheduler.obtain(list(graph.stages), waiter)
                except StageFailed as failure:
                    self.say(f"{waiter} is missing: {failure}")
                except WaitCancelled:
                    return

    def stop(self, new: set[str]) -> None:
        """End what was started; `new` are the keys that this search asked for and that were not in the store before."""
        from ktray.scheduler import ray_session

        if self._watch is not None:
            self._watch.close(new)
            self.published = self._watch.published
        if self._session is None:
            ray_session.tidy(self.place.home)  # the driver before may have been killed when there was nothing left to compute
        else:
            ray_session.stop(self._session)
            hear_again()


def search(
    space: Space,
    place: SearchSettings,
    tracker: Tracker,
    stopping: Interruption,
    screen: Display,
    *,
    name: str,
    trials: str | None,
    warm_start: str | None = None,
    retry: bool = False,
) -> SearchOutcome:
    """Run the study `name` to its target, or go on with it.

    Args:
        stopping: its wish ends the search within seconds; the same call goes on later.
        name, trials, warm_start, retry: as `Study.open` reads them.

    Raises:
        UserError: another driver has this study or home, or the study was begun with another space or other images.
        PreflightFailed: Ray does not start.
    """
    began = time.monotonic()
    outcome, space = SearchOutcome(name), _within_reach(space, screen)
    with Study.open(place.home, space, name, trials=trials, warm_start=warm_start, retry=retry) as study:
        scheduler, coordinator = (
            _LazyScheduler(place, tracker, stopping, screen, name),
            _coordinator(study, place, tracker, screen),
        )
        same_data(space, study.trials(), coordinator.identity, folder(place.home, name))
        before, done = set(place.store.keys()), False
        tracker.start()
        coordinator.account.open()
        screen.begin(study)
        try:
            outcome.stopped = _trials(coordinator, scheduler)
            if not outcome.stopped and not stopping.is_set():
                coordinator.prune()
                _reference_lines(coordinator, scheduler)
            outcome.reason, outcome.interrupted = study.stop_reason or "", stopping.is_set()
            done = not outcome.interrupted and not outcome.stopped
        except StoppedEarly as stop:
            outcome.stopped = stop
        except PreflightFailed:  # a signal to the whole process group also ends a Ray that is just starting
            if not stopping.is_set():
                raise
            outcome.interrupted = True
        finally:
            outcome.stopped = _end(coordinator, scheduler, before, done) or outcome.stopped
        rests_on = coordinator.demanded.union(*(trial.artifacts for trial in study.trials())) & set(place.store.keys())
    outcome.published, outcome.reused = rests_on & scheduler.published, rests_on - scheduler.published
    outcome.seconds = time.monotonic() - began
    return outcome


def _within_reach(space: Space, screen: Display) -> Space:
    if space.budget.concurrent <= MOST_AT_A_TIME:
        return space
    screen.say(f"{MOST_AT_A_TIME} trials run at a time, not {space.budget.concurrent}: each waits in a process on this machine")
    return with_concurrent(space, MOST_AT_A_TIME)


def _coordinator(study: Study, place: SearchSettings, tracker: Tracker, screen: Display) -> TrialCoordinator:
    identity, costs = data_identity(place.home / "cache"), learned(place.store)
    return TrialCoordinator(study.space, study, place.store, identity, tracker, screen.trial, costs)


def _end(coordinator: TrialCoordinator, scheduler: _LazyScheduler, before: set[str], done: bool) -> StoppedEarly | None:
    """Stop what runs, in the order in which one tells another, and say in the tracker what came of it all."""
    if not done:
        coordinator.leave()
    scheduler.stop(coordinator.demanded - before)
    began = min((trial.started for trial in coordinator.study.trials() if trial.started is not None), default=float("inf"))
    track_missed(coordinator.tracker, coordinator.store, sorted(coordinator.demanded | coordinator.untold()), began)
    stopped = _close(coordinator.study)
    coordinator.account.summary(coordinator.study.trials(), reference_lines.read(scheduler.folder))
    coordinator.tracker.close("FINISHED" if done else "KILLED", timeout=TRACKER_SECONDS[done])
    return stopped


def _close(study: Study) -> StoppedEarly | None:
    try:
        study.close()
    except StoppedEarly as stop:  # the disk is full: the study is as it last could be written
        return stop
    return None


def _trials(coordinator: TrialCoordinator, scheduler: _LazyScheduler) -> StoppedEarly | None:
    """Run what is to run, then have computed again what finished trials have lost."""
    ahead, stopped = coordinator.first(coordinator.space.budget.concurrent)
    if ahead and not stopped:
        from ktray.runs.tune_search import StudySearcher, run_search

        stopped = run_search(
            StudySearcher(coordinator, scheduler.start(), scheduler.stopping, ahead), scheduler.folder / "tune"
        )
    lost = {} if stopped or scheduler.stopping.is_set() else _lost(coordinator)
    if lost:
        scheduler.say(f"the store has lost artifacts of {', '.join(lost)}; they are computed again")
        scheduler.obtain(lost)
    return stopped


def _lost(coordinator: TrialCoordinator) -> dict[str, Graph]:
    """Name -> stages of completed trials with an artifact that is damaged or gone."""
    completed = [trial for trial in coordinator.study.trials() if trial.state == "completed"]
    poor = [trial for trial in completed if not all(coordinator.store.find(key) for key in trial.artifacts)]
    return {f"trial {trial.number}": coordinator.graph(trial) for trial in poor}


def _reference_lines(coordinator: TrialCoordinator, scheduler: _LazyScheduler) -> None:
    """Compute what is missing of the reference lines."""
    best = coordinator.study.best()
    if not best:
        return
    data = data_loader()(PairSpec.model_validate(dict(best[0].pair)).data.transfer)
    wanted = reference_lines.reference_graphs(best[0], data, coordinator.identity)
    coordinator.demanded |= {stage.key for graph in wanted.values() for stage in graph.stages}
    if reference_lines.settle(wanted, coordinator.store, scheduler.folder) is None:
        scheduler.obtain({f"the reference line {line!r}": graph for line, graph in wanted.items()})
        reference_lines.settle(wanted, coordinator.store, scheduler.folder)


def with_concurrent(space: Space, concurrent: int | None) -> Space:
    """The same space with another number of trials at a time; the budget is no part of its identity.

    Raises:
        ValueError: no trial could run.
    """
    if concurrent is None:
        return space
    budget = type(space.budget).model_validate({**space.budget.model_dump(), "concurrent": concurrent})
    return replace(space, document=space.document.model_copy(update={"budget": budget}))
