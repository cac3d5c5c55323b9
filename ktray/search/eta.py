"""The ETA of a search: what the cost model expects of stages to come, divided by how much is computed at once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from ktray.cost_model.stage_costs import INTERVAL, RELATIVE_ERROR
from ktray.search.budget import HOUR
from ktray.search.history import History

MIN_SETTLED = 2  # trials before anything can be said


class TimeLeft(NamedTuple):
    """Seconds until the target or a limit of the budget is reached; 90 % of them turn out between `low` and `high`."""

    seconds: float
    low: float
    high: float


def time_left(study: History, made: Callable[[str], bool]) -> TimeLeft | None:
    """When a study that is searched now will be done; None while nothing can be said.

    Trials are charged what the cost model expects of their stages, and once these are made what was recorded. A draw to come is
    expected to cost the mean of the draws so far, promotions and shared stages included.

    Args:
        made: whether the artifact of a key is there.
    """
    drawn = [trial for trial in study.trials if trial.state != "duplicate"]
    running = [trial for trial in drawn if trial.state == "running"]
    if len(drawn) - len(running) < MIN_SETTLED or not study.elapsed:
        return None
    costs = [sum(sum(part.values()) for part in trial.attributed_costs.values()) for trial in drawn]
    ordered = [part[key] for trial in running for part in trial.attributed_costs.values() for key in part if not made(key)]
    if sum(costs) <= sum(ordered):  # nothing was computed yet, or no costs are known: one trial costs as much as another
        costs, ordered = [1.0] * len(drawn), [1.0] * len(running)
    computed = sum(costs) - sum(ordered)
    at_once = computed / study.elapsed
    to_draw = max(0, study.target - len(drawn))
    work = sum(ordered) + to_draw * statistics.mean(costs)
    scatter = statistics.pstdev(costs)
    variance = to_draw * scatter**2 + (to_draw * scatter) ** 2 / len(costs)
    variance += sum((RELATIVE_ERROR * seconds) ** 2 for seconds in ordered)
    error = INTERVAL * math.sqrt(variance)
    limit = _limit(study, computed, at_once)
    return TimeLeft(*(round(min(limit, max(0.0, amount) / at_once), 1) for amount in (work, work - error, work + error)))


def _limit(study: History, computed: float, at_once: float) -> float:
    """Seconds until the budget ends the search."""
    budget = study.space.budget
    until_stop = math.inf if budget.stop_after is None else budget.stop_after - study.elapsed
    until_spent = math.inf if budget.hours is None else (budget.hours * HOUR - computed) / at_once
    return max(0.0, min(until_stop, until_spent))
