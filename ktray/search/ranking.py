"""Ranks completed trials and finds their Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ktray.search.trial import Trial


def ranked(trials: Sequence[Trial], objectives: Sequence[tuple[str, str]]) -> list[Trial]:
    """Completed trials, best first: by the first objective, then the second, ..., then the earlier draw."""
    completed = [trial for trial in trials if trial.state == "completed"]
    return sorted(completed, key=lambda trial: (*_losses(trial, objectives), trial.number))


def front(trials: Sequence[Trial], objectives: Sequence[tuple[str, str]]) -> list[Trial]:
    """Completed trials that no other dominates (the Pareto front), in the order of `ranked`."""
    losses = [(trial, _losses(trial, objectives)) for trial in ranked(trials, objectives)]
    valued = [(trial, own) for trial, own in losses if math.inf not in own]
    return [trial for trial, own in valued if not any(dominates(other, own) for _, other in valued)]


def _losses(trial: Trial, objectives: Sequence[tuple[str, str]]) -> tuple[float, ...]:
    """Per objective a loss, smaller for a better trial; infinite if the trial has no value."""
    values = [(1 if mode == "min" else -1) * trial.objectives.get(metric, math.inf) for metric, mode in objectives]
    return tuple(value if math.isfinite(value) else math.inf for value in values)


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether the losses `one` dominate `other`: smaller in at least one objective, and larger in none."""
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
