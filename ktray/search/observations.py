"""What a sampler is shown of the trials so far: those that say something, the good apart from the rest, and never too many.

Kept up to date trial by trial. What it shows depends on the trials alone and not on the order in which they were told, so that
a resumed search draws as the killed one would have.

Source of the crowding distance: Deb, Pratap, Agarwal and Meyarivan, "A Fast and Elitist Multiobjective Genetic Algorithm:
NSGA-II" (2002), section III.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ktray.search.halving import rung_epochs
from ktray.search.space import Space
from ktray.search.trial import Trial

GOOD = 25  # at most so many trials are good, and at most a tenth of all: as in Optuna
SHOWN = 300  # trials that TPE is shown; of more, the good and the newest: an older bad one says hardly anything more
Place = tuple[float, int]
"""(loss, number): smaller is better, the earlier draw first where losses are equal."""


class Observations:
    """Trials that say something, by what they say: completed, judged at a rung, or running and unknown.

    Args:
        space: its objectives order the completed, and its early stop those that were judged at a rung.
    """

    def __init__(self, space: Space, trials: Iterable[Trial] = ()) -> None:
        self._modes = [-1 if objective.mode == "max" else 1 for objective in space.objectives]
        self._metrics = [objective.metric for objective in space.objectives]
        stop = space.early_stop
        self._stop = stop
        self._rung_mode = 1 if stop and stop.mode == "min" else -1
        self._teacher_mode = 1 if stop and stop.teacher and stop.teacher.mode == "min" else -1
        self._trials: dict[int, Trial] = {}
        self._completed: list[Place] = []  # by the first objective
        self._front: dict[int, tuple[float, ...]] = {}  # of several objectives, losses of what nothing beats
        self._judged: dict[int, list[Place]] = {}  # furthest rung -> places there; 0: of the teacher
        self._unknown: set[int] = set()
        self._told: list[int] = []  # numbers of the completed and the judged
        for trial in trials:
            self.update(trial)

    def update(self, trial: Trial) -> None:
        """A trial is new or has changed."""
        before = self._trials.get(trial.number)
        if before is not None:
            self._remove(before)
        if trial.state == "completed":
            self._trials[trial.number] = trial
            insort(self._completed, (self._losses(trial)[0], trial.number))
            if len(self._modes) > 1:
                self._extend_front(trial)
        elif trial.state in ("running", "paused", "pruned") and trial.furthest:
            self._trials[trial.number] = trial
            insort(self._judged.setdefault(trial.furthest[0], []), self._at_rung(trial))
        elif trial.state == "running":
            self._trials[trial.number] = trial
            self._unknown.add(trial.number)
            return
        else:
            return
        insort(self._told, trial.number)

    def _remove(self, trial: Trial) -> None:
        del self._trials[trial.number]
        if trial.number in self._unknown:
            self._unknown.discard(trial.number)
            return
        assert trial.state != "completed", "what is completed stays so"
        assert trial.furthest is not None
        places = self._judged[trial.furthest[0]]
        del places[bisect_left(places, self._at_rung(trial))]
        del self._told[bisect_left(self._told, trial.number)]

    def __len__(self) -> int:
        """Trials with a result."""
        return len(self._told)

    def split(self) -> tuple[list[Trial], list[Trial]]:
        """The good trials and the rest, each in the order of their draws.

        TPE counts those that run and have no result yet among the rest, so that no two workers try the same.
        """
        good = self._best(min(GOOD, ceil(0.1 * len(self))))
        chosen = set(good)
        newest = [number for number in self._told[-SHOWN:] if number not in chosen]
        rest = [*newest[-(SHOWN - len(good)) :], *self._unknown]
        return [self._trials[number] for number in sorted(good)], [self._trials[number] for number in sorted(rest)]

    def ranked(self, most: int) -> tuple[list[Trial], list[Trial]]:
        """The trials with a result, best first, and those that run and have none yet.

        The completed come before all others, and of these those that came further. Of more than `most` the best half is shown,
        and of the others the newest; of those that run the newest half as many.
        """
        best = self._best(len(self) if len(self) <= most else most // 2)
        chosen = set(best)
        others = [number for number in self._told[-most:] if number not in chosen]
        shown = [*best, *self._in_order(others[max(0, len(best) + len(others) - most) :])]
        running = sorted(self._unknown)[-(most // 2) :]
        return [self._trials[number] for number in shown], [self._trials[number] for number in running]

    def left(self, trial: Trial) -> int:
        """Rungs that a trial with a result had still ahead when it was judged; none if it is completed."""
        if trial.state == "completed":
            return 0
        reached, _ = trial.furthest or (0, 0.0)
        return sum(rung > reached for rung in rung_epochs(self._stop, trial.epochs))

    def _in_order(self, numbers: Iterable[int]) -> list[int]:
        """Some of the trials, best first, as far as their first objective says."""

        def place(number: int) -> tuple[int, int, float, int]:
            trial = self._trials[number]
            if trial.state == "completed":
                return 0, 0, self._losses(trial)[0], number
            return 1, -(trial.furthest or (0, 0.0))[0], *self._at_rung(trial)

        return sorted(numbers, key=place)

    def _best(self, count: int) -> list[int]:
        """The first `count` of the completed and then of the judged, the furthest and best first."""
        found = self._best_completed(min(count, len(self._completed)))
        for rung in sorted(self._judged, reverse=True):
            found += [number for _, number in self._judged[rung][: count - len(found)]]
        return found

    def _best_completed(self, count: int) -> list[int]:
        if len(self._modes) == 1:
            return [number for _, number in self._completed[:count]]
        newest = sorted((number for _, number in self._completed), reverse=True)[: max(SHOWN, count)]
        known = sorted({*newest, *self._front})
        losses = np.array([self._losses(self._trials[number]) for number in known]).reshape(len(known), len(self._modes))
        return [known[index] for index in _by_front(losses, count)]

    def _extend_front(self, trial: Trial) -> None:
        own = self._losses(trial)
        if any(_beats(other, own) for other in self._front.values()):
            return
        self._front = {number: other for number, other in self._front.items() if not _beats(own, other)}
        self._front[trial.number] = own

    def _losses(self, trial: Trial) -> tuple[float, ...]:
        return tuple(sign * trial.objectives[metric] for sign, metric in zip(self._modes, self._metrics, strict=True))

    def _at_rung(self, trial: Trial) -> Place:
        rung, score = trial.furthest or (0, 0.0)
        return (self._rung_mode if rung else self._teacher_mode) * score, trial.number


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def _by_front(losses: NDArray[np.float64], count: int) -> list[int]:
    """Indices of `count` rows (n, objectives): what nothing beats, what only these beat, ...; the last front spread out."""
    found: list[int] = []
    left = np.arange(len(losses))
    while len(found) < count:
        own = losses[left]
        no_worse = (own[:, None] <= own[None]).all(2)
        beaten = (no_worse & ~no_worse.T).any(0)
        front = left[~beaten]
        if len(found) + len(front) > count:
            front = front[np.argsort(-_crowding(losses[front]), kind="stable")]
        found += front.tolist()
        left = left[beaten]
    return found[:count]


def _crowding(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far apart the neighbours of each row are, summed over objectives; infinite at the ends."""
    room = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]] or 1.0
        room[order[[0, -1]]] = np.inf
        room[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return room
