"""What a search has spent, in seconds of stages and of the clock, and which limits of its budget that reaches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ktray.search.space_file import Budget
from ktray.search.space_tree import Params
from ktray.search.trial import PREFIX_STATES, Trial

HOUR = 3600.0
SAVE_EVERY = 30.0  # seconds: as much of `stop_after` as a kill -9 may lose
AttributedCosts = Mapping[str, Mapping[str, float]]
"""``{"prefix": {key: seconds}, "suffix": {key: seconds}}``."""


class DrawCost(NamedTuple):
    """Seconds of stages: of those before the student, and of the student with its evaluations."""

    prefix: float = 0.0
    suffix: float = 0.0


CostEstimate = Callable[[Params], DrawCost | None]
"""What a draw would add to the spending; None if it is no valid pair."""


class Spending:
    """Sums the costs of all trials. A stage is attributed once, to the trial that needed it first."""

    def __init__(self, trials: Iterable[Trial] = ()) -> None:
        self._costs: dict[int, AttributedCosts] = {}
        self._keys: Counter[str] = Counter()
        self._spent = DrawCost()
        for trial in trials:
            self.update(trial)

    def update(self, trial: Trial) -> None:
        """Takes in a trial that is new or has changed."""
        before = self._costs.get(trial.number, {})
        if trial.attributed_costs == before:
            return
        self._add(before, -1)
        self._add(trial.attributed_costs, 1)
        self._costs[trial.number] = trial.attributed_costs

    def _add(self, costs: AttributedCosts, sign: int) -> None:
        for stages in costs.values():
            for key in stages:
                self._keys[key] += sign
        prefix, suffix = (sign * sum(costs.get(part, {}).values()) for part in DrawCost._fields)
        self._spent = DrawCost(self._spent.prefix + prefix, self._spent.suffix + suffix)

    def __contains__(self, key: str) -> bool:
        """Whether a stage is attributed to a trial already."""
        return self._keys[key] > 0

    @property
    def spent(self) -> DrawCost:
        """Seconds of all stages: recorded, or expected where they have not finished."""
        return self._spent


class ElapsedTime:
    """Seconds that searches of a study ran, over all resumes.

    Args:
        clock: seconds.
        before: seconds of earlier sessions.
        save: writes the seconds down.
    """

    def __init__(self, clock: Callable[[], float], before: float, save: Callable[[float], None]) -> None:
        self._clock, self._began = clock, clock()
        self._before = self._saved = before
        self._save = save

    @property
    def seconds(self) -> float:
        return self._before + self._clock() - self._began

    def save(self) -> None:
        """Writes the seconds down."""
        self._saved = self.seconds
        self._save(self._saved)

    def save_if_due(self) -> None:
        """Writes the seconds down if the last time was long enough ago."""
        if self.seconds - self._saved >= SAVE_EVERY:
            self.save()


def affordable_seconds(budget: Budget, spent: DrawCost, trials: Iterable[Trial]) -> float:
    """Seconds that the next draw may cost. Until a first trial runs without failing there is no limit."""
    begun = any(trial.state in PREFIX_STATES for trial in trials)
    return math.inf if budget.hours is None or not begun else budget.hours * HOUR - sum(spent)


def limit_reached(budget: Budget, seconds: float, spent: DrawCost) -> str | None:
    """Which limit of a budget is reached, in words; None if none is.

    Args:
        seconds: that the search has run, over all resumes.
        spent: on stages, over all resumes.
    """
    if budget.stop_after is not None and seconds >= budget.stop_after:
        return f"stop_after ({budget.stop_after:g} s) is used up"
    if budget.hours is not None and sum(spent) >= budget.hours * HOUR:
        return f"{sum(spent) / HOUR:.3g} of {budget.hours:g} stage hours are spent"
    return None


def nothing_affordable(budget: Budget, spent: DrawCost) -> str:
    """Why a search ends whose remaining budget pays for no other draw, in words."""
    hours = budget.hours or 0.0
    return f"the {hours - sum(spent) / HOUR:.3g} of {hours:g} stage hours that are left pay for no other draw"
