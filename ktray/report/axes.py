"""Axes of the plots: where a value lies on paper, and which values are worth a tick."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One direction of a plot.

    Attributes:
        at: value -> position on paper.
        ticks: values that get a line and a number.
        label: what is measured, and in what.
    """

    at: Callable[[float], float]
    ticks: tuple[float, ...]
    label: str


def axis(values: Sequence[float], paper: tuple[float, float], label: str) -> Axis:
    """A linear axis over `values`, with a margin; a logarithmic one where they span more than a factor of 30 and exceed 1."""
    low, high = min(values), max(values)
    if low > 0 and high > 1 and high / low > 30:  # shares and accuracies, in [0, 1], stay linear
        return _logarithmic(low, high, paper, f"{label} (logarithmic)")
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return linear(low - margin, high + margin, paper, label)


def linear(low: float, high: float, paper: tuple[float, float], label: str) -> Axis:
    """A linear axis from `low` to `high`, without a margin."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step)
    ticks = tuple(index * step for index in range(first, math.floor(high / step) + 1))
    return Axis(lambda value: paper[0] + (value - low) / (high - low) * (paper[1] - paper[0]), ticks, label)


def _logarithmic(low: float, high: float, paper: tuple[float, float], label: str) -> Axis:
    low, high = low / 1.3, high * 1.3
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = tuple(step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high)
    span = math.log(high / low)
    return Axis(lambda value: paper[0] + math.log(value / low) / span * (paper[1] - paper[0]), ticks, label)


def tick_text(value: float) -> str:
    """``0.35``, ``120``, ``5k``, ``1M``."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{round(value, 10):.4g}"
