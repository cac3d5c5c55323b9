"""A study: which trial runs next, and what became of each. All of it is in the ledger, so that a killed search goes on.

One driver asks `next`, runs what it is told (a segment of a trial: from where it paused to its next rung) and tells the outcome
by `report`, `finish` or `fail`, from one thread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, Self

from ktray.errors import StoppedEarly, UserError
from ktray.search import document, ranking, rungs, target
from ktray.search.draws import Draws
from ktray.search.ledger import Ledger, held
from ktray.search.ledger import names as studies
from ktray.search.ledger import read as read_ledger
from ktray.search.space import Goal, Space, check_unchanged
from ktray.search.trial import State, Trial

FAILURES = 10  # so many in a row stop a search
NOTE_EVERY = 30.0  # seconds that a kill -9 may take from `stop_after`


class Source(Protocol):
    """Where new trials come from."""

    def following(self, trials: Sequence[Trial]) -> Trial | None:
        """The next trial after these: to run, or settled already; None if there is no other."""


@dataclasses.dataclass(frozen=True)
class Assignment:
    """A segment to run: the trial's student up to the end of epoch `until`; `final` if that is its full training."""

    trial: Trial
    until: int
    final: bool


@dataclasses.dataclass(frozen=True)
class History:
    """What a study holds, for those who only read."""

    name: str
    space: Space
    trials: list[Trial]
    target: int
    spent: float

    @property
    def objectives(self) -> tuple[Goal, ...]:
        return self.space.objectives


def read(home: Path, name: str) -> History:
    """A study as it is now, also while a search runs it.

    Raises:
        UserError: there is no such study, or it was never begun.
    """
    notes, trials = read_ledger(home, name)
    if "space" not in notes or "target" not in notes:  # a driver that was killed in its first moment
        raise UserError(f"the study {name!r} was never begun", str(home), "Search it again.")
    space = Space.of(notes["space"], name)
    return History(name, space, trials, notes["target"]["trials"], notes.get("spent", 0.0))


def keys_in_use(home: Path) -> set[str]:
    """Keys that the trials of all studies of a home rest on, paused ones included."""
    return {key for name in studies(home) for trial in read_ledger(home, name)[1] for key in trial.artifacts}


