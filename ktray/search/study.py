"""A study: which trial runs next, and what became of each. All of it is in the journal, so that a killed search goes on.

One driver asks `next`, runs what it is told (a leg of a trial: from where it paused to its next rung) and tells the outcome
by `report`, `finish` or `fail`, from one thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from ktray.errors import UserError
from ktray.search import halving, ranking, space_file, trial_target
from ktray.search import warm_start as warm
from ktray.search.budget import Charges, Spending, affordable_seconds, too_little, used_up
from ktray.search.draws import DrawSource, SampledDraws
from ktray.search.elapsed import ElapsedTime
from ktray.search.failure_limit import FailureLimit
from ktray.search.journal import Journal, held
from ktray.search.sampler import DrawCost, Quote
from ktray.search.space import Space
from ktray.search.trial import Parts, State, Trial


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A leg to run: the trial's student up to the end of epoch `until`; `final` if that is its full training."""

    trial: Trial
    until: int
    final: bool


class Study:
    """The one driver of a study; see `open`.

    Attributes:
        purse: what its stages have cost.
        reason: why `next` said "done", in a few words; None before.
        target: draws that this session makes in all, duplicates not counted.
    """

    def __init__(
        self, journal: Journal, space: Space, clock: Callable[[], float], trials: str | int | None, draws: DrawSource
    ) -> None:
        self.space = space
        self.reason: str | None = None
        self._journal, self._clock, self._draws = journal, clock, draws
        notes = journal.notes()
        self._watch = ElapsedTime(clock, float(notes.get("spent", 0.0)), lambda seconds: journal.note("spent", seconds))
        self._parts, self.purse = Parts(), Spending()
        self._trials: dict[int, Trial] = {}  # in the order of their numbers
        self._standings, self._counted = halving.RungScores(space.early_stop), 0
        for trial in warm.evidence(notes.get(warm.NOTE, {})):
            draws.told(trial)
        for trial in journal.trials():
            self._enter(self._parts.share(trial))
        self._live: dict[int, Trial] = {}
        self._orphans = [trial.number for trial in self.trials() if trial.state == "running"]
        self._failures, self._concurrent = FailureLimit(self.trials()), space.budget.concurrent
        self._exhausted = self._over = False
        self._dear: DrawCost | None = None  # what was spent when no draw could be paid any more
        self._unlock = contextlib.ExitStack()
        self.target = trial_target.agreed(journal, space, trials, self.drawn, self._open())

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
        """Begins a study or goes on with it. Trials that a killed driver left running come first out of `next`.

        Args:
            name: the study's name, if not the space's.
            clock: seconds.
            trials: how many draws in all, or ``+50`` more than the last target, once that is met; None: the space's budget.
            draws: where new trials come from, if not from the sampler.
            warm_start: another study of this home, whose results the sampler learns from; noted, and not to be named again.
            retry: draw the pairs of failed trials again, as new trials, before all others.

        Raises:
            UserError: another driver has the study, it was begun with another space, or the name or `trials` is no such thing.
        """
        name = name or space.name
        try:
            space_file.check_name(name)
        except ValueError as error:
            raise UserError(str(error), "--name") from error
        trial_target.checked(trials)
        with contextlib.ExitStack() as unlock:
            unlock.enter_context(held(home, name))
            journal = Journal(home, name, space)
            trial_target.same_space(journal.notes().get("space"), space, name)
            if warm_start:
                journal.note(warm.NOTE, warm.added(journal.notes().get(warm.NOTE, {}), home, space, name, warm_start))
            study = cls(journal, space, clock, trials, draws or SampledDraws(space))
            if retry:
                study.target = trial_target.raised(journal, max(study.target, study.drawn + study._draws.retry()))
            study._unlock = unlock.pop_all()
        return study

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock.close()

    def trials(self, since: int = 0) -> list[Trial]:
        """All trials from number `since` on, in the order of their draws."""
        return [self._trials[number] for number in range(since, len(self._trials))]

    def ask_prices(self, quote: Quote) -> None:
        """From now on `quote` tells what a draw would cost."""
        self._draws.ask_prices(quote)

    @property
    def drawn(self) -> int:
        """Draws that count: all but duplicates."""
        return self._counted

    @property
    def spent(self) -> float:
        """Seconds that searches of this study ran, over all resumes."""
        return self._watch.seconds

    def best(self, pareto: bool = False) -> list[Trial]:
        """Completed trials, best first; with `pareto` those that no other beats in every objective."""
        ranked = ranking.front if pareto else ranking.ranked
        return ranked(self.trials(), self.space.objectives)

    def next(self) -> Assignment | Literal["wait", "done"]:
        """What to run now; "wait" for results, "done" when no result can bring more.

        A trial that is due for promotion goes before a new draw. A draw that equals an earlier trial is recorded and skipped.

        Raises:
            StoppedEarly: ten trials in a row failed, or the disk is full.
        """
        self._failures.heed()
        if len(self._live) >= self._concurrent:
            return "wait"
        # Those that a killed driver left were admitted when they were charged: their own reservation does not bar them.
        spent = DrawCost() if self._orphans else self.purse.spent
        limit = used_up(self.space.budget, self.spent, spent)
        trial = self._coming() if limit is None else None
        if trial is None and self._live:
            return "wait"
        if trial is None and used_up(self.space.budget, self.spent, DrawCost()) is None:  # no hours are too few for one result
            hope = self._standings.last_hope()
            trial = None if hope is None else self._trials[hope]
        if trial is not None:
            return self._assign(trial)
        if limit is None and self._dear == self.purse.spent:
            limit = too_little(self.space.budget, self.purse.spent)
        self._over = limit is None
        settled = "the space is exhausted" if self._exhausted else f"all {self.target} trials are drawn and judged"
        self.reason = limit or settled
        return "done"

    def _coming(self) -> Trial | None:
        if self._orphans:
            return self._trials[self._orphans.pop(0)]
        promoted = self._standings.promotion()
        due = None if promoted is None else self._trials[promoted]
        while due is None and self.drawn < self.target and not self._exhausted and self._dear != self.purse.spent:
            self._failures.heed()
            spent = self.purse.spent
            new = self._draws.following(spent, affordable_seconds(self.space.budget, spent, self._trials.values()))
            if new is None or new == "dear":
                self._exhausted, self._dear = new is None, spent if new else None
                break
            new = self._parts.share(new)
            trial = dataclasses.replace(new, started=self._clock(), ended=None if new.state == "running" else self._clock())
            self._journal.add(trial)
            self._enter(trial)
            self._failures.drawn(trial)
            due = trial if trial.state == "running" else None
        return due

    def _assign(self, trial: Trial) -> Assignment:
        if trial.state == "paused":
            trial = self._write(trial, state="running")
        self._live[trial.number] = trial
        until = halving.next_rung(self.space.early_stop, trial)
        return Assignment(trial, until, until == trial.epochs)

    def charge(self, number: int, charges: Charges) -> Trial:
        """What a trial is the first to need, before it is there; it counts as spent from now on.

        Raises:
            KeyError: the trial does not run.
        """
        trial = self._live[number]
        if not any(charges.values()):
            return trial
        merged = {part: {**trial.charges.get(part, {}), **stages} for part, stages in charges.items()}
        self._live[number] = trial = self._write(trial, charges=merged)
        return trial

    def charged(self, number: int) -> Charges:
        """What a trial is charged so far."""
        return self._trials[number].charges

    def paid(self, number: int, seconds: Mapping[str, float]) -> None:
        """What stages of a trial took, to be told before what became of it; what has no record was not paid for.

        Raises:
            KeyError: the trial does not run.
        """
        trial = self._live[number]
        charges = {part: {key: seconds[key] for key in keys if key in seconds} for part, keys in trial.charges.items()}
        self._live[number] = dataclasses.replace(trial, charges=charges)

    def report(
        self,
        number: int,
        epoch: int,
        score: float,
        keys: Mapping[str, Any] | None = None,
        cost: Mapping[str, float] | None = None,
    ) -> Trial:
        """The score of a trial at its rung, where it pauses; not finite, it fails. At epoch 0 it is that of its teacher.

        Args:
            keys: stage -> key of what the trial rests on so far, so that `keys_in_use` keeps it.
            cost: `marginal_seconds` that it has added so far.

        Raises:
            KeyError: the trial does not run.
            ValueError: it was to run to another epoch.
        """
        trial = self._live[number]
        until = halving.next_rung(self.space.early_stop, trial)
        if epoch != until or epoch == trial.epochs:
            raise ValueError(f"trial {number} runs to epoch {until} of {trial.epochs} and reports epoch {epoch}")
        if not math.isfinite(score):
            return self.fail(number, f"{self._rung_metric(epoch)} is {score} at epoch {epoch}")
        self._failures.over()
        kept: dict[str, Any] = {"keys": dict(keys or trial.keys), "cost": dict(cost or trial.cost)}
        if epoch == 0:
            return self._settle(trial, state="paused", teacher_score=float(score), **kept)
        return self._settle(trial, state="paused", epoch=epoch, scores={**trial.scores, epoch: float(score)}, **kept)

    def finish(
        self,
        number: int,
        metrics: Mapping[str, float],
        objectives: Mapping[str, float],
        keys: Mapping[str, Any],
        cost: Mapping[str, float],
    ) -> Trial:
        """A trial at its full budget. It fails if an objective is missing or not finite.

        Args:
            metrics: all that was measured.
            objectives: metric -> value; at least what the space optimises.
            keys: stage -> key of its artifact.
            cost: `seconds` and `marginal_seconds`.

        Raises:
            KeyError: the trial does not run.
        """
        trial = self._live[number]
        for metric, _ in self.space.objectives:
            if not math.isfinite(objectives.get(metric, math.nan)):
                return self.fail(number, f"the objective {metric} is {objectives.get(metric, 'missing')}")
        self._failures.over()
        last = metrics.get(self._rung_metric(), math.nan)
        return self._settle(
            trial,
            state="completed",
            epoch=trial.epochs,
            scores={**trial.scores, trial.epochs: float(last)} if math.isfinite(last) else trial.scores,
            metrics={name: float(value) for name, value in metrics.items() if math.isfinite(value)},
            objectives={metric: float(objectives[metric]) for metric, _ in self.space.objectives},
            keys=dict(keys),
            cost={name: float(value) for name, value in cost.items()},
        )

    def fail(self, number: int, cause: str, stage: str = "") -> Trial:
        """A trial that cannot go on; `stage` is the key of the stage that raised, if one did.

        Raises:
            KeyError: the trial does not run.
        """
        failed = self._settle(self._live[number], state="failed", cause=cause)
        self._failures.failed(failed, stage)
        return failed

    def prune(self) -> list[Trial]:
        """If `next` said "done" and time is left, what is paused is pruned (and returned); else it stays."""
        paused = [trial for trial in self.trials() if trial.state == "paused"] if self._over else []
        cause = self._standings.teachers.cause
        return [self._write(trial, state="pruned", ended=self._clock(), cause=cause(trial)) for trial in paused]

    def close(self) -> list[Trial]:
        """Prunes as `prune` does and ends the session: another driver may open the study now.

        Trials that run are left running: the next `open` hands them out again.
        """
        with self._unlock:
            pruned = self.prune()
            self._watch.note()
        return pruned

    def tick(self) -> None:
        """Notes how long the search has run, at most every 30 s; from the thread that calls `next`."""
        self._watch.tick()

    def _open(self) -> bool:
        return any(trial.state in ("running", "paused") for trial in self._trials.values())

    def _rung_metric(self, epoch: int = 1) -> str:
        return self.space.early_stop.judged_by(epoch) if self.space.early_stop else ""

    def _settle(self, trial: Trial, *, state: State, **changes: Any) -> Trial:
        ended = None if state == "paused" else self._clock()
        settled = self._write(trial, state=state, ended=ended, **changes)
        del self._live[trial.number]
        self._watch.note()
        return settled

    def _write(self, trial: Trial, **changes: Any) -> Trial:
        changed = dataclasses.replace(trial, **changes)
        self._journal.save(changed)
        self._enter(changed)
        return changed

    def _enter(self, trial: Trial) -> None:
        """All who keep count hear of a trial that is new or has changed."""
        old = self._trials.get(trial.number)
        self._counted += (trial.state != "duplicate") - (old is not None and old.state != "duplicate")
        self._standings.tell(old, trial)
        self._trials[trial.number] = trial
        self._draws.told(trial)
        self.purse.update(trial)
