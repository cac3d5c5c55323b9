"""What a search has spent on stages, and when that is enough."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from ktray.search.sampler import HOLDS, DrawCost
from ktray.search.space_file import Budget
from ktray.search.trial import Trial

HOUR = 3600.0
Charges = Mapping[str, Mapping[str, float]]
"""``{"prefix": {key: seconds}, "suffix": {key: seconds}}``."""


class Spending:
    """Adds up what trials are charged; a stage is charged once, to the trial that needed it first."""

    def __init__(self, trials: Iterable[Trial] = ()) -> None:
        self._of: dict[int, Charges] = {}
        self._keys: Counter[str] = Counter()
        self._spent = DrawCost()
        for trial in trials:
            self.update(trial)

    def update(self, trial: Trial) -> None:
        """A trial is new or has changed."""
        before = self._of.get(trial.number, {})
        if trial.charges == before:
            return
        self._add(before, -1)
        self._add(trial.charges, 1)
        self._of[trial.number] = trial.charges

    def _add(self, charges: Charges, sign: int) -> None:
        for stages in charges.values():
            for key in stages:
                self._keys[key] += sign
        prefix, suffix = (sign * sum(charges.get(part, {}).values()) for part in DrawCost._fields)
        self._spent = DrawCost(self._spent.prefix + prefix, self._spent.suffix + suffix)

    def __contains__(self, key: str) -> bool:
        """Whether a stage is charged to a trial already."""
        return self._keys[key] > 0

    @property
    def spent(self) -> DrawCost:
        """Seconds of all stages: recorded, or expected where they are still to come."""
        return self._spent


def affordable_seconds(budget: Budget, spent: DrawCost, trials: Iterable[Trial]) -> float:
    """Seconds that the next draw may cost; the first that does not fail is made at any price."""
    begun = any(trial.state in HOLDS for trial in trials)
    return math.inf if budget.hours is None or not begun else budget.hours * HOUR - sum(spent)


def too_little(budget: Budget, spent: DrawCost) -> str:
    """Why a search ends whose budget pays for no other draw."""
    hours = budget.hours or 0.0
    return f"the {hours - sum(spent) / HOUR:.3g} of {hours:g} stage hours that are left pay for no other draw"


def used_up(budget: Budget, seconds: float, spent: DrawCost) -> str | None:
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
