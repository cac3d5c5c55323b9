"""Asynchronous successive halving: which paused trial is promoted, decided from scores alone.

A trial pauses at each rung (a number of student epochs). The best 1/reduction of the trials that reached a rung are promoted to
the next one, the highest rung first; no trial waits for a bracket to fill. An optional rung 0 judges teachers: students are
trained only for the best share of the teachers judged so far.

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

LossAndNumber = tuple[float, int]
"""Orders trials: the smaller loss first, and of equal losses the earlier draw."""


def rung_epochs(stop: EarlyStop | None, epochs: int) -> tuple[int, ...]:
    """The epochs at which a student of `epochs` epochs pauses; the last entry is its full training."""
    below = stop.rungs if stop else ()
    return (*(rung for rung in below if rung < epochs), epochs)


def next_stop_epoch(stop: EarlyStop | None, trial: Trial) -> int:
    """The epoch to which a trial trains next; 0 if its teacher must be judged first.

    Raises:
        ValueError: the trial has completed its full training.
    """
    if stop and stop.teacher and trial.pair.get("teacher") and trial.teacher_score is None and not trial.scores:
        return 0
    ahead = [rung for rung in rung_epochs(stop, trial.total_epochs) if rung > trial.epoch]
    if not ahead:
        raise ValueError(f"trial {trial.number} had all of its {trial.total_epochs} epochs")
    return ahead[0]


class _TeacherRung:
    """Rung 0: the teachers judged so far, and the trials paused until their teacher is among the best.

    It counts teachers, not trials, so many trials with one good teacher do not crowd out other teachers. The first teacher
    judged is the best so far, so its trials continue at once; every later one must be in the best share.
    """

    def __init__(self, stop: TeacherStop | None) -> None:
        self._stop = stop
        self._sign = 1 if stop and stop.mode == "min" else -1
        self._judged: list[tuple[float, str]] = []  # (loss, teacher), sorted, each teacher once
        self._paused: list[LossAndNumber] = []  # sorted

    def update(self, old: Trial | None, new: Trial) -> None:
        """Adds a new trial, or replaces a changed one; `old` is its previous state."""
        if self._stop is None:
            return
        if new.teacher_score is not None and (old is None or old.teacher_score is None):  # its first score
            judged = (self._sign * new.teacher_score, _teacher_identity(new))
            position = bisect_left(self._judged, judged)
            if self._judged[position : position + 1] != [judged]:
                self._judged.insert(position, judged)
        _replace_in_sorted(self._paused, self._paused_entry(old), self._paused_entry(new))

    def promotion(self) -> int | None:
        """Number of the paused trial with the best teacher, if that teacher is among the best share; else None."""
        if not self._paused or self.rank(self._paused[0][0]) >= self.promoted_count():
            return None
        return self._paused[0][1]

    def best_paused(self) -> int | None:
        """Number of the paused trial with the best teacher; None if none is paused."""
        return self._paused[0][1] if self._paused else None

    def rank(self, loss: float) -> int:
        """Number of teachers with a smaller loss."""
        return bisect_left(self._judged, (loss, ""))

    def promoted_count(self) -> int:
        """How many of the teachers judged so far get students: the best share, rounded up."""
        return math.ceil(len(self._judged) * self._stop.kept_share - 1e-9) if self._stop else 0

    def teacher_prune_cause(self, trial: Trial) -> str | None:
        """See `RungScores.teacher_prune_cause`."""
        if self._stop is None or trial.teacher_score is None or not trial.is_stopped_at_teacher_rung:
            return None
        place, total = self.rank(self._sign * trial.teacher_score) + 1, len(self._judged)
        return f"its teacher has place {place} of {total} by {self._stop.metric} ({trial.teacher_score:.4f}): no student"

    def _paused_entry(self, trial: Trial | None) -> LossAndNumber | None:
        if trial is None or trial.teacher_score is None or trial.state != "paused" or not trial.is_stopped_at_teacher_rung:
            return None
        return self._sign * trial.teacher_score, trial.number


def _teacher_identity(trial: Trial) -> str:
    """Identity of a trial's teacher: the fingerprint of `data` and `teacher` in its pair."""
    return fingerprint({name: trial.pair.get(name) for name in ("data", "teacher")})


