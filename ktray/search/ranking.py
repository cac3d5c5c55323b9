"""Which completed trials are best."""

from __future__ import annotations

from collections.abc import Sequence

from ktray.search.space import Goal
from ktray.search.trial import Trial


def ranked(trials: Sequence[Trial], objectives: Sequence[Goal]) -> list[Trial]:
    """Completed trials, best first: by the first objective, then the second, ..., then the earlier draw."""
    completed = [trial for trial in trials if trial.state == "completed"]
    return sorted(completed, key=lambda trial: (*_losses(trial, objectives), trial.number))


def front(trials: Sequence[Trial], objectives: Sequence[Goal]) -> list[Trial]:
    """Completed trials that no other beats in every objective (the Pareto front), sorted as by `ranked`."""
    completed = ranked(trials, objectives)
    losses = [_losses(trial, objectives) for trial in completed]
    return [trial for trial, own in zip(completed, losses, strict=True) if not any(_beats(other, own) for other in losses)]


def _losses(trial: Trial, objectives: Sequence[Goal]) -> tuple[float, ...]:
    return tuple((1 if mode == "min" else -1) * trial.objectives[metric] for metric, mode in objectives)


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))
