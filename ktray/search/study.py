"""A study: decides which trial runs next and records what became of each, in a journal from which a killed search resumes.

A single driver, in a single thread, asks `next` for a segment of a trial (from the epoch where the trial paused to its next
rung), runs it, and calls `pause_at_rung`, `finish` or `fail`. The states of a trial:

    drawn -> running -> completed                its full training is done and evaluated
                     -> failed                   a stage raised, or a score is not finite
                     -> paused                   at a rung; from there
                          paused -> running      promoted to the next rung
                          paused -> pruned       the study has met its target, and the trial was not promoted
    drawn -> duplicate                           the same pair as an earlier trial
    drawn -> failed                              no valid pair

`next` prefers, in this order: trials that a killed driver left running, promotions, new draws. If none of these is left and no
trial is completed, the best paused trial is trained to its end, so that every search has a result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from ktray.errors import SearchStopped, UserError
from ktray.fingerprint import canonical
from ktray.search import halving, ranking, space_file, warm_start
from ktray.search.budget import (
    AttributedCosts,
    CostEstimate,
    PrefixSuffixSeconds,
    Spending,
    affordable_seconds,
    nothing_affordable_reason,
    reached_limit,
)
from ktray.search.draws import DrawSource, SampledDraws
from ktray.search.journal import study_folder, study_names
from ktray.search.journal_writer import Journal, lock_and_repair_journal
from ktray.search.space import Space
from ktray.search.trial import State, Trial
from ktray.text import shown

MAX_TARGET_DIGITS = 9  # of a number of trials
MAX_FAILURES = 10  # failed trials in a row that stop a search
MOST_DIFFERENCES = 5  # between two spaces, named in an error
SAVE_EVERY = 30.0  # seconds of elapsed time; a kill -9 loses no more than these


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A segment of a trial to run: its student up to the end of epoch `until`; `final` if that is the full training."""

    trial: Trial
    until: int
    final: bool


