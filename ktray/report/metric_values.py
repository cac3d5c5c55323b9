"""A trial's value of a metric, and which of two values is better; the order of trials is that of `ktray.search.ranking`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ktray.search.trial import Trial

Objective = tuple[str, str]
"""(metric, ``max`` or ``min``)."""


def value_of(trial: Trial, metric: str) -> float | None:
    """A trial's finite value of `metric`, None if it has none."""
    value = trial.objectives.get(metric, trial.metrics.get(metric))
    return float(value) if value is not None and math.isfinite(value) else None


def losses(mode: str) -> Callable[[float], float]:
    """A function value -> loss, smaller is better."""
    return (lambda value: -value) if mode == "max" else (lambda value: value)
