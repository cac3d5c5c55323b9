"""Ranks completed trials, finds their Pareto front, and says what distinguishes those with the same names."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from ktray.pipeline.naming import student_name, teacher_name, transfer_name
from ktray.search.trial import Trial


def ranked(trials: Sequence[Trial], objectives: Sequence[tuple[str, str]]) -> list[Trial]:
    """Completed trials, best first: by the first objective, then the second, ..., then the earlier draw."""
    completed = [trial for trial in trials if trial.state == "completed"]
    return sorted(completed, key=lambda trial: (*_losses(trial, objectives), trial.number))


def pareto_front(trials: Sequence[Trial], objectives: Sequence[tuple[str, str]]) -> list[Trial]:
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


MAX_PARAMS = 4  # listed per trial; `ktray show STUDY/NUMBER` lists all


def component_names(trial: Trial) -> tuple[str, str, str]:
    """Names of teacher, transfer and student, such as ``("hog", "k=50", "alexnet w0.25")``."""
    return teacher_name(trial.pair), transfer_name(trial.pair), student_name(trial.pair)


def distinguishing_params(trials: Sequence[Trial]) -> dict[int, str]:
    """Number of a trial -> the parameters that distinguish it from trials with the same names, such as ``cell 4, lr 0.052``.

    Empty if no two trials with the same names differ.
    """
    alike: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        alike.setdefault(component_names(trial), []).append(trial)
    differing = {
        name
        for group in alike.values()
        for name in {name for trial in group for name in trial.params}
        if len({str(trial.params.get(name)) for trial in group}) > 1
    }
    ends = Counter(name.rpartition(".")[2] for name in differing)
    short = {name: end if ends[end := name.rpartition(".")[2]] == 1 else f"{name.split('.')[0]} {end}" for name in differing}
    texts = {}
    for group in alike.values():
        for trial in group:
            shown = [
                f"{short[name]} {value:.3g}" if isinstance(value, float) else f"{short[name]} {value}"
                for name, value in trial.params.items()
                if name in differing and len(group) > 1
            ]
            texts[trial.number] = ", ".join(shown[:MAX_PARAMS])
    return texts if differing else {}


def names_by_difference(trials: Sequence[Trial]) -> dict[int, str]:
    """Number of a trial -> what tells it from the others: ``rotation-alexnet/conv3 k=50, lr 0.052``.

    Teacher, transfer and student are named where they vary, then the parameters that distinguish trials with the same names.
    """
    names = {trial.number: component_names(trial) for trial in trials}
    varying = [part for part in range(3) if len({each[part] for each in names.values()}) > 1] or [0]
    apart = distinguishing_params(trials)
    shown = {number: " ".join(filter(None, (each[part] for part in varying))) for number, each in names.items()}
    return {number: ", ".join(filter(None, (text, apart.get(number, "")))) for number, text in shown.items()}