class Study:
    """A study that this process drives; create it with `open`.

    Attributes:
        spending: the cost of its stages so far.
        stop_reason: why `next` returned "done", in a few words; None before that.
        target: number of draws after which the search ends, over all sessions; duplicates are not counted.
        target_asked_for: the same before it was capped at the number of pairs of a finite space.
    """

    def __init__(
        self, journal: Journal, space: Space, clock: Callable[[], float], trials: str | int | None, draws: DrawSource
    ) -> None:
        self.space = space
        self.spending = Spending()
        self.stop_reason: str | None = None
        self._journal, self._clock, self._draws = journal, clock, draws
        notes = journal.notes()
        self._elapsed = _ElapsedTime(
            clock, float(notes.get("spent", 0.0)), lambda seconds: journal.write_note("spent", seconds)
        )
        self._trials: dict[int, Trial] = {}  # in the order of their numbers
        self._drawn = 0
        self._rungs = halving.RungScores(space.early_stop)
        self._pair_parts: dict[str, Any] = {}  # JSON text of a part of a pair -> that part, which trials share
        for trial in warm_start.observation_trials(notes.get(warm_start.NOTE, {})):
            draws.record_trial(trial)
        for trial in journal.trials():
            self._record_trial(_intern_pair_parts(trial, self._pair_parts))
        self._running: dict[int, Trial] = {}  # assigned in this session
        self._interrupted = [trial.number for trial in self.trials() if trial.state == "running"]  # left by a killed driver
        self._failures = _FailureLimit(self.trials())
        self._exhausted = False
        self._unaffordable_at: PrefixSuffixSeconds | None = None  # what was spent when no draw was affordable
        self._target_met = False
        self._lock = contextlib.ExitStack()
        self.target = self._determine_target(trials)

    @classmethod
    def open(
        cls,
        home: Path,
        space: Space,
        name: str | None = None,
        clock: Callable[[], float] = time.time,
        trials: str | int | None = None,
        draws: DrawSource | None = None,
        warm_start: str | None = None,
        retry: bool = False,
    ) -> Study:
        """Begins or resumes a study. `next` first returns the trials that a killed driver left running.

        Args:
            name: of the study; by default the name in the space.
            clock: returns seconds.
            trials: target number of draws, or ``+50`` to raise a target that is met; None: as in the space's budget.
            draws: source of new trials; by default the sampler.
            warm_start: another study of this home that the sampler learns from. Its results are kept in the journal, so a
                resumed search need not name it again.
            retry: first draw the pairs of failed trials again, as new trials.

        Raises:
            UserError: another process drives the study, it was begun with another space, or the name or `trials` is invalid.
        """
        name = name or space.study_name
        try:
            space_file.check_study_name(name)
        except ValueError as error:
            raise UserError(str(error), "--name") from error
        _validated_target_text(trials)
        with contextlib.ExitStack() as lock:
            lock.enter_context(lock_and_repair_journal(home, name))
            is_new = name not in study_names(home)
            journal = Journal(home, name, space)
            try:
                if journal.trials():  # without any, nothing would be compared with other results
                    _check_same_space(journal.notes().get("space"), space, name)
                if warm_start:
                    _note_warm_start(journal, home, space, name, warm_start)
            except UserError:
                if is_new:  # nothing is left of a study that is refused
                    shutil.rmtree(study_folder(home, name), ignore_errors=True)
                raise
            study = cls(journal, space, clock, trials, draws or SampledDraws(space))
            if retry:
                study._increase_target_to(study.draw_count + study._draws.requeue_failed_pairs())
            study._lock = lock.pop_all()
        return study

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()

    def trials(self, since: int = 0) -> list[Trial]:
        """All trials from number `since` on, in the order of their draws."""
        return [self._trials[number] for number in range(since, len(self._trials))]

    def set_cost_estimate(self, cost_estimate: CostEstimate) -> None:
        """Sets the function that estimates the cost of a draw from now on."""
        self._draws.set_cost_estimate(cost_estimate)

    @property
    def draw_count(self) -> int:
        """Number of trials that count towards the target: all but duplicates, which `SampledDraws` counts, too."""
        return self._drawn

    @property
    def elapsed(self) -> float:
        """Seconds that searches of this study have run, over all resumes."""
        return self._elapsed.seconds

    def ranked_trials(self, pareto: bool = False) -> list[Trial]:
        """Completed trials, best first; with `pareto` only the Pareto front."""
        ranked = ranking.pareto_front if pareto else ranking.ranked
        return ranked(self.trials(), self.space.objectives)

    # --- what runs next

    def next(self) -> Assignment | Literal["wait", "done"]:
        """The segment to run now; "wait" if that depends on running trials, "done" if nothing is left to run.

        A draw that equals an earlier trial is recorded as a duplicate and skipped.

        Raises:
            SearchStopped: ten trials in a row failed, or the disk is full.
        """
        self._failures.raise_if_reached()
        if len(self._running) >= self.space.budget.concurrent:
            return "wait"
        limit = self._reached_limit()
        trial = self._next_trial() if limit is None else None
        if trial is None and self._running:
            return "wait"
        trial = trial or self._best_paused_if_none_completed()
        if trial is not None:
            return self._assign(trial)
        if limit is None and self._unaffordable_at == self.spending.spent:
            limit = nothing_affordable_reason(self.space.budget, self.spending.spent)
        self._target_met = limit is None
        judged = "the trial is" if self.target == 1 else f"all {self.target} trials are"
        is_exhausted = self._exhausted or self.target < self.target_asked_for
        finished = "the space is exhausted" if is_exhausted else f"{judged} drawn and judged"
        self.stop_reason = limit or finished
        return "done"

    def _reached_limit(self) -> str | None:
        # Interrupted trials were within the budget when their costs were attributed, so those costs must not stop them now.
        spent = PrefixSuffixSeconds() if self._interrupted else self.spending.spent
        return reached_limit(self.space.budget, self.elapsed, spent)

    def _next_trial(self) -> Trial | None:
        if self._interrupted:
            return self._trials[self._interrupted.pop(0)]
        promoted = self._rungs.promotion()
        if promoted is not None:
            return self._trials[promoted]
        while self.draw_count < self.target and not self._exhausted and self._unaffordable_at != self.spending.spent:
            self._failures.raise_if_reached()
            new = self._draw_trial()
            if new is not None and new.state == "running":
                return new
        return None

    def _draw_trial(self) -> Trial | None:
        """Makes and records one draw; None if the space is exhausted or nothing is affordable, which it then remembers."""
        spent = self.spending.spent
        new = self._draws.next_trial(spent, affordable_seconds(self.space.budget, spent, self._trials.values()))
        if isinstance(new, str):
            self._exhausted = new == "exhausted"
            self._unaffordable_at = spent if new == "too_expensive" else None
            return None
        new = _intern_pair_parts(new, self._pair_parts)
        trial = dataclasses.replace(new, started=self._clock(), ended=None if new.state == "running" else self._clock())
        self._journal.add(trial)
        self._record_trial(trial)
        self._failures.observe_draw(trial)
        return trial

    def _best_paused_if_none_completed(self) -> Trial | None:
        """The best paused trial, to be completed although it is not promoted; None if one is completed or none is paused.

        Its cost does not matter: only the limit of elapsed time prevents it.
        """
        if reached_limit(self.space.budget, self.elapsed, PrefixSuffixSeconds()) is not None:
            return None
        number = self._rungs.best_paused_if_none_completed()
        return None if number is None else self._trials[number]

    def _assign(self, trial: Trial) -> Assignment:
        if trial.state == "paused":
            trial = self._update_trial(trial, state="running")
        self._running[trial.number] = trial
        until = halving.next_stop_epoch(self.space.early_stop, trial)
        return Assignment(trial, until, until == trial.total_epochs)

    # --- the cost of running trials

    def attribute_expected_costs(self, number: int, costs: AttributedCosts) -> Trial:
        """Attributes to a trial the expected seconds of the stages that it is the first to need; they count as spent at once.

        Raises:
            KeyError: the trial is not running.
        """
        trial = self._running[number]
        if not any(costs.values()):
            return trial
        merged = {part: {**trial.attributed_costs.get(part, {}), **stages} for part, stages in costs.items()}
        self._running[number] = trial = self._update_trial(trial, attributed_costs=merged)
        return trial

    def attributed_costs(self, number: int) -> AttributedCosts:
        """The costs attributed to a trial so far."""
        return self._trials[number].attributed_costs

    def record_costs(self, number: int, seconds: Mapping[str, float]) -> None:
        """Replaces a trial's expected seconds by the recorded ones, before its segment ends; unrecorded stages cost nothing.

        Raises:
            KeyError: the trial is not running.
        """
        trial = self._running[number]
        costs = {part: {key: seconds[key] for key in keys if key in seconds} for part, keys in trial.attributed_costs.items()}
        self._running[number] = dataclasses.replace(trial, attributed_costs=costs)

    # --- the end of a segment

    def pause_at_rung(
        self,
        number: int,
        epoch: int,
        score: float,
        keys: Mapping[str, Any] | None = None,
        cost: Mapping[str, float] | None = None,
    ) -> Trial:
        """Records the score of a trial at a rung and pauses it there; the trial fails if the score is not finite.

        Args:
            epoch: of the rung; 0 for the score of its teacher.
            keys: stage -> key of its artifact so far, so that `keys_in_use` includes them.
            cost: its `marginal_seconds` so far.

        Raises:
            KeyError: the trial is not running.
            ValueError: the segment ends at another epoch.
        """
        trial = self._running[number]
        until = halving.next_stop_epoch(self.space.early_stop, trial)
        if epoch != until or epoch == trial.total_epochs:
            raise ValueError(f"trial {number} runs to epoch {until} of {trial.total_epochs} and reports epoch {epoch}")
        if not math.isfinite(score):
            return self.fail(number, f"{self._rung_metric(epoch)} is {score} at epoch {epoch}")
        self._failures.reset()
        kept: dict[str, Any] = {"keys": dict(keys or trial.keys), "cost": dict(cost or trial.cost)}
        if epoch == 0:
            return self._end_segment(trial, state="paused", teacher_score=float(score), **kept)
        return self._end_segment(trial, state="paused", epoch=epoch, scores={**trial.scores, epoch: float(score)}, **kept)

    def finish(
        self,
        number: int,
        metrics: Mapping[str, float],
        objectives: Mapping[str, float],
        keys: Mapping[str, Any],
        cost: Mapping[str, float],
    ) -> Trial:
        """Completes a trial after its full training; it fails if an objective is missing or not finite.

        Args:
            metrics: all metrics.
            objectives: metric -> value; at least those that the space optimises.
            keys: stage -> key of its artifact.
            cost: `seconds` and `marginal_seconds`.

        Raises:
            KeyError: the trial is not running.
        """
        trial = self._running[number]
        for metric, _ in self.space.objectives:
            if not math.isfinite(objectives.get(metric, math.nan)):
                return self.fail(number, f"the objective {metric} is {objectives.get(metric, 'missing')}")
        self._failures.reset()
        last = metrics.get(self._rung_metric(trial.total_epochs), math.nan)
        return self._end_segment(
            trial,
            state="completed",
            epoch=trial.total_epochs,
            scores={**trial.scores, trial.total_epochs: float(last)} if math.isfinite(last) else trial.scores,
            metrics={name: float(value) for name, value in metrics.items() if math.isfinite(value)},
            objectives={metric: float(objectives[metric]) for metric, _ in self.space.objectives},
            keys=dict(keys),
            cost={name: float(value) for name, value in cost.items()},
        )

    def fail(self, number: int, cause: str, stage: str = "") -> Trial:
        """Fails a trial.

        Args:
            cause: one line.
            stage: key of the stage that raised, if one did.

        Raises:
            KeyError: the trial is not running.
        """
        failed = self._end_segment(self._running[number], state="failed", cause=cause)
        self._failures.observe_failure(failed, stage)
        return failed

    # --- the end of a session

    def prune_paused(self) -> list[Trial]:
        """Prunes and returns the paused trials if `next` returned "done" because the target is met; else they stay paused."""
        paused = [trial for trial in self.trials() if trial.state == "paused"] if self._target_met else []
        cause = self._rungs.teacher_prune_cause
        return [self._update_trial(trial, state="pruned", ended=self._clock(), cause=cause(trial)) for trial in paused]

    def prune_and_close(self) -> list[Trial]:
        """Prunes as `prune_paused` does and ends the session, so that another driver may open the study.

        Running trials stay in that state: after the next `open`, `next` returns them again.
        """
        with self._lock:
            pruned = self.prune_paused()
            self._elapsed.save()
        return pruned

    def save_elapsed_if_due(self) -> None:
        """Saves the elapsed time, at most every 30 s; call it in the thread that calls `next`."""
        self._elapsed.save_if_due()

    # --- changes of a trial

    def _end_segment(self, trial: Trial, *, state: State, **changes: Any) -> Trial:
        ended = self._update_trial(trial, state=state, ended=None if state == "paused" else self._clock(), **changes)
        del self._running[trial.number]
        self._elapsed.save()
        return ended

    def _update_trial(self, trial: Trial, **changes: Any) -> Trial:
        changed = dataclasses.replace(trial, **changes)
        self._journal.save(changed)
        self._record_trial(changed)
        return changed

    def _record_trial(self, trial: Trial) -> None:
        """Passes a new or changed trial to everything that counts or ranks trials."""
        old = self._trials.get(trial.number)
        self._drawn += (trial.state != "duplicate") - (old is not None and old.state != "duplicate")
        self._rungs.update(old, trial)
        self._trials[trial.number] = trial
        self._draws.record_trial(trial)
        self.spending.record_trial(trial)

    def _rung_metric(self, epoch: int) -> str:
        return self.space.early_stop.metric_at(epoch) if self.space.early_stop else ""

    def _determine_target(self, trials: str | int | None) -> int:
        """The target of this session; writes it and the space to the journal."""
        notes = self._journal.notes()
        unfinished = any(trial.state in ("running", "paused") for trial in self._trials.values())
        met = "target" in notes and self.draw_count >= notes["target"]["trials"] and not unfinished
        target = _session_target(trials, self.space.budget.trials, notes.get("target"), met)
        self.target_asked_for = target["trials"]
        target["trials"] = min(target["trials"], self._most_draws())
        for name, value in {"space": self.space.content, "target": target}.items():
            if notes.get(name) != value:
                self._journal.write_note(name, value)
        return target["trials"]

    def _most_draws(self) -> int:
        """How many trials there can be: those there are, and one for each draw of a finite space that was never made."""
        size = self.space.draw_count()
        if size is None:
            return int(10**MAX_TARGET_DIGITS)
        counted = [trial for trial in self._trials.values() if trial.state != "duplicate"]
        return len(counted) + max(0, size - len({canonical(trial.params) for trial in self._trials.values()}))

    def _increase_target_to(self, trials: int) -> None:
        self.target = max(self.target, trials)
        self._journal.write_note("target", {**self._journal.notes()["target"], "trials": self.target})


