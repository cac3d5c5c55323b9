"""Asynchronous successive halving by promotion: which paused trial goes on, decided from scores alone.

At a rung (student epochs) a trial pauses. Whenever somebody asks, the best 1/reduction of those that reached a rung may go on
to the next, highest rung first. Nothing is stopped and nobody waits for a full bracket. Before the first of them teachers may
be judged: below the best share of those that were, no student is trained.

Source: Li, Jamieson, Rostamizadeh, Gonina, Ben-tzur, Hardt, Recht, Talwalkar, "A System for Massively Parallel Hyperparameter
Tuning" (MLSys 2020), algorithm 2 (get_job).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ktray.fingerprint import canonical
from ktray.search.document import EarlyStop, TeacherStop
from ktray.search.trial import Trial

Place = tuple[float, int]
"""(loss, number): smaller is better, the earlier draw first where losses are equal."""


def ladder(stop: EarlyStop | None, epochs: int) -> tuple[int, ...]:
    """Where a student of so many epochs pauses; the last entry is its full training."""
    below = stop.rungs if stop else ()
    return (*(rung for rung in below if rung < epochs), epochs)


def next_rung(stop: EarlyStop | None, trial: Trial) -> int:
    """Epoch to which a trial goes on from where it is; 0 if its teacher is to be judged first.

    Raises:
        ValueError: it already had its full training.
    """
    if stop and stop.teacher and trial.pair.get("teacher") and trial.teacher_score is None and not trial.scores:
        return 0
    ahead = [rung for rung in ladder(stop, trial.epochs) if rung > trial.epoch]
    if not ahead:
        raise ValueError(f"trial {trial.number} had all of its {trial.epochs} epochs")
    return ahead[0]


@dataclass
class _Rung:
    """Who came to a rung and did not fail later, who waits there, and how many failed later; both lists best first."""

    reached: list[Place] = field(default_factory=list)
    waiting: list[Place] = field(default_factory=list)
    failed: int = 0


class Teachers:
    """Teachers that were judged, and trials that wait for theirs to be good enough.

    Teachers are counted, not trials: many trials on one good teacher leave no other teacher less of a chance. The first one
    that is judged is the best so far and gets students at once; whoever comes later must belong to the best share.
    """

    def __init__(self, stop: TeacherStop | None) -> None:
        self._stop = stop
        self._sign = 1 if stop and stop.mode == "min" else -1
        self._of: dict[int, str] = {}
        self._judged: list[tuple[float, str]] = []
        self._waiting: list[Place] = []

    def update(self, trial: Trial, change: int) -> None:
        """A trial is (1) or is no longer (-1) as it is."""
        if self._stop is None or trial.teacher_score is None:
            return
        loss = self._sign * trial.teacher_score
        judged = (loss, self._name(trial))
        position = bisect_left(self._judged, judged)
        if self._judged[position : position + 1] != [judged]:  # what was judged once stays judged
            self._judged.insert(position, judged)
        if trial.state == "paused" and trial.waits_for_teacher:
            _move(self._waiting, (loss, trial.number), change)

    def promotion(self) -> int | None:
        """Number of the trial with the best teacher of those that wait, if that belongs to the best."""
        if not self._waiting or self.rank(self._waiting[0][0]) >= self.places():
            return None
        return self._waiting[0][1]

    def hope(self) -> int | None:
        """Number of the trial with the best teacher of those that wait."""
        return self._waiting[0][1] if self._waiting else None

    def rank(self, loss: float) -> int:
        """How many teachers are better."""
        return bisect_left(self._judged, (loss, ""))

    def places(self) -> int:
        """How many teachers get students."""
        return math.ceil(len(self._judged) * self._stop.share - 1e-9) if self._stop else 0

    def cause(self, trial: Trial) -> str:
        """Why a trial got no student."""
        assert self._stop is not None
        assert trial.teacher_score is not None
        place, many = self.rank(self._sign * trial.teacher_score) + 1, len(self._judged)
        return f"its teacher has place {place} of {many} by {self._stop.metric} ({trial.teacher_score:.4f}): no student"

    def _name(self, trial: Trial) -> str:
        """Which teacher a trial has, by its slice of the pair."""
        if trial.number not in self._of:
            self._of[trial.number] = canonical({name: trial.pair.get(name) for name in ("data", "teacher")})
        return self._of[trial.number]


def _move(places: list[Place], place: Place, change: int) -> None:
    if change > 0:
        insort(places, place)
    else:
        del places[bisect_left(places, place)]


class Standings:
    """Who stands where on the ladder; kept up to date trial by trial, so that asking costs the same with ten thousand."""

    def __init__(self, stop: EarlyStop | None, trials: Iterable[Trial] = ()) -> None:
        self._stop = stop
        self._sign = _sign(stop)
        self.teachers = Teachers(stop.teacher if stop else None)
        self._rungs: dict[int, _Rung] = {}
        self._trials: dict[int, Trial] = {}
        self._completed = 0
        for trial in trials:
            self.update(trial)

    def update(self, trial: Trial) -> None:
        """A trial is new or has changed."""
        before = self._trials.get(trial.number)
        if before is not None:
            self._count(before, -1)
        self._trials[trial.number] = trial
        self._count(trial, 1)

    def _count(self, trial: Trial, change: int) -> None:
        self._completed += change * (trial.state == "completed")
        self.teachers.update(trial, change)
        for epoch, score in trial.scores.items():
            rung, place = self._rungs.setdefault(epoch, _Rung()), (self._sign * score, trial.number)
            if trial.state == "failed":
                rung.failed += change
                continue
            lists = [rung.reached, rung.waiting] if trial.state == "paused" and trial.epoch == epoch else [rung.reached]
            for places in lists:
                _move(places, place, change)

    def promotion(self) -> int | None:
        """Number of the paused trial that goes on now, or None.

        A trial that failed later keeps its part in the count of a rung but leaves its place among the best to the next one. One
        that was given up (`pruned`) keeps its place: who comes later must beat it.
        """
        for epoch in reversed(self._stop.rungs if self._stop else ()):
            rung = self._rungs.get(epoch)
            if rung is not None and rung.waiting and self._stop is not None:
                places = (len(rung.reached) + rung.failed) // self._stop.reduction
                if bisect_left(rung.reached, rung.waiting[0]) < places:
                    return rung.waiting[0][1]
        return self.teachers.promotion()

    def last_hope(self) -> int | None:
        """The paused trial that goes on when nothing is due and none was completed: so that every search ends with a result."""
        waiting = [epoch for epoch, rung in self._rungs.items() if rung.waiting]
        if self._completed:
            return None
        return self._rungs[max(waiting)].waiting[0][1] if waiting else self.teachers.hope()


def best_first(stop: EarlyStop | None, trials: Sequence[Trial], rung: int) -> list[Trial]:
    """Trials by their score at a rung, the earlier draw first where scores are equal."""
    return sorted(trials, key=lambda trial: (_sign(stop) * trial.scores[rung], trial.number))


def _sign(stop: EarlyStop | None) -> int:
    return 1 if stop and stop.mode == "min" else -1
