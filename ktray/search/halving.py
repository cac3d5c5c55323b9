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

from ktray.fingerprint import fingerprint
from ktray.search.space_file import EarlyStop, TeacherStop
from ktray.search.trial import Trial

Place = tuple[float, int]
"""(loss, number): smaller is better, the earlier draw first where losses are equal."""


def rung_epochs(stop: EarlyStop | None, epochs: int) -> tuple[int, ...]:
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
    ahead = [rung for rung in rung_epochs(stop, trial.epochs) if rung > trial.epoch]
    if not ahead:
        raise ValueError(f"trial {trial.number} had all of its {trial.epochs} epochs")
    return ahead[0]


class TeacherRung:
    """Teachers that were judged, and trials that wait for theirs to be good enough.

    Teachers are counted, not trials: many trials on one good teacher leave no other teacher less of a chance. The first one
    that is judged is the best so far and gets students at once; whoever comes later must belong to the best share.
    """

    def __init__(self, stop: TeacherStop | None) -> None:
        self._stop = stop
        self._sign = 1 if stop and stop.mode == "min" else -1
        self._judged: list[tuple[float, str]] = []
        self._waiting: list[Place] = []

    def update(self, old: Trial | None, new: Trial) -> None:
        """A trial is `new`, and was `old` when it was told the last time."""
        if self._stop is None:
            return
        if new.teacher_score is not None and (old is None or old.teacher_score is None):  # once judged it stays judged
            judged = (self._sign * new.teacher_score, _teacher(new))
            position = bisect_left(self._judged, judged)
            if self._judged[position : position + 1] != [judged]:
                self._judged.insert(position, judged)
        _move(self._waiting, self._waits(old), self._waits(new))

    def promotion(self) -> int | None:
        """Number of the trial with the best teacher of those that wait, if that belongs to the best."""
        if not self._waiting or self.rank(self._waiting[0][0]) >= self.places():
            return None
        return self._waiting[0][1]

    def best_waiting(self) -> int | None:
        """Number of the trial with the best teacher of those that wait."""
        return self._waiting[0][1] if self._waiting else None

    def rank(self, loss: float) -> int:
        """How many teachers are better."""
        return bisect_left(self._judged, (loss, ""))

    def places(self) -> int:
        """How many teachers get students."""
        return math.ceil(len(self._judged) * self._stop.share - 1e-9) if self._stop else 0

    def prune_cause(self, trial: Trial) -> str | None:
        """Why a trial got no student, if its teacher is why."""
        if self._stop is None or trial.teacher_score is None or not trial.waits_for_teacher:
            return None
        place, many = self.rank(self._sign * trial.teacher_score) + 1, len(self._judged)
        return f"its teacher has place {place} of {many} by {self._stop.metric} ({trial.teacher_score:.4f}): no student"

    def _waits(self, trial: Trial | None) -> Place | None:
        if trial is None or trial.teacher_score is None or trial.state != "paused" or not trial.waits_for_teacher:
            return None
        return self._sign * trial.teacher_score, trial.number


def _teacher(trial: Trial) -> str:
    """Which teacher a trial has, by its slice of the pair."""
    return fingerprint({name: trial.pair.get(name) for name in ("data", "teacher")})


class RungScores:
    """Who stands where on the rung_epochs; told trial by trial, so that asking hardly takes longer with their number."""

    def __init__(self, stop: EarlyStop | None, trials: Iterable[Trial] = ()) -> None:
        self.stop = stop
        self.teachers = TeacherRung(stop.teacher if stop else None)
        self._completed = 0
        self._reached = dict.fromkeys(reversed(stop.rungs if stop else ()), 0)
        self._ranked: dict[int, list[Place]] = {rung: [] for rung in self._reached}
        self._paused: dict[int, list[Place]] = {rung: [] for rung in self._reached}
        for trial in trials:
            self.update(None, trial)

    def update(self, old: Trial | None, new: Trial) -> None:
        """A trial is `new`, and was `old` when it was told the last time."""
        self._completed += (new.state == "completed") - (old is not None and old.state == "completed")
        self.teachers.update(old, new)
        for rung, count in self._reached.items():
            self._reached[rung] = count + (rung in new.scores) - (old is not None and rung in old.scores)
            _move(self._ranked[rung], self._place(old, rung), self._place(new, rung))
            _move(self._paused[rung], self._waits(old, rung), self._waits(new, rung))

    def promotion(self) -> int | None:
        """Number of the paused trial that goes on now, or None.

        A trial that failed later keeps its part in the count of a rung but leaves its place among the best to the next one. One
        that was given up (`pruned`) keeps its place: who comes later must beat it.
        """
        for rung, paused in self._paused.items():
            # Who is not paused there any more keeps its place, so the best that waits is due if any of them is.
            places = self._reached[rung] // self.stop.reduction if self.stop else 0
            if paused and bisect_left(self._ranked[rung], paused[0]) < places:
                return paused[0][1]
        return self.teachers.promotion()

    def best_unfinished(self) -> int | None:
        """The paused trial that goes on when nothing is due and none was completed: so that every search ends with a result."""
        if self._completed:
            return None
        furthest = next((paused for paused in self._paused.values() if paused), None)
        return furthest[0][1] if furthest else self.teachers.best_waiting()

    def _place(self, trial: Trial | None, rung: int) -> Place | None:
        if trial is None or rung not in trial.scores or trial.state == "failed":
            return None
        return _order(self.stop, trial, rung)

    def _waits(self, trial: Trial | None, rung: int) -> Place | None:
        return self._place(trial, rung) if trial and trial.state == "paused" and trial.epoch == rung else None


def _move(places: list[Place], old: Place | None, new: Place | None) -> None:
    if old == new:
        return
    if old is not None:
        del places[bisect_left(places, old)]
    if new is not None:
        insort(places, new)


def best_first(stop: EarlyStop | None, trials: Sequence[Trial], rung: int) -> list[Trial]:
    """Trials by their score at a rung, the earlier draw first where scores are equal."""
    return sorted(trials, key=lambda trial: _order(stop, trial, rung))


def _order(stop: EarlyStop | None, trial: Trial, rung: int) -> Place:
    sign = 1 if stop and stop.mode == "min" else -1
    return sign * trial.scores[rung], trial.number