class _ElapsedTime:
    """The seconds that searches of a study have run, over all resumes.

    Args:
        clock: returns seconds.
        before: seconds of earlier sessions.
        save: writes the seconds to the journal.
    """

    def __init__(self, clock: Callable[[], float], before: float, save: Callable[[float], None]) -> None:
        self._clock, self._began = clock, clock()
        self._before = self._saved = before
        self._save = save

    @property
    def seconds(self) -> float:
        return self._before + self._clock() - self._began

    def save(self) -> None:
        self._saved = self.seconds
        self._save(self._saved)

    def save_if_due(self) -> None:
        if self.seconds - self._saved >= SAVE_EVERY:
            self.save()


class _FailureLimit:
    """Counts failures since the last success: a search stops after ten in a row that have different causes.

    Trials that fail because of the same stage count as one failure. Invalid pairs cost nothing, so they count only until the
    first valid draw.

    Args:
        trials: of earlier sessions.
    """

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._any_valid = any(trial.state != "failed" for trial in trials)
        self._reasons: set[str] = set()
        self._failed: list[Trial] = []

    def observe_draw(self, trial: Trial) -> None:
        """Counts a new draw that has failed, which means that it is no valid pair."""
        if not self._any_valid and trial.state == "failed":
            self.observe_failure(trial)
        elif not self._any_valid:
            self._any_valid = True
            self.reset()

    def observe_failure(self, trial: Trial, stage: str = "") -> None:
        """Counts a failed trial; `stage` is the key of the stage that raised, if one did."""
        self._reasons.add(stage or f"trial {trial.number}")
        self._failed.append(trial)

    def reset(self) -> None:
        """Starts counting again after a success."""
        self._reasons.clear()
        self._failed.clear()

    def raise_if_reached(self) -> None:
        """Raises `SearchStopped` if the limit of ten failures in a row is reached."""
        if len(self._reasons) >= MAX_FAILURES:
            raise too_many_failures_error(self._failed)


