"""The ETA of a search: the expected seconds of the remaining stages, divided by the stage seconds done per second so far."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable

from ktray.cost_model.stage_costs import INTERVAL, RELATIVE_ERROR
from ktray.search.budget import HOUR
from ktray.search.history import History

MIN_SETTLED = 2  # trials that must have ended or paused before there is an estimate


def time_left(study: History, made: Callable[[str], bool]) -> tuple[float, float, float] | None:
    """Seconds until a running search reaches its target or a limit of its budget; None while it is too early to estimate.

    A trial costs what the cost model expects of its stages, and what was recorded once they are made. Each further draw is
    expected to cost the mean of the draws so far, which includes promotions and shared stages.

    Args:
        made: whether the artifact of a key exists.

    Returns:
        Expected seconds, and the ends of an interval that holds 90 % of outcomes: (seconds, low, high).
    """
    drawn = [trial for trial in study.trials if trial.state != "duplicate"]
    running = [trial for trial in drawn if trial.state == "running"]
    if len(drawn) - len(running) < MIN_SETTLED or not study.elapsed:
        return None
    costs = [sum(sum(part.values()) for part in trial.attributed_costs.values()) for trial in drawn]
    ordered = [part[key] for trial in running for part in trial.attributed_costs.values() for key in part if not made(key)]
    if sum(costs) <= sum(ordered):  # nothing is computed yet, or no costs are known: count every trial as equally expensive
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
    seconds, low, high = (round(min(limit, max(0.0, amount) / at_once), 1) for amount in (work, work - error, work + error))
    return seconds, low, high


def _limit(study: History, computed: float, at_once: float) -> float:
    """Seconds until the budget ends the search."""
    budget = study.space.budget
    until_stop = math.inf if budget.stop_after is None else budget.stop_after - study.elapsed
    until_spent = math.inf if budget.hours is None else (budget.hours * HOUR - computed) / at_once
    return max(0.0, min(until_stop, until_spent))
