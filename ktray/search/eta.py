"""How long a search will still take: what is ordered, what the draws to come will order, and how much is computed at once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import NamedTuple

from ktray.cost_model.stage_costs import NINETY
from ktray.search.budget import HOUR
from ktray.search.history import History

LEAST = 2  # settled trials before anything can be said
ORDERED = 0.4  # how far the expected seconds of a stage may be off, relative


class TimeLeft(NamedTuple):
    """Seconds until the target or a limit of the budget is reached; 90 % of them turn out between `low` and `high`."""

    seconds: float
    low: float
    high: float


def time_left(study: History, made: Callable[[str], bool]) -> TimeLeft | None:
    """When a study that is searched now will be done; None while nothing can be said.

    A draw to come is expected to cost what the draws so far cost on average, promotions and shared stages included.

    Args:
        made: whether an artifact is there.
    """
    drawn = [trial for trial in study.trials if trial.state != "duplicate"]
    running = [trial for trial in drawn if trial.state == "running"]
    if len(drawn) - len(running) < LEAST or not study.elapsed:
        return None
    each = [sum(sum(part.values()) for part in trial.attributed_costs.values()) for trial in drawn]
    ordered = [part[key] for trial in running for part in trial.attributed_costs.values() for key in part if not made(key)]
    if sum(each) <= sum(ordered):  # nothing was computed yet, or nobody charges: one trial costs as much as another
        each, ordered = [1.0] * len(drawn), [1.0] * len(running)
    paid = sum(each) - sum(ordered)
    at_once = paid / study.elapsed
    left = max(0, study.target - len(drawn))
    work = sum(ordered) + left * statistics.mean(each)
    scatter = statistics.pstdev(each)
    variance = left * scatter**2 + (left * scatter) ** 2 / len(each) + sum((ORDERED * seconds) ** 2 for seconds in ordered)
    off = NINETY * math.sqrt(variance)
    longest = _limit(study, paid, at_once)
    return TimeLeft(*(round(min(longest, max(0.0, amount) / at_once), 1) for amount in (work, work - off, work + off)))


def _limit(study: History, paid: float, at_once: float) -> float:
    """Seconds until the budget ends the search."""
    budget = study.space.budget
    of_clock = math.inf if budget.stop_after is None else budget.stop_after - study.elapsed
    of_stages = math.inf if budget.hours is None else (budget.hours * HOUR - paid) / at_once
    return max(0.0, min(of_clock, of_stages))
