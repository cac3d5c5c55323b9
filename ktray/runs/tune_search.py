"""The search on Ray Tune: one Tune trial is one segment of one study trial, a light process that waits for its stages.

Ray's own OptunaSearch mixes budgets and cannot resume after a kill, so the study is ours, and this searcher only connects it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ktray.errors import SearchStopped
from ktray.runs.coordinator import TrialCoordinator, TrialSegment
from ktray.runs.interruption import Interruption, cancelling_waits
from ktray.runs.tune_trial import CANCELLED, STOPPED, StageWaiter  # before Tune: it sets Tune's environment variables
from ktray.scheduler.client import SchedulerClient

# isort: split
from ray import tune
from ray.tune.search import Searcher

MAX_DEATHS = 10  # of one trial's processes, with no result of any trial in between: a waiting process is rarely to blame


class StudySearcher(Searcher):
    """Gives Tune the study's segments to run, and reports their results to the study.

    Args:
        interruption: a request to stop ends the search within seconds; waiting trials stay resumable.
        pending: segments that are already drawn; their stages may be requested already.
        when_none_is_due: called, maybe often, while segments run and none is due.

    Attributes:
        running: Tune's trial -> its segment.
        computed: number of a trial that waits again -> keys that it caused to be computed before.
        stopped: why the search stopped early, or None.
    """

    def __init__(
        self,
        coordinator: TrialCoordinator,
        scheduler: SchedulerClient,
        interruption: Interruption,
        pending: deque[TrialSegment],
        when_none_is_due: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        self.when_none_is_due = when_none_is_due
        self.coordinator, self.scheduler, self.interruption, self.pending = coordinator, scheduler, interruption, pending
        self.running: dict[str, TrialSegment] = {}
        self.deaths: Counter[int] = Counter()
        self.losses: Counter[int] = Counter()
        self.computed: dict[int, list[str]] = {}
        self.stopped: SearchStopped | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher for a `restore` that we never use, because the study has a journal."""
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if self.has_ended():
            return str(Searcher.FINISHED)
        segment = self._next()
        if isinstance(segment, TrialSegment):
            self.running[trial_id] = segment
            return {"job": self._job(segment)}
        if segment != "wait" and not self.running:
            return str(Searcher.FINISHED)
        # Results of running segments may lead to promotions, so the search is not over while there are any.
        self.when_none_is_due()
        return None

    def _next(self) -> TrialSegment | Literal["wait", "done"]:
        if self.pending:
            return self.pending.popleft()
        try:
            return self.coordinator.next()
        except SearchStopped as stop:
            self.stopped = stop
            return "done"

    def _job(self, segment: TrialSegment) -> dict[str, Any]:
        return {
            "scheduler": self.scheduler,
            "stages": list(segment.graph.stages),
            "waiter": _waiter(segment),
            "priority": segment.priority,
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A step reports once, at its end, which `on_trial_complete` handles."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        segment = self.running.pop(trial_id, None)
        if segment is None or self.interruption.must_end():
            return
        try:
            if error or result is None:
                self._waiter_died(segment)
            elif result["cause"] == STOPPED:
                self.stopped = SearchStopped(result["text"])
            elif result["cause"] == CANCELLED:
                # No stop was requested: the scheduler took a stalled process for dead. The trial waits again.
                self.pending.append(segment)
            elif result["cause"]:
                self.coordinator.fail(segment, result["cause"], result.get("failed", ""))
            else:
                self.deaths.clear()
                self._settle(segment, json.loads(result["computed"]))
        except SearchStopped as stop:
            self.stopped = stop

    def _settle(self, segment: TrialSegment, computed: list[str]) -> None:
        number = segment.trial.number
        computed += self.computed.pop(number, [])
        if not self.coordinator.is_published(segment) and self.losses[number] < MAX_DEATHS:
            # A stage of another trial has just found an artifact of this one damaged, so this one waits until it is made anew.
            self.losses[number] += 1
            self.computed[number] = computed
            self.pending.append(segment)
        else:
            self.coordinator.settle(segment, computed)

    def _waiter_died(self, segment: TrialSegment) -> None:
        """The process that waited for a segment is dead; another one will wait for it."""
        self.deaths[segment.trial.number] += 1
        if self.deaths[segment.trial.number] < MAX_DEATHS:
            self.pending.append(segment)
        else:
            self.coordinator.fail(segment, f"the process that waited for its stages died {MAX_DEATHS} times")

    def waiters(self) -> list[str]:
        """Names of those that wait for stages now."""
        return [_waiter(segment) for segment in list(self.running.values())]

    def has_ended(self) -> bool:
        """Whether results of what still runs will no longer be used by this call."""
        return self.interruption.must_end() or self.stopped is not None

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing to save: the study has a journal."""

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Nothing to restore."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class _Tick(tune.Callback):
    """Lets the study check its time limits, in the thread that draws from it."""

    def __init__(self, searcher: StudySearcher) -> None:
        self.searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as for the searcher."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        if self.searcher.interruption.must_end():
            return  # this thread may have been left behind, and the study closed
        try:
            self.searcher.coordinator.study.save_elapsed_if_due()
        except SearchStopped as stop:
            self.searcher.stopped = stop


def run_on_tune(searcher: StudySearcher, scratch: Path) -> SearchStopped | None:
    """Run the searcher's study to its target on the connected Ray; why it stopped early, or None.

    Args:
        scratch: folder for Tune's own state, which nobody reads.
    """
    coordinator, scheduler = searcher.coordinator, searcher.scheduler
    concurrent = coordinator.space.budget.concurrent
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(concurrent)
    resources = tune.PlacementGroupFactory([{"CPU": 0, "node:__internal_head__": 0.001}])
    tuner = tune.Tuner(
        tune.with_resources(StageWaiter, resources),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            num_samples=-1,
            reuse_actors=True,
            max_concurrent_trials=concurrent,
            trial_name_creator=_short_name,
            trial_dirname_creator=_short_name,
        ),
        run_config=tune.RunConfig(
            name="search",
            storage_path=str(scratch),
            verbose=0,
            callbacks=[_Tick(searcher)],
            # Tune does not retry a trial whose process died idle, between two trials, so we do all retries ourselves.
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    with cancelling_waits(scheduler, searcher.waiters, searcher.has_ended):
        tuner.fit()
    shutil.rmtree(scratch, ignore_errors=True)
    return searcher.stopped


def _short_name(trial: Any) -> str:
    """Short, because Tune would put the whole config into folder names."""
    return f"segment-{trial.trial_id}"


def _waiter(segment: TrialSegment) -> str:
    return f"trial {segment.trial.number}"
