"""The observations of a sampler: trials with a result, ranked or split into good and bad, limited in number.

They are updated trial by trial. The answers depend only on the trials, not on the order of the updates, so that a resumed
search makes the same draws as the killed one would have made.

Source of the crowding distance: Deb, Pratap, Agarwal and Meyarivan, "A Fast and Elitist Multiobjective Genetic Algorithm:
NSGA-II" (2002), section III.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from math import ceil

import numpy as np
from numpy.typing import NDArray

from ktray.search.halving import LossAndNumber, rung_epochs
from ktray.search.ranking import dominates
from ktray.search.space import Space
from ktray.search.trial import Trial

MAX_GOOD = 25  # trials that count as good; also at most a tenth of all, as in Optuna
MAX_SPLIT = 300  # trials that TPE is fitted to: the good and the newest ones, since old bad trials add little


class Observations:
    """Trials by their result: completed, stopped at a rung with a score, or pending (running without a result).

    Args:
        space: its objectives rank completed trials, its early-stop metric ranks those with a score at a rung.
    """

    def __init__(self, space: Space, trials: Iterable[Trial] = ()) -> None:
        self._modes = [-1 if mode == "max" else 1 for _, mode in space.objectives]
        self._metrics = [metric for metric, _ in space.objectives]
        stop = space.early_stop
        self._stop = stop
        self._rung_mode = 1 if stop and stop.mode == "min" else -1
        self._teacher_mode = 1 if stop and stop.teacher and stop.teacher.mode == "min" else -1
        self._trials: dict[int, Trial] = {}
        self._completed: list[LossAndNumber] = []  # sorted, by the first objective
        self._front: dict[int, tuple[float, ...]] = {}  # with several objectives: Pareto front, number -> losses
        self._at_rungs: dict[int, list[LossAndNumber]] = {}  # last rung -> sorted, by the score there; 0: teacher
        self._pending: set[int] = set()
        self._with_result: list[int] = []  # numbers, sorted
        for trial in trials:
            self.update(trial)

    def update(self, trial: Trial) -> None:
        """Adds a new trial, or replaces a changed one."""
        before = self._trials.get(trial.number)
        if before is not None:
            self._remove(before)
        if trial.state == "completed":
            self._trials[trial.number] = trial
            insort(self._completed, (self._losses(trial)[0], trial.number))
            if len(self._modes) > 1:
                self._update_pareto_front(trial)
        elif trial.state in ("running", "interrupted", "paused", "pruned") and trial.last_rung_and_score:
            self._trials[trial.number] = trial
            insort(self._at_rungs.setdefault(trial.last_rung_and_score[0], []), self._rung_entry(trial))
        elif trial.state == "running":
            self._trials[trial.number] = trial
            self._pending.add(trial.number)
            return
        else:
            return
        insort(self._with_result, trial.number)

    def _remove(self, trial: Trial) -> None:
        del self._trials[trial.number]
        if trial.number in self._pending:
            self._pending.discard(trial.number)
            return
        assert trial.state != "completed", "a completed trial stays completed"
        assert trial.last_rung_and_score is not None
        entries = self._at_rungs[trial.last_rung_and_score[0]]
        del entries[bisect_left(entries, self._rung_entry(trial))]
        del self._with_result[bisect_left(self._with_result, trial.number)]

    def __len__(self) -> int:
        """Number of trials with a result."""
        return len(self._with_result)

    def good_and_bad(self) -> tuple[list[Trial], list[Trial]]:
        """The good trials and the bad ones, each in the order of their draws.

        Pending trials count as bad (constant liar), so that workers do not all try the same draw.
        """
        good = self._best(min(MAX_GOOD, ceil(0.1 * len(self))))
        chosen = set(good)
        newest = [number for number in self._with_result[-MAX_SPLIT:] if number not in chosen]
        bad = [*newest[-(MAX_SPLIT - len(good)) :], *self._pending]
        return [self._trials[number] for number in sorted(good)], [self._trials[number] for number in sorted(bad)]

    def ranked_and_pending(self, limit: int) -> tuple[list[Trial], list[Trial]]:
        """The trials with a result, best first; the pending trials.

        Completed trials come first, then those with a score at a higher rung. If there are more than `limit`, the best ones
        fill half of it and the newest the other half. At most `limit` / 2 pending trials are returned, the newest.
        """
        best = self._best(len(self) if len(self) <= limit else limit // 2)
        chosen = set(best)
        others = [number for number in self._with_result[-limit:] if number not in chosen]
        numbers = [*best, *self._sorted_by_first_objective(others[max(0, len(best) + len(others) - limit) :])]
        pending = sorted(self._pending)[-(limit // 2) :]
        return [self._trials[number] for number in numbers], [self._trials[number] for number in pending]

    def rungs_ahead(self, trial: Trial) -> int:
        """Number of rungs after a trial's last score; 0 if it is completed."""
        if trial.state == "completed":
            return 0
        reached, _ = trial.last_rung_and_score or (0, 0.0)
        return sum(rung > reached for rung in rung_epochs(self._stop, trial.total_epochs))

    def _sorted_by_first_objective(self, numbers: Iterable[int]) -> list[int]:
        """These trials, best first, by the first objective."""

        def order(number: int) -> tuple[int, int, float, int]:
            trial = self._trials[number]
            if trial.state == "completed":
                return 0, 0, self._losses(trial)[0], number
            return 1, -(trial.last_rung_and_score or (0, 0.0))[0], *self._rung_entry(trial)

        return sorted(numbers, key=order)

    def _best(self, count: int) -> list[int]:
        """The best `count` trials: completed ones first, then those with a score at a rung, the highest rung first."""
        found = self._best_completed(min(count, len(self._completed)))
        for rung in sorted(self._at_rungs, reverse=True):
            found += [number for _, number in self._at_rungs[rung][: count - len(found)]]
        return found

    def _best_completed(self, count: int) -> list[int]:
        if len(self._modes) == 1:
            return [number for _, number in self._completed[:count]]
        newest = sorted((number for _, number in self._completed), reverse=True)[: max(MAX_SPLIT, count)]
        known = sorted({*newest, *self._front})
        losses = np.array([self._losses(self._trials[number]) for number in known]).reshape(len(known), len(self._modes))
        return [known[index] for index in _nondominated_order(losses, count)]

    def _update_pareto_front(self, trial: Trial) -> None:
        own = self._losses(trial)
        if any(dominates(other, own) for other in self._front.values()):
            return
        self._front = {number: other for number, other in self._front.items() if not dominates(own, other)}
        self._front[trial.number] = own

    def _losses(self, trial: Trial) -> tuple[float, ...]:
        return tuple(sign * trial.objectives[metric] for sign, metric in zip(self._modes, self._metrics, strict=True))

    def _rung_entry(self, trial: Trial) -> LossAndNumber:
        rung, score = trial.last_rung_and_score or (0, 0.0)
        return (self._rung_mode if rung else self._teacher_mode) * score, trial.number


def _nondominated_order(losses: NDArray[np.float64], count: int) -> list[int]:
    """Indices of the best `count` rows (n, objectives), front by front; from the last front the least crowded ones."""
    found: list[int] = []
    remaining = np.arange(len(losses))
    while len(found) < count:
        own = losses[remaining]
        no_worse = (own[:, None] <= own[None]).all(2)
        dominated = (no_worse & ~no_worse.T).any(0)
        front = remaining[~dominated]
        if len(found) + len(front) > count:
            front = front[np.argsort(-_crowding_distance(losses[front]), kind="stable")]
        found += front.tolist()
        remaining = remaining[dominated]
    return found[:count]


def _crowding_distance(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,): the distance between the neighbours of each row, summed over objectives; infinite at the ends."""
    distance = np.zeros(len(losses))
    for column in losses.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]] or 1.0
        distance[order[[0, -1]]] = np.inf
        distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance
