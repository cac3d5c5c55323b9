"""One search from beginning to end: settle what the store knows, start Ray for the rest, add the reference lines.

Start with `search`, then `search_study`.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ktray.artifact import Stage
from ktray.cost_model.stage_costs import learn_from
from ktray.errors import PreflightFailed, SearchStopped, StageFailed, UserError
from ktray.pipeline import pair_graph, references
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_check import data_loader
from ktray.pipeline.pair_graph import Graph, Identity
from ktray.redaction import without_secrets
from ktray.runs.best_trials import results_on_test
from ktray.runs.coordinator import TrialCoordinator
from ktray.runs.data_check import refuse_changed_data
from ktray.runs.display import Display, open_display
from ktray.runs.interruption import (
    FORCE_SEARCH_AFTER_SECONDS,
    Interruption,
    restore_signal_handlers,
    run_concurrently,
    run_until_ended,
)
from ktray.runs.plan import check_space
from ktray.runs.settings import Settings, require_positive
from ktray.runs.study_logger import log_missed_stages, log_stage
from ktray.runs.study_status import ShowWork, with_status_file, with_stuck_warnings
from ktray.runs.uncertainty import level_with_best
from ktray.runs.worker_log import noting_what_workers_run
from ktray.scheduler.messages import BACKGROUND, DAMAGED
from ktray.search.history import read_study
from ktray.search.journal import study_folder, study_names
from ktray.search.journal_writer import lock_and_repair_journal
from ktray.search.ranking import ranked
from ktray.search.space import Space
from ktray.search.study import Study
from ktray.spec import PairSpec
from ktray.stages.images_stage import refuse_unreadable
from ktray.stores import Store
from ktray.stores.locks import FileLock, lock_home
from ktray.text import counted
from ktray.tracking import Tracker, Unwritten

if TYPE_CHECKING:
    from ktray.runs.early_start import EarlyStart
    from ktray.runs.profile import Profile
    from ktray.scheduler.client import SchedulerClient
    from ktray.scheduler.ray_session import RaySession

LAST_EVENTS_SECONDS = {False: 10.0, True: 2.0}  # interrupted? -> patience with a slow scheduler, at the end of a search
POLL_SECONDS = 1.0  # between two readings of the scheduler's events
MAX_CONCURRENT = 64  # trials: each waits in a process of its own on the driver's machine, however many workers there are
TRACKER_HOLD_SECONDS = 8.0  # until MLflow is imported, unless the first stages are requested before
UNFINISHED = ("running", "paused")  # states of trials that a search goes on with
TRACKER_SECONDS = {True: 20.0, False: 3.0}  # done? -> patience with a slow tracker, whose spool keeps what is left


@dataclass(frozen=True)
class SearchOptions:
    """How a study is searched; none of it changes a trial's result.

    Attributes:
        name: of the study; None for the space's.
        trials: target, such as ``"50"`` or ``"+50"``; None for the space's budget.
        concurrent: trials at the same time; None for the space's budget.
        warm_start: another study of this home, whose results the sampler learns from.
        address: a Ray cluster that is already there; None starts one on this machine.
        share_images: send cluster sheets to a remote tracker, too.
        retry: draw the pairs of failed trials again, as new trials.
        profile: collects what happens; the caller writes it.
    """

    name: str | None = None
    trials: str | None = None
    concurrent: int | None = None
    warm_start: str | None = None
    address: str | None = None
    share_images: bool = False
    retry: bool = False
    profile: Profile | None = None

    def mark(self, phase: str) -> None:
        """A phase of the search ends now."""
        if self.profile is not None:
            self.profile.mark(phase)


@dataclass
class SearchOutcome:
    """What one search did in this session.

    Attributes:
        reason: why it ended, in a few words.
        stopped: set if it ended before its target.
        published: keys of the artifacts that this session's scheduler computed.
        unwritten: what MLflow has not got of this session.
        trials_elsewhere: trials of earlier sessions that went to another tracker, or to a database that is gone.
        reused: keys of the other artifacts that its trials rest on; another search may have published some meanwhile.
    """

    study: str
    reason: str = ""
    stopped: SearchStopped | None = None
    interrupted: bool = False
    published: set[str] = field(default_factory=set)
    reused: set[str] = field(default_factory=set)
    seconds: float = 0.0
    unwritten: Unwritten = field(default_factory=Unwritten)
    trials_elsewhere: int = 0


class _LazyScheduler:
    """Ray and its scheduler, started when first needed: a search whose store has everything never waits for them."""

    def __init__(
        self,
        options: SearchOptions,
        settings: Settings,
        tracker: Tracker,
        interruption: Interruption,
        display: Display,
        home_lock: FileLock | None = None,
        early: EarlyStart | None = None,
    ) -> None:
        self.settings, self.address, self.store, self.tracker = settings, options.address, settings.open_store(), tracker
        self.home_lock, self.early, self.options = home_lock, early, options
        self.interruption, self.say = interruption, display.say
        self.study_folder = study_folder(settings.home, str(options.name))
        self.published: set[str] = set()
        self._show_work = with_stuck_warnings(with_status_file(self.study_folder, display.work), display.say)
        self._show_work = _shown_to_both(self._show_work, noting_what_workers_run(self.study_folder))
        if options.profile is not None:
            self._show_work = _shown_to_both(self._show_work, options.profile.observe)
        self._session: RaySession | None = None
        self._client: SchedulerClient | None = None
        self._follower: _EventFollower | None = None

    def start(self) -> SchedulerClient:
        if self._client is None:
            self.interruption.raise_if_requested()
            self.interruption.needs_cleanup = True
            if self.early is not None:
                self._session, self._client = self.early.result()
                self.interruption.raise_if_requested()
            else:
                self._session = self._start_session()  # in this thread, with which all processes of our own Ray end
            self.options.mark("Ray up")
            restore_signal_handlers()
            self.interruption.force_after = FORCE_SEARCH_AFTER_SECONDS
            self.say(f"Ray's own messages go to {self._session.log}")
            for warning in self._session.warnings:
                self.say(warning)
            self._client, self._follower = run_until_ended(self._follow, self.interruption)
        return self._client

    def _start_session(self) -> RaySession:
        from ktray.scheduler import ray_session, resources

        return ray_session.start(
            self.settings.home,
            self.address,
            resources.load_runtime_settings(self.settings.runtime),
            self.interruption.lose,
            self.interruption.ends_process,
            self.home_lock,
        )

    def _follow(self) -> tuple[SchedulerClient, _EventFollower]:
        from ktray.runs.preflight import connect_after_preflight

        assert self._session is not None, "Ray has started"
        client = self._client or connect_after_preflight(self._session, self.store, self.options.profile)
        past = self.early is None  # a scheduler that started early serves this search alone, and may have published already
        return client, _EventFollower(client, self.store, self.tracker, self._show_work, self.say, ignores_past=past)

    def obtain(self, graphs: Mapping[str, Graph]) -> None:
        """Have the stages of these graphs published; report what fails.

        Args:
            graphs: name of a waiter -> what it waits for.
        """
        from ktray.scheduler.client import WaitCancelled

        scheduler = self.start()

        def obtain(waiter: str) -> None:
            try:
                scheduler.obtain(list(graphs[waiter].stages), waiter)
            except StageFailed as failure:
                self.say(f"{waiter} is missing: {failure}")
            except WaitCancelled:
                pass  # the search ends

        run_concurrently(scheduler, graphs, obtain, str, MAX_CONCURRENT, self.interruption)

    def leave(self, new: set[str]) -> None:
        """Read the last events, and end the scheduler; `new` are the keys asked for that were not in the store before."""
        from ktray.scheduler import ray_session

        if self._follower is not None:
            self._follower.close(new, LAST_EVENTS_SECONDS[self.interruption.must_end()] if not self.interruption.loss else 0.0)
            self.published = self._follower.published
        if self._session is not None:
            ray_session.disconnect_schedulers(self._session)

    def stop(self) -> None:
        """End Ray, if it was started."""
        from ktray.scheduler import ray_session

        if self.early is not None:
            self.early.end()
            restore_signal_handlers()
        elif self._session is None:
            # An earlier driver may have been killed, and nothing was left to compute that would have started Ray here.
            if self.home_lock is not None:
                self.home_lock.release()
            ray_session.remove_stale_folders(self.settings.home)
        else:
            ray_session.stop(self._session)
            restore_signal_handlers()


def _shown_to_both(first: ShowWork, second: ShowWork) -> ShowWork:
    def show(events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        second(events, status)
        first(events, status)

    return show


@contextmanager
def _lazy_scheduler(
    options: SearchOptions,
    settings: Settings,
    tracker: Tracker,
    interruption: Interruption,
    display: Display,
    early: EarlyStart | None = None,
) -> Iterator[_LazyScheduler]:
    """A scheduler for a study, whose Ray ends with this block."""
    # Before anything is written; an early start has the lock already.
    lock = None if early is not None else _lock_home(settings.home, str(options.name), options)
    with lock or nullcontext() as home_lock:
        scheduler = _LazyScheduler(options, settings, tracker, interruption, display, home_lock, early)
        try:
            yield scheduler
        finally:
            scheduler.stop()


def search(
    space: Space,
    source: str,
    options: SearchOptions,
    settings: Settings,
    interruption: Interruption,
    report: Callable[[SearchOutcome], None] = lambda outcome: None,
    early: EarlyStart | None = None,
) -> SearchOutcome:
    """Check a space, then run its study to the target, or go on with it.

    Args:
        source: what errors call the space, such as its file.
        interruption: a request to stop ends the search within seconds; the same call goes on later.
        report: called with the outcome once everything is written, and before Ray ends, whose end is not always orderly.
        early: a Ray that is starting already.

    Raises:
        UserError: the space, an option or the data are wrong, or another driver has this study or home.
        PreflightFailed: Ray, the store or the disk cannot carry the search.
    """
    from ktray import __version__

    if options.concurrent is not None:
        require_positive(options.concurrent, "concurrent")
    space = with_concurrent(space, options.concurrent)
    if early is not None:
        early.compute_ahead(lambda: _images_before_the_check(space, settings))
    assumed = check_space(space, data_loader(), source)
    options.mark("space checked")
    name = options.name or space.study_name
    for warning in [*space.sharing_warnings(), *assumed]:
        settings.print_info(f"ktray: {warning}")
    tags = {"ktray.version": __version__}
    tracker = Tracker(settings.tracking_uri, settings.home, name, share_images=options.share_images, version_tags=tags)
    options = replace(options, name=name)
    with ExitStack() as until_reported:
        with open_display(settings, space, name) as display:
            scheduler = until_reported.enter_context(_lazy_scheduler(options, settings, tracker, interruption, display, early))
            outcome = search_study(space, options, settings, tracker, interruption, display, scheduler)
        report(outcome)
        options.mark("table")
    return outcome


def _images_before_the_check(space: Space, settings: Settings) -> list[Stage]:
    """The stages that decode the images of a space; empty where that cannot be told before it is checked."""
    with suppress(Exception):  # of any kind, from plugins too: the check of the space, which comes next, says what is wrong
        return list(_images_stages(space, data_identity(settings.cache)).values())
    return []


def search_study(
    space: Space,
    options: SearchOptions,
    settings: Settings,
    tracker: Tracker,
    interruption: Interruption,
    display: Display,
    scheduler: _LazyScheduler | None = None,
) -> SearchOutcome:
    """Run a study to its target, or go on with it. The space has been checked.

    Args:
        scheduler: whose Ray runs on afterwards; None for one that ends with this call.

    Raises:
        UserError: another driver has this study or home, or the study was begun with another space or other images.
        PreflightFailed: Ray does not start.
    """
    if scheduler is None:
        options = replace(options, name=options.name or space.study_name)
        with _lazy_scheduler(options, settings, tracker, interruption, display) as own:
            return search_study(space, options, settings, tracker, interruption, display, own)
    began, name, store = time.monotonic(), options.name or space.study_name, settings.open_store()
    outcome, space = SearchOutcome(name), _limit_concurrent(space, display)
    study_of = Study.open(settings.home, space, name, trials=options.trials, warm_start=options.warm_start, retry=options.retry)
    with study_of as study:
        coordinator = _coordinator(study, store, settings, tracker, display)
        refuse_changed_data(space, study.trials(), coordinator.identity, study_folder(settings.home, name))
        keys_before, done = set(store.keys()), False
        tracker.start(TRACKER_HOLD_SECONDS)
        coordinator.trial_logger.describe_study()
        display.begin(study)
        if study.target < study.target_asked_for:
            pairs = counted(study.target, "pair")
            display.say(f"the space has {pairs}, so that {study.target} trials are drawn and not {study.target_asked_for}")
        try:
            _make_images(coordinator, scheduler)
            outcome.stopped = _run_trials(coordinator, scheduler)
            if not outcome.stopped and not interruption.is_requested():
                coordinator.prune()
                _compute_reference_lines(coordinator, scheduler)
            outcome.reason = study.stop_reason or ""
            done = not outcome.stopped and not interruption.is_requested()
        except SearchStopped as stop:
            outcome.stopped = stop
        except (KeyboardInterrupt, PreflightFailed):
            # A signal to the whole process group also ends a Ray that is just starting.
            if not interruption.is_requested():
                raise
        finally:
            outcome.stopped = _end(coordinator, scheduler, keys_before, done) or outcome.stopped
        used = coordinator.demanded.union(*(trial.artifact_keys for trial in study.trials())) & set(store.keys())
    if interruption.is_requested():
        outcome.interrupted, outcome.stopped = True, None
    outcome.unwritten = tracker.unwritten()
    outcome.trials_elsewhere = _trials_elsewhere(study, tracker, outcome.unwritten)
    outcome.published, outcome.reused = used & scheduler.published, used - scheduler.published
    outcome.seconds = time.monotonic() - began
    return outcome


def _trials_elsewhere(study: Study, tracker: Tracker, unwritten: Unwritten) -> int:
    """How many trials that ran the tracker has not got, where nothing waits for it."""
    if any(vars(unwritten).values()):
        return 0
    ran = {trial.number for trial in study.trials() if trial.keys and trial.state != "duplicate"}
    return len(ran - tracker.trials_written())


def unwritten_events(outcome: SearchOutcome, settings: Settings) -> str:
    """What MLflow has not got of a study, where it is, and how it gets there; empty if MLflow has everything."""
    missing, place = outcome.unwritten, study_folder(settings.home, outcome.study) / "tracking"
    parts = []
    if missing.waiting:
        waits = counted(missing.waiting, "event waits", "events wait")
        them = "it" if missing.waiting == 1 else "them"
        parts.append(f"{waits} in {place} for MLflow; the same command writes {them} once the tracker answers")
    if missing.refused:
        parts.append(f"MLflow refuses {counted(missing.refused, 'event')}: see {place / 'rejected.jsonl'}")
    if missing.lost:
        parts.append(f"{counted(missing.lost, 'event')} could not be kept for MLflow: {place} cannot be written")
    if outcome.trials_elsewhere:
        command = shlex.join(["ktray", "sync", outcome.study, settings.tracking_uri, "--home", str(settings.home)])
        where = f"{without_secrets(settings.tracking_uri)} has not got {counted(outcome.trials_elsewhere, 'trial')}"
        parts.append(f"{where} of earlier searches, which wrote to another place: {without_secrets(command)}")
    return ". ".join(parts)


def _lock_home(home: Path, name: str, options: SearchOptions) -> FileLock | None:
    """The lock with which this search may start Ray on its home; None if it needs none.

    Raises:
        UserError: another process has it, or drives this study; nothing is left of a search that is refused.
    """
    if options.address is not None:
        return None
    try:
        return lock_home(home)
    except UserError:
        if name not in study_names(home):
            raise
        with lock_and_repair_journal(home, name):  # where it is the study that is in use, say so
            history = read_study(home, name)
        asks_for_more = options.trials or options.warm_start or options.retry
        if asks_for_more or len(history.trials) < history.target or any(t.state in UNFINISHED for t in history.trials):
            raise
        return None


def _limit_concurrent(space: Space, display: Display) -> Space:
    if space.budget.concurrent <= MAX_CONCURRENT:
        return space
    asked = space.budget.concurrent
    display.say(f"{MAX_CONCURRENT} trials run at a time, not {asked}: each waits in a process on this machine")
    return with_concurrent(space, MAX_CONCURRENT)


def _coordinator(study: Study, store: Store, settings: Settings, tracker: Tracker, display: Display) -> TrialCoordinator:
    identity, costs = data_identity(settings.cache), learn_from(store)
    return TrialCoordinator(study.space, study, store, identity, tracker, display.trial, costs)


def _end(coordinator: TrialCoordinator, scheduler: _LazyScheduler, keys_before: set[str], done: bool) -> SearchStopped | None:
    """Stop everything, each part before those that it reports to, and write the final state to the tracker."""
    if not done:
        coordinator.leave()
    scheduler.leave(coordinator.demanded - keys_before)
    began = min((trial.started for trial in coordinator.study.trials() if trial.started is not None), default=float("inf"))
    log_missed_stages(coordinator.tracker, coordinator.store, sorted(coordinator.demanded | coordinator.untracked()), began)
    stopped = _close(coordinator.study)
    trials, space = coordinator.study.trials(), coordinator.study.space
    level = level_with_best(ranked(trials, space.objectives)[:5], space.objectives[0][0], coordinator.store)
    tested = results_on_test(scheduler.study_folder)
    coordinator.trial_logger.log_summary(trials, references.read(scheduler.study_folder), level, tested)
    interruption = scheduler.interruption
    ending_already = interruption.must_end()  # then the tracker is waited for all the same, though only briefly
    status: Literal["FINISHED", "KILLED"] = "FINISHED" if done else "KILLED"
    coordinator.tracker.close(status, TRACKER_SECONDS[done], lambda: interruption.must_end() and not ending_already)
    return stopped


def _close(study: Study) -> SearchStopped | None:
    try:
        study.prune_and_close()
    except SearchStopped as stop:  # the disk is full: the study is as it last could be written
        return stop
    return None


def _make_images(coordinator: TrialCoordinator, scheduler: _LazyScheduler) -> None:
    """Have the images of all draws decoded before the first trial is drawn; nothing if none is left to draw or to go on with.

    Raises:
        UserError: they cannot be decoded, or too few of them.
    """
    study = coordinator.study
    if study.draw_count >= study.target and all(trial.state not in UNFINISHED for trial in study.trials()):
        return
    found = _images_stages(coordinator.space, coordinator.identity)
    coordinator.demanded |= found.keys()
    missing = [stage for key, stage in found.items() if coordinator.store.find(key) is None]
    if missing:
        client = scheduler.start()
        from ktray.scheduler.client import WaitCancelled

        def make() -> None:
            with suppress(WaitCancelled):  # the search ends
                client.obtain(missing, "the search")

        try:
            run_until_ended(make, scheduler.interruption)
        except StageFailed as failure:
            raise UserError(
                f"the images cannot be used, so that no trial was drawn: {failure.cause}",
                f"{coordinator.space.source}: pair.data",
            ) from failure
    for key, stage in found.items():
        if (made := coordinator.store.find(key)) is not None:
            refuse_unreadable(stage, made)


def _images_stages(space: Space, identity: Identity) -> dict[str, Stage]:
    """Key -> stage of all images that draws read: of each branch, and of each data set that is drawn."""
    found = dict[str, Stage]()
    of_data = (params for label, params in space.boundary_draws() if ": data" in label)
    for params in (*(params for _, params in space.branch_draws()), *of_data):
        with suppress(UserError):  # two values that do not go together, which their trial will report
            graph = pair_graph.build(space.pair(params), identity)
            found |= {stage.key: stage for stage in graph.stages if stage.name == "images"}
    return found


def _run_trials(coordinator: TrialCoordinator, scheduler: _LazyScheduler) -> SearchStopped | None:
    """Run the trials that are due, then compute again what completed trials have lost."""
    first, stopped = coordinator.first_segments(coordinator.space.budget.concurrent)
    if first and not stopped:
        client, planned = scheduler.start(), coordinator.planned_stages()

        def compute_ahead() -> None:
            for segment in first:
                client.prefetch(list(segment.graph.stages))
            client.prefetch(planned)

        run_until_ended(compute_ahead, scheduler.interruption)  # workers begin before Tune is imported, and starts
        coordinator.tracker.write_now()
        from ktray.runs.tune_search import StudySearcher, run_on_tune

        lines = _ReferencesAhead(coordinator, client)
        searcher = StudySearcher(coordinator, client, scheduler.interruption, first, lines.request)
        stopped = run_until_ended(lambda: run_on_tune(searcher, scheduler.study_folder / "tune"), scheduler.interruption)
    lost = {} if stopped or scheduler.interruption.is_requested() else _lost_stages(coordinator)
    if lost:
        scheduler.say(f"the store has lost artifacts of {', '.join(lost)}; they are computed again")
        scheduler.obtain(lost)
    return stopped


def _lost_stages(coordinator: TrialCoordinator) -> dict[str, Graph]:
    """Name -> stages of completed trials with an artifact that is damaged or gone."""
    completed = [trial for trial in coordinator.study.trials() if trial.state == "completed"]
    incomplete = [trial for trial in completed if not all(coordinator.store.find(key) for key in trial.artifact_keys)]
    return {f"trial {trial.number}": coordinator.graph(trial) for trial in incomplete}


def _compute_reference_lines(coordinator: TrialCoordinator, scheduler: _LazyScheduler) -> None:
    """Compute what is missing of the reference lines."""
    best = coordinator.study.ranked_trials()
    if not best:
        return
    graphs = _reference_graphs(best[0].pair, coordinator.identity)
    coordinator.demanded |= {stage.key for graph in graphs.values() for stage in graph.stages}
    if references.save_if_complete(graphs, coordinator.store, scheduler.study_folder) is None:
        scheduler.obtain({_waiter_for(line): graph for line, graph in graphs.items()})
        references.save_if_complete(graphs, coordinator.store, scheduler.study_folder)


def _reference_graphs(pair: Mapping[str, Any], identity: Identity) -> dict[str, Graph]:
    data = data_loader()(PairSpec.model_validate(dict(pair)).data.transfer)
    return references.reference_graphs(pair, data, identity)


def _waiter_for(line: str) -> str:
    return f"the reference line {line!r}"


class _ReferencesAhead:
    """Has the reference lines of the best trial so far computed on workers that the last trials leave idle.

    They may turn out to be those of another trial; `_compute_reference_lines` computes what is missing in the end.
    """

    def __init__(self, coordinator: TrialCoordinator, scheduler: SchedulerClient) -> None:
        self._coordinator, self._scheduler = coordinator, scheduler
        self._pair: Mapping[str, Any] | None = None
        self._next_look = 0.0

    def request(self) -> None:
        """Call this while trials run and none is due; it returns at once."""
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + POLL_SECONDS
        best = self._coordinator.study.ranked_trials()
        if best and best[0].pair != self._pair:
            outdated, self._pair = self._pair is not None, best[0].pair
            threading.Thread(target=self._obtain, args=(best[0].pair, outdated), daemon=True).start()

    def _obtain(self, pair: Mapping[str, Any], outdated: bool) -> None:
        import ray

        from ktray.scheduler.client import WaitCancelled

        def obtain(graph: Graph, waiter: str) -> None:
            # Whatever goes wrong here is reported when the line is computed in the end.
            with suppress(StageFailed, SearchStopped, WaitCancelled, ray.exceptions.RayError):
                self._scheduler.obtain(list(graph.stages), waiter, BACKGROUND)

        with suppress(UserError, SearchStopped, ray.exceptions.RayError):
            for line, graph in _reference_graphs(pair, self._coordinator.identity).items():
                if outdated:
                    self._scheduler.cancel_requests(_waiter_for(line))
                self._coordinator.demanded.update(stage.key for stage in graph.stages)
                threading.Thread(target=obtain, args=(graph, _waiter_for(line)), daemon=True).start()


def with_concurrent(space: Space, concurrent: int | None) -> Space:
    """The same space with another number of trials at a time; the budget is no part of its identity.

    Raises:
        ValueError: no trial could run.
    """
    if concurrent is None:
        return space
    budget = type(space.budget).model_validate({**space.budget.model_dump(), "concurrent": concurrent})
    return replace(space, document=space.document.model_copy(update={"budget": budget}))


class _EventFollower:
    """A thread that reads the scheduler's events once a second.

    Args:
        show: called once a second with the new events and the scheduler's status: ``show(events, status)``.
        say: called with a sentence about each damaged artifact.
        ignores_past: whether events from before do not count, because they may be about stages of other drivers.

    Attributes:
        published: keys of the artifacts that this scheduler has published since the follower started.
    """

    def __init__(
        self,
        scheduler: SchedulerClient,
        store: Store,
        tracker: Tracker,
        show: Callable[[list[dict[str, Any]], Mapping[str, Any]], None],
        say: Callable[[str], None],
        ignores_past: bool = True,
    ) -> None:
        self.scheduler, self.store, self.tracker, self.show, self.say = scheduler, store, tracker, show, say
        self.published: set[str] = set()
        self._name = str(scheduler.status()["name"])
        past = scheduler.events(0) if ignores_past else []
        self._last_event = past[-1]["n"] if past else 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        import ray

        last = False
        while not last:
            last = self._closing.wait(POLL_SECONDS)
            try:
                with suppress(ray.exceptions.RayError):  # a call that failed: the next second tries again
                    self._read()
            except SearchStopped:
                return  # the scheduler has ended; the search itself reports why

    def _read(self) -> None:
        events = self.scheduler.events(self._last_event)
        for event in events:
            self._last_event = max(self._last_event, event["n"])
            if event["event"] == "published":
                self._log_published(event["key"])
            elif event["event"] == DAMAGED:
                self.say(event["cause"])
        self.show(events, self.scheduler.status())

    def _log_published(self, key: str) -> None:
        artifact = self.store.find(key) if key not in self.published else None
        if artifact is not None:
            self.published.add(key)
            log_stage(self.tracker, artifact)

    def close(self, new: Iterable[str], timeout: float = 10.0) -> None:
        """Read the last events, then stop.

        Args:
            timeout: seconds for the scheduler to answer once more.
            new: keys that may have been published meanwhile. The events of a broker that died are lost, so those of them that
                are in the store with an attempt of this scheduler are logged as well.
        """
        self._closing.set()
        self._thread.join(timeout)
        for key in new:
            artifact = self.store.find(key)
            if artifact is not None and artifact.record["attempt"].startswith(f"{self._name}-"):
                self._log_published(key)
