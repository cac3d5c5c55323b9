"""The search on Ray Tune: one Tune trial is one leg of one study trial, a light driver that waits for its stages.

Ray's own OptunaSearch mixes budgets and loses its place when killed, so the study is ours and this searcher only hands it over.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter, deque
from pathlib import Path
from typing import Any

from ktray.errors import StoppedEarly
from ktray.runs.coordinator import TrialCoordinator, TrialSegment
from ktray.runs.interruption import Interruption, released
from ktray.runs.tune_trial import RELEASED, STOPPED, StageWaiter  # before Tune, whose settings it makes
from ktray.scheduler.client import SchedulerClient

# isort: split
from ray import tune
from ray.tune.search import Searcher

DEATHS = 10  # of one trial's processes, with no result of any trial in between: a process that only waits is not to blame


class StudySearcher(Searcher):
    """Hands legs of the study to Tune and settles what comes back; `reason` says why the search stopped early.

    Args:
        stopping: set it to end the search within seconds; waiting trials stay resumable.
        ahead: legs that are already drawn; workers begin with them while Tune is still starting.
    """

    def __init__(
        self, coordinator: TrialCoordinator, scheduler: SchedulerClient, stopping: Interruption, ahead: deque[TrialSegment]
    ) -> None:
        super().__init__()
        self.coordinator, self.scheduler, self.stopping, self.ahead = coordinator, scheduler, stopping, ahead
        self.live: dict[str, TrialSegment] = {}
        self.deaths: Counter[int] = Counter()
        self.reason: StoppedEarly | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune pickles its searcher for a `restore` that we never use, because the study has its journal."""
        return {}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        if self.has_ended():
            return str(Searcher.FINISHED)
        leg = self._next()
        if leg is None:
            return None
        if leg == "done":
            # While legs run, their results may make promotions due.
            return None if self.live else str(Searcher.FINISHED)
        assert isinstance(leg, TrialSegment)
        self.live[trial_id] = leg
        return {"job": self._job(leg)}

    def _next(self) -> TrialSegment | str | None:
        if self.ahead:
            return self.ahead.popleft()
        try:
            leg = self.coordinator.next()
        except StoppedEarly as stop:
            self.reason = stop
            return "done"
        return None if leg == "wait" else leg

    def _job(self, leg: TrialSegment) -> dict[str, Any]:
        return {
            "scheduler": self.scheduler,
            "stages": list(leg.graph.stages),
            "waiter": _waiter(leg),
            "priority": leg.priority,
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Steps report once, at their end."""

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        leg = self.live.pop(trial_id, None)
        if leg is None or self.stopping.is_set():
            return
        try:
            if error or result is None:
                self._bury(leg)
            elif result["cause"] == STOPPED:
                self.reason = StoppedEarly(result["text"])
            elif result["cause"] == RELEASED:
                # Nobody wished to stop: the scheduler took us for dead because this process stalled. The trial waits anew.
                self.ahead.append(leg)
            elif result["cause"]:
                self.coordinator.fail(leg, result["cause"], result.get("failed", ""))
            else:
                self.deaths.clear()
                self.coordinator.settle(leg, json.loads(result["computed"]))
        except StoppedEarly as stop:
            self.reason = stop

    def _bury(self, leg: TrialSegment) -> None:
        """The process that waited for a leg is dead; whoever comes next waits for it."""
        self.deaths[leg.trial.number] += 1
        if self.deaths[leg.trial.number] < DEATHS:
            self.ahead.append(leg)
        else:
            self.coordinator.fail(leg, f"the process that waited for its stages died {DEATHS} times")

    def waiters(self) -> list[str]:
        """Who waits for stages now."""
        return [_waiter(leg) for leg in list(self.live.values())]

    def has_ended(self) -> bool:
        """Whether nothing of what still runs will be used by this call."""
        return self.stopping.is_set() or self.reason is not None

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing to save: the study has its journal."""

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """Nothing to restore."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class _Tick(tune.Callback):  # type: ignore[misc]
    """Tells the study that time passes, from the thread that draws from it."""

    def __init__(self, searcher: StudySearcher) -> None:
        self.searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        """Nothing, as for the searcher."""
        return {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        try:
            self.searcher.coordinator.study.save_elapsed()
        except StoppedEarly as stop:
            self.searcher.reason = stop


def run_search(searcher: StudySearcher, scratch: Path) -> StoppedEarly | None:
    """Run the searcher's study to its target on the Ray that is connected; why it stopped early, or None.

    Args:
        scratch: folder for Tune's own state, which nobody reads.
    """
    coordinator, scheduler = searcher.coordinator, searcher.scheduler
    concurrent = coordinator.space.budget.concurrent
    for leg in searcher.ahead:
        scheduler.prefetch(list(leg.graph.stages))
    scheduler.prefetch(coordinator.certain())
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
            # Tune does not retry a trial whose process died while idle between two trials, so all retries are ours.
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        ),
    )
    with released(scheduler, searcher.waiters, searcher.has_ended):
        tuner.fit()
    shutil.rmtree(scratch, ignore_errors=True)
    return searcher.reason


def _short_name(trial: Any) -> str:
    """Tune would put the whole config into names of folders."""
    return f"leg-{trial.trial_id}"


def _waiter(leg: TrialSegment) -> str:
    return f"trial {leg.trial.number}"