def too_many_failures_error(trials: list[Trial]) -> SearchStopped:
    """The error with which a search stops after these failed trials; it names the cause of the last one."""
    last = trials[-1]
    return SearchStopped(f"{len(trials)} trials failed one after the other; the last one, {last.number}: {last.cause}")


def _intern_pair_parts(trial: Trial, known: dict[str, Any]) -> Trial:
    """The same trial, with the parts of its pair (such as its data) that equal a known one replaced by it, to save memory.

    Args:
        known: JSON text -> part; new parts are added.
    """
    parts = {name: known.setdefault(json.dumps(part), part) for name, part in trial.pair.items()}
    return dataclasses.replace(trial, pair=parts)


def _validated_target_text(trials: str | int | None) -> str:
    """The value of ``--trials`` as text, empty for None.

    Raises:
        UserError: it is neither a number nor a number after ``+``.
    """
    text = "" if trials is None else str(trials)
    if text and not re.fullmatch(rf"\+?[1-9][0-9]{{0,{MAX_TARGET_DIGITS - 1}}}", text):
        raise UserError(f"{shown(text)} is no number of trials", "--trials", "Write 50, or +50 for fifty more.")
    return text


def _session_target(trials: str | int | None, budget: int, noted: Mapping[str, Any] | None, met: bool) -> dict[str, int]:
    """The target of a session and the budget that it comes from, in the form in which the journal keeps them.

    `+50` raises a target that is met. An unmet target stays as it is, so that repeating the same command after a kill does not
    raise it twice. Without a number, a study keeps its target until the budget in the space's file changes.

    Args:
        trials: ``50``, ``"50"``, ``"+50"`` or None.
        budget: trials in the space's file.
        noted: what this function returned when the study was last opened; None for a new study.
        met: whether that target is met and every trial has ended.

    Raises:
        UserError: `trials` is neither a number nor a number after ``+``.
    """
    text = _validated_target_text(trials)
    if not text:
        kept = noted is not None and noted["budget"] == budget
        return {"trials": noted["trials"] if noted and kept else budget, "budget": budget}
    if noted is None or not text.startswith("+"):
        return {"trials": int(text), "budget": budget}
    return {"trials": noted["trials"] + (int(text) if met else 0), "budget": budget}


def _check_same_space(noted: Mapping[str, Any] | None, space: Space, name: str) -> None:
    """Refuses to resume a study with another space than it was begun with.

    Args:
        noted: the space's document in the journal; None for a new study.

    Raises:
        UserError: names up to five differences.
    """
    changed = [] if noted is None else space.differences(noted)
    if changed:
        more = f"; and {len(changed) - MOST_DIFFERENCES} more" if len(changed) > MOST_DIFFERENCES else ""
        raise UserError(
            f"the study {name!r} was begun with another space: {'; '.join(changed[:MOST_DIFFERENCES])}{more}",
            space.source,
            "Give this search another --name, or undo the change.",
        )


def _note_warm_start(journal: Journal, home: Path, space: Space, name: str, other: str) -> None:
    noted = journal.notes().get(warm_start.NOTE, {})
    journal.write_note(warm_start.NOTE, warm_start.add_results_of(other, noted, home, space, name))
