"""Which trials are better: order, best, Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktray.search.trial import Trial

Objective = tuple[str, str]
"""(metric, ``max`` or ``min``)."""


def value_of(trial: Trial, metric: str) -> float | None:
    """A trial's finite value of `metric`, None if it has none."""
    value = trial.objectives.get(metric, trial.metrics.get(metric))
    return float(value) if value is not None and math.isfinite(value) else None


def ranked(trials: Sequence[Trial], objective: Objective) -> list[Trial]:
    """Completed trials, best first; equal ones in the order of their numbers, those without a value last."""
    metric, mode = objective
    loss = losses(mode)

    def place(trial: Trial) -> tuple[float, int]:
        value = value_of(trial, metric)
        return (math.inf if value is None else loss(value), trial.number)

    return sorted((trial for trial in trials if trial.state == "completed"), key=place)


def losses(mode: str) -> Callable[[float], float]:
    """A function value -> loss, smaller is better."""
    return (lambda value: -value) if mode == "max" else (lambda value: value)


def pareto_front(trials: Sequence[Trial], objectives: Sequence[Objective]) -> list[Trial]:
    """Trials that no other beats in one objective without losing in another, best of the first objective first."""
    rows = []
    for trial in trials:
        values = [value_of(trial, metric) for metric, _ in objectives]
        if None not in values:
            rows.append(
                (trial, [losses(mode)(value) for value, (_, mode) in zip(values, objectives, strict=True) if value is not None])
            )
    front = [
        (costs, trial)
        for trial, costs in rows
        if not any(other != costs and all(o <= c for o, c in zip(other, costs, strict=True)) for _, other in rows)
    ]
    return [trial for _, trial in sorted(front, key=lambda entry: (entry[0], entry[1].number))]