class RungScores:
    """Scores at all rungs, kept sorted as trials change, so that a query stays fast with thousands of trials."""

    def __init__(self, stop: EarlyStop | None, trials: Iterable[Trial] = ()) -> None:
        self.stop = stop
        self._teachers = _TeacherRung(stop.teacher if stop else None)
        self._completed = 0
        self._reached = dict.fromkeys(reversed(stop.rungs if stop else ()), 0)
        self._ranked: dict[int, list[LossAndNumber]] = {rung: [] for rung in self._reached}
        self._paused: dict[int, list[LossAndNumber]] = {rung: [] for rung in self._reached}
        for trial in trials:
            self.update(None, trial)

    def update(self, old: Trial | None, new: Trial) -> None:
        """Adds a new trial, or replaces a changed one; `old` is its previous state."""
        self._completed += (new.state == "completed") - (old is not None and old.state == "completed")
        self._teachers.update(old, new)
        for rung, count in self._reached.items():
            self._reached[rung] = count + (rung in new.scores) - (old is not None and rung in old.scores)
            _replace_in_sorted(self._ranked[rung], self._rung_entry(old, rung), self._rung_entry(new, rung))
            _replace_in_sorted(self._paused[rung], self._paused_entry(old, rung), self._paused_entry(new, rung))

    def promotion(self) -> int | None:
        """Number of the paused trial to promote now, or None.

        A trial that failed after a rung still counts as having reached it, but gives up its rank there to the next trial. A
        pruned trial keeps its rank: later trials must beat it.
        """
        for rung, paused in self._paused.items():
            # Promoted trials keep their ranks, so the best paused one is within the best share if any paused one is.
            promoted_count = self._reached[rung] // self.stop.reduction if self.stop else 0
            if paused and bisect_left(self._ranked[rung], paused[0]) < promoted_count:
                return paused[0][1]
        return self._teachers.promotion()

    def best_paused_if_none_completed(self) -> int | None:
        """Number of the best paused trial at the highest rung; None if a trial is completed or none is paused."""
        if self._completed:
            return None
        furthest = next((paused for paused in self._paused.values() if paused), None)
        return furthest[0][1] if furthest else self._teachers.best_paused()

    def teacher_prune_cause(self, trial: Trial) -> str | None:
        """Why a trial was pruned before its student; None if its student has begun."""
        return self._teachers.teacher_prune_cause(trial)

    def _rung_entry(self, trial: Trial | None, rung: int) -> LossAndNumber | None:
        if trial is None or rung not in trial.scores or trial.state == "failed":
            return None
        return _loss_and_number(self.stop, trial, rung)

    def _paused_entry(self, trial: Trial | None, rung: int) -> LossAndNumber | None:
        return self._rung_entry(trial, rung) if trial and trial.state == "paused" and trial.epoch == rung else None


def _replace_in_sorted(entries: list[LossAndNumber], old: LossAndNumber | None, new: LossAndNumber | None) -> None:
    """Replace `old` by `new` in a sorted list; None stands for no entry."""
    if old == new:
        return
    if old is not None:
        del entries[bisect_left(entries, old)]
    if new is not None:
        insort(entries, new)


def sorted_by_rung_score(stop: EarlyStop | None, trials: Sequence[Trial], rung: int) -> list[Trial]:
    """Trials by their score at a rung, the earlier draw first where scores are equal."""
    return sorted(trials, key=lambda trial: _loss_and_number(stop, trial, rung))


def _loss_and_number(stop: EarlyStop | None, trial: Trial, rung: int) -> LossAndNumber:
    """By what trials are sorted at a rung: the score, negated if a higher one is better, then the number."""
    sign = 1 if stop and stop.mode == "min" else -1
    return sign * trial.scores[rung], trial.number
