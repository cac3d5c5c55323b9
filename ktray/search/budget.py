"""The spending of a search in seconds of computed stages, and the limits of its budget."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from ktray.search.space_file import Budget
from ktray.search.space_tree import Params
from ktray.search.trial import PREFIX_STATES, Trial

HOUR = 3600.0
AttributedCosts = Mapping[str, Mapping[str, float]]
"""``{"prefix": {key: seconds}, "suffix": {key: seconds}}``."""


class PrefixSuffixSeconds(NamedTuple):
    """Seconds of the stages before the student (prefix), and of the student with its evaluations (suffix)."""

    prefix: float = 0.0
    suffix: float = 0.0


CostEstimate = Callable[[Params], PrefixSuffixSeconds | None]
"""Parameters of a draw -> what it would add to the spending; None if they are no valid pair."""


class Spending:
    """Sums the costs attributed to trials. Each stage is attributed once, to the first trial that needs it."""

    def __init__(self, trials: Iterable[Trial] = ()) -> None:
        self._costs: dict[int, AttributedCosts] = {}
        self._keys: Counter[str] = Counter()
        self._spent = PrefixSuffixSeconds()
        for trial in trials:
            self.record_trial(trial)

    def record_trial(self, trial: Trial) -> None:
        """Adds a new trial, or replaces the costs of a changed one."""
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
        prefix, suffix = (sign * sum(costs.get(part, {}).values()) for part in PrefixSuffixSeconds._fields)
        self._spent = PrefixSuffixSeconds(self._spent.prefix + prefix, self._spent.suffix + suffix)

    def __contains__(self, key: str) -> bool:
        """Whether the stage with this key is attributed to a trial."""
        return self._keys[key] > 0

    @property
    def spent(self) -> PrefixSuffixSeconds:
        """Seconds of all stages: the recorded ones, and the expected ones of stages that have not finished."""
        return self._spent


def affordable_seconds(budget: Budget, spent: PrefixSuffixSeconds, trials: Iterable[Trial]) -> float:
    """Seconds that the next draw may cost; infinite until one trial has started without failing."""
    begun = any(trial.state in PREFIX_STATES for trial in trials)
    return math.inf if budget.hours is None or not begun else budget.hours * HOUR - sum(spent)


def reached_limit(budget: Budget, seconds: float, spent: PrefixSuffixSeconds) -> str | None:
    """The limit of a budget that is reached, as a phrase for the user; None if none is.

    Args:
        seconds: how long the search has run, over all resumes.
        spent: seconds of stages, over all resumes.
    """
    if budget.stop_after is not None and seconds >= budget.stop_after:
        return f"stop_after ({budget.stop_after:g} s) is used up"
    if budget.hours is not None and sum(spent) >= budget.hours * HOUR:
        return f"{sum(spent) / HOUR:.3g} of {budget.hours:g} stage hours are spent"
    return None


def nothing_affordable_reason(budget: Budget, spent: PrefixSuffixSeconds) -> str:
    """The reason for stopping when no further draw is affordable, as a phrase for the user."""
    hours = budget.hours or 0.0
    return f"the {hours - sum(spent) / HOUR:.3g} of {hours:g} stage hours that are left pay for no other draw"
