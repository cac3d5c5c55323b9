"""Asynchronous successive halving by promotion: which paused trial goes on, decided from scores alone.

At a rung (student epochs) a trial pauses. Whenever somebody asks, the best 1/reduction of those that reached a rung may go on
to the next, highest rung first. Nothing is stopped and nobody waits for a full bracket.

Source: Li, Jamieson, Rostamizadeh, Gonina, Ben-tzur, Hardt, Recht, Talwalkar, "A System for Massively Parallel Hyperparameter
Tuning" (MLSys 2020), algorithm 2 (get_job).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

from ktray.search.document import EarlyStop
from ktray.search.trial import Trial


def ladder(stop: EarlyStop | None, epochs: int) -> tuple[int, ...]:
    """Where a student of so many epochs pauses; the last entry is its full training."""
    below = stop.rungs if stop else ()
    return (*(rung for rung in below if rung < epochs), epochs)


def next_rung(stop: EarlyStop | None, trial: Trial) -> int:
    """Epoch to which a trial goes on from where it is.

    Raises:
        ValueError: it already had its full training.
    """
    ahead = [rung for rung in ladder(stop, trial.epochs) if rung > trial.epoch]
    if not ahead:
        raise ValueError(f"trial {trial.number} had all of its {trial.epochs} epochs")
    return ahead[0]


def promotion(stop: EarlyStop | None, trials: Sequence[Trial]) -> Trial | None:
    """The paused trial that goes on now, or None.

    A trial that failed later keeps its part in the count of a rung but leaves its place among the best to the next one. One
    that was given up (`pruned`) keeps its place: who comes later must beat it.
    """
    for rung in reversed(stop.rungs if stop else ()):
        reached = [trial for trial in trials if rung in trial.scores]
        ranked = best_first(stop, [trial for trial in reached if trial.state != "failed"], rung)
        places = len(reached) // stop.reduction if stop else 0
        due = [trial for trial in ranked[:places] if trial.state == "paused" and trial.epoch == rung]
        if due:
            return due[0]
    return None


class Standings:
    """`promotion` of trials that are told one after the other, in a time that hardly grows with their number."""

    def __init__(self, stop: EarlyStop | None) -> None:
        self.stop = stop
        self._reached = dict.fromkeys(reversed(stop.rungs if stop else ()), 0)
        self._ranked: dict[int, list[tuple[float, int]]] = {rung: [] for rung in self._reached}
        self._paused: dict[int, list[tuple[float, int]]] = {rung: [] for rung in self._reached}

    def tell(self, old: Trial | None, new: Trial) -> None:
        """A trial is `new`, and was `old` when it was told the last time."""
        for rung, count in self._reached.items():
            self._reached[rung] = count + (rung in new.scores) - (old is not None and rung in old.scores)
            _move(self._ranked[rung], self._place(old, rung), self._place(new, rung))
            _move(self._paused[rung], self._waits(old, rung), self._waits(new, rung))

    def promotion(self) -> int | None:
        """Number of the paused trial that goes on now, or None."""
        for rung, paused in self._paused.items():
            # Who is not paused there any more keeps its place, so the best that waits is due if any of them is.
            places = self._reached[rung] // self.stop.reduction if self.stop else 0
            if paused and bisect_left(self._ranked[rung], paused[0]) < places:
                return paused[0][1]
        return None

    def _place(self, trial: Trial | None, rung: int) -> tuple[float, int] | None:
        if trial is None or rung not in trial.scores or trial.state == "failed":
            return None
        return _order(self.stop, trial, rung)

    def _waits(self, trial: Trial | None, rung: int) -> tuple[float, int] | None:
        return self._place(trial, rung) if trial and trial.state == "paused" and trial.epoch == rung else None


def _move(entries: list[tuple[float, int]], old: tuple[float, int] | None, new: tuple[float, int] | None) -> None:
    if old == new:
        return
    if old is not None:
        del entries[bisect_left(entries, old)]
    if new is not None:
        insort(entries, new)


def last_hope(stop: EarlyStop | None, trials: Sequence[Trial]) -> Trial | None:
    """The paused trial that goes on when nothing is due and none was completed: so that every search ends with a result."""
    if any(trial.state == "completed" for trial in trials):
        return None
    paused = [trial for trial in trials if trial.state == "paused"]
    furthest = max((trial.epoch for trial in paused), default=0)
    leading = best_first(stop, [trial for trial in paused if trial.epoch == furthest], furthest)
    return leading[0] if leading else None


def best_first(stop: EarlyStop | None, trials: Sequence[Trial], rung: int) -> list[Trial]:
    """Trials by their score at a rung, the earlier draw first where scores are equal."""
    return sorted(trials, key=lambda trial: _order(stop, trial, rung))


def _order(stop: EarlyStop | None, trial: Trial, rung: int) -> tuple[float, int]:
    sign = 1 if stop and stop.mode == "min" else -1
    return sign * trial.scores[rung], trial.number