class Study:
    """The one driver of a study; see `open`.

    Attributes:
        reason: why `next` said "done", in a few words; None before.
        target: draws that this session makes in all, duplicates not counted.
    """

    def __init__(
        self, ledger: Ledger, space: Space, clock: Callable[[], float], trials: str | int | None, draws: Source
    ) -> None:
        self.space = space
        self.reason: str | None = None
        self._ledger, self._clock, self._began = ledger, clock, clock()
        self._trials: dict[int, Trial] = {}  # in the order of their numbers
        self._standings, self._counted = rungs.Standings(space.early_stop), 0
        for trial in ledger.trials():
            self._enter(trial)
        notes = ledger.notes()
        self._spent_before = self._spent_noted = float(notes.get("spent", 0.0))
        self._draws = draws
        self._live: dict[int, Trial] = {}
        self._orphans = [trial.number for trial in self.trials() if trial.state == "running"]
        self._failures, self._concurrent = 0, space.budget.concurrent
        self._exhausted = self._over = False
        self._unlock = contextlib.ExitStack()
        met = "target" in notes and self.drawn >= notes["target"]["trials"] and not self._open()
        noted = target.settled(trials, space.budget.trials, notes.get("target"), met)
        self.target = noted["trials"]
        for name, value in {"space": space.document.model_dump(mode="json"), "target": noted}.items():
            if notes.get(name) != value:
                ledger.note(name, value)

    @classmethod
    def open(
        cls,
        home: Path,
        space: Space,
        name: str | None = None,
        clock: Callable[[], float] = time.time,
        trials: str | int | None = None,
        concurrent: int | None = None,
        draws: Source | None = None,
    ) -> Study:
        """Begins a study or goes on with it. Trials that a killed driver left running come first out of `next`.

        Args:
            name: the study's name, if not the space's.
            clock: seconds.
            trials: how many draws in all, or ``+50`` more than the last target, once that is met; None: the space's budget.
            concurrent: how many trials run at once; None: the space's budget.
            draws: where new trials come from, if not from the sampler.

        Raises:
            UserError: another driver has the study, it was begun with another space, or the name or `trials` is no such thing.
        """
        name = name or space.name
        try:
            document.check_name(name)
        except ValueError as error:
            raise UserError(str(error), "--name") from error
        target.checked(trials)
        with contextlib.ExitStack() as unlock:
            unlock.enter_context(held(home, name))
            ledger = Ledger(home, name, space)
            check_unchanged(ledger.notes().get("space"), space, name)
            study = cls(ledger, space, clock, trials, draws or Draws(space))
            study._unlock, study._concurrent = unlock.pop_all(), concurrent or space.budget.concurrent
        return study

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._unlock.close()

    def trials(self) -> list[Trial]:
        """All trials in the order of their draws."""
        return list(self._trials.values())

    @property
    def drawn(self) -> int:
        """Draws that count: all but duplicates."""
        return self._counted

    @property
    def spent(self) -> float:
        """Seconds that searches of this study ran, over all resumes."""
        return self._spent_before + self._clock() - self._began

    def best(self, pareto: bool = False) -> list[Trial]:
        """Completed trials, best first; with `pareto` those that no other beats in every objective."""
        ranked = ranking.front if pareto else ranking.ranked
        return ranked(self.trials(), self.space.objectives)

    def next(self) -> Assignment | Literal["wait", "done"]:
        """What to run now; "wait" for results, "done" when no result can bring more.

        A trial that is due for promotion goes before a new draw. A draw that equals an earlier trial is recorded and skipped.

        Raises:
            StoppedEarly: ten trials in a row failed.
        """
        self._stop_if_all_fails()
        if len(self._live) >= self._concurrent:
            return "wait"
        limit = self.space.budget.stop_after
        in_time = limit is None or self.spent < limit
        trial = self._coming() if in_time else None
        if trial is None and self._live:
            return "wait"
        if trial is None and in_time:
            trial = rungs.last_hope(self.space.early_stop, self.trials())
        if trial is not None:
            return self._assign(trial)
        self._over = in_time
        settled = "the space is exhausted" if self._exhausted else f"all {self.target} trials are drawn and judged"
        self.reason = settled if in_time else f"stop_after ({limit:g} s) is used up"
        return "done"

    def _coming(self) -> Trial | None:
        if self._orphans:
            return self._trials[self._orphans.pop(0)]
        promoted = self._standings.promotion()
        due = None if promoted is None else self._trials[promoted]
        while due is None and self.drawn < self.target and not self._exhausted:
            self._stop_if_all_fails()
            new = self._draws.following(self.trials())
            if new is None:
                self._exhausted = True
                break
            trial = dataclasses.replace(new, started=self._clock(), ended=None if new.state == "running" else self._clock())
            self._ledger.add(trial)
            self._enter(trial)
            self._failures += trial.state == "failed"
            due = trial if trial.state == "running" else None
        return due

    def _assign(self, trial: Trial) -> Assignment:
        if trial.state == "paused":
            trial = self._write(trial, state="running")
        self._live[trial.number] = trial
        until = rungs.next_rung(self.space.early_stop, trial)
        return Assignment(trial, until, until == trial.epochs)

    def report(
        self,
        number: int,
        epoch: int,
        score: float,
        keys: Mapping[str, Any] | None = None,
        cost: Mapping[str, float] | None = None,
    ) -> Trial:
        """The score of a trial at its rung, where it pauses; not finite, it fails.

        Args:
            keys: stage -> key of what the trial rests on so far, so that `keys_in_use` keeps it.
            cost: `marginal_seconds` that it has added so far.

        Raises:
            KeyError: the trial does not run.
            ValueError: it was to run to another epoch.
        """
        trial = self._live[number]
        until = rungs.next_rung(self.space.early_stop, trial)
        if epoch != until or epoch == trial.epochs:
            raise ValueError(f"trial {number} runs to epoch {until} of {trial.epochs} and reports epoch {epoch}")
        if not math.isfinite(score):
            return self.fail(number, f"{self._rung_metric()} is {score} at epoch {epoch}")
        self._failures = 0
        kept = {"keys": dict(keys or trial.keys), "cost": dict(cost or trial.cost)}
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
        self._failures = 0
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

    def fail(self, number: int, cause: str) -> Trial:
        """A trial that cannot go on.

        Raises:
            KeyError: the trial does not run.
        """
        self._failures += 1
        return self._settle(self._live[number], state="failed", cause=cause)

    def prune(self) -> list[Trial]:
        """If `next` said "done" and time is left, what is paused is pruned (and returned); else it stays."""
        paused = [trial for trial in self.trials() if trial.state == "paused"] if self._over else []
        return [self._write(trial, state="pruned", ended=self._clock()) for trial in paused]

    def close(self) -> list[Trial]:
        """Prunes as `prune` does and ends the session: another driver may open the study now.

        Trials that run are left running: the next `open` hands them out again.
        """
        with self._unlock:
            pruned = self.prune()
            self._note_spent()
        return pruned

    def tick(self) -> None:
        """Notes how long the search has run, at most every 30 s; from the thread that calls `next`."""
        if self.spent - self._spent_noted >= NOTE_EVERY:
            self._note_spent()

    def _note_spent(self) -> None:
        self._spent_noted = self.spent
        self._ledger.note("spent", self._spent_noted)

    def _open(self) -> bool:
        return any(trial.state in ("running", "paused") for trial in self._trials.values())

    def _rung_metric(self) -> str:
        return self.space.early_stop.metric if self.space.early_stop else ""

    def _stop_if_all_fails(self) -> None:
        if self._failures >= FAILURES:
            failed = [trial for trial in self._trials.values() if trial.state == "failed"]
            last = max(failed, key=lambda trial: (trial.ended or 0.0, trial.number))
            raise StoppedEarly(f"{self._failures} trials failed one after the other; the last one, {last.number}: {last.cause}")

    def _settle(self, trial: Trial, *, state: State, **changes: Any) -> Trial:
        del self._live[trial.number]
        ended = None if state == "paused" else self._clock()
        settled = self._write(trial, state=state, ended=ended, **changes)
        self._note_spent()
        return settled

    def _write(self, trial: Trial, **changes: Any) -> Trial:
        changed = dataclasses.replace(trial, **changes)
        self._ledger.save(changed)
        self._enter(changed)
        return changed

    def _enter(self, trial: Trial) -> None:
        old = self._trials.get(trial.number)
        self._counted += (trial.state != "duplicate") - (old is not None and old.state != "duplicate")
        self._standings.tell(old, trial)
        self._trials[trial.number] = trial
