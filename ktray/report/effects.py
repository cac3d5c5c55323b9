"""What each parameter of a study changes, and how certain that is: a linear model of all parameters at once.

A result is modelled as a mean plus one effect per level of each parameter plus noise. The effects have a normal prior, so that
a level with few trials is drawn towards no effect, and that parameters which only some branches have do no harm. The ratio of
the variances of effects and noise is integrated out over a grid, by its marginal likelihood. Interactions are not modelled.

Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), section 2.1, for the posterior; the same model
as sklearn's `BayesianRidge` for given variances.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray.report.formatting import Objective, param_text, value_of
from ktray.search.trial import Trial

FEWEST = 5  # trials with a result, for an estimate
BINS = 3  # groups of a numeric parameter with more distinct values than `MOST_LEVELS`
MOST_LEVELS = 5
RATIOS = np.geomspace(0.03, 10.0, 15)  # variance of the noise over that of an effect

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LevelEffect:
    """How much better or worse a level of a parameter is than the parameter's other levels, on average over its trials.

    Attributes:
        count: trials with this level and a result.
        mean: of the effect, in the unit of the result; relative to all trials that have the parameter.
        low, high: its 95 % interval.
    """

    label: str
    count: int
    mean: float
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        """Whether the interval leaves out no effect."""
        return self.low > 0 or self.high < 0


Results = Mapping[int, float]
"""Number of a trial -> its result."""
Levels = Mapping[str, Mapping[int, str]]
"""Parameter -> number of a trial -> label of its level; trials of branches without it are absent."""


def results_to_explain(
    trials: Sequence[Trial], objectives: Sequence[Objective], early_stop: Mapping[str, Any] | None
) -> list[tuple[str, Results]]:
    """What can be explained: the scores at the first rung, which trials that were stopped early also have, and the objective.

    Returns:
        (name, results); without those that fewer than five trials have.
    """
    found: list[tuple[str, Results]] = []
    epochs = [epoch for trial in trials for epoch in trial.scores]
    if early_stop and epochs:
        first = min(epochs)
        at_rung = {each.number: each.scores[first] for each in trials if math.isfinite(each.scores.get(first, math.nan))}
        found.append((f"{early_stop['metric']} at epoch {first}", at_rung))
    metric = objectives[0][0]
    values = ((trial.number, value_of(trial, metric)) for trial in trials if trial.state == "completed")
    found.append((metric, {number: value for number, value in values if value is not None}))
    return [(name, results) for name, results in found if len(results) >= FEWEST]


def levels_of(trials: Sequence[Trial]) -> Levels:
    """The levels of each parameter that varies: its values, or of a numeric one with many values three groups of equal size."""
    names = dict.fromkeys(name for trial in trials for name in trial.params)
    found: dict[str, Mapping[int, str]] = {}
    for name in names:
        values = {trial.number: trial.params[name] for trial in trials if name in trial.params}
        labels = (
            _binned(values) if _is_numeric(values.values()) else {number: param_text(value) for number, value in values.items()}
        )
        if len(set(labels.values())) > 1:
            found[name] = labels
    return found


def _is_numeric(values: Any) -> bool:
    distinct = set(values)
    return len(distinct) > MOST_LEVELS and all(type(value) in (int, float) and math.isfinite(value) for value in distinct)


def _binned(values: Mapping[int, float]) -> dict[int, str]:
    edges = np.quantile(np.array(list(values.values()), float), np.linspace(0, 1, BINS + 1)[1:-1])
    group = {number: int(np.searchsorted(edges, value, side="left")) for number, value in values.items()}
    labels = {}
    for each in set(group.values()):
        inside = [value for number, value in values.items() if group[number] == each]
        labels[each] = f"{min(inside):.3g} to {max(inside):.3g}"
    return {number: labels[each] for number, each in group.items()}


def level_effects(results: Results, levels: Levels) -> dict[str, list[LevelEffect]]:
    """Parameter -> the effect of each of its levels. A parameter with one level among these trials is left out.

    Args:
        results: of five trials or more.
    """
    numbers = sorted(results)
    columns: list[tuple[str, str]] = []
    indicators: list[list[float]] = []
    for name, labels in levels.items():
        present = sorted({labels[number] for number in numbers if number in labels}, key=_natural)
        for label in present if len(present) > 1 else ():
            columns.append((name, label))
            indicators.append([float(labels.get(number) == label) for number in numbers])
    if not columns:
        return {}
    design, counts = np.array(indicators).T, np.array(indicators).sum(axis=1)
    mean, covariance = posterior(design, np.array([results[number] for number in numbers]))
    contrasts = np.eye(len(columns))
    for name in levels:
        own = [index for index, (of, _) in enumerate(columns) if of == name]
        contrasts[np.ix_(own, own)] -= counts[own] / counts[own].sum() if own else 0.0
    effects = contrasts @ mean
    half = student_quantile(len(numbers) - 1) * np.sqrt(
        np.maximum(np.einsum("ij,jk,ik->i", contrasts, covariance, contrasts), 0)
    )
    found: dict[str, list[LevelEffect]] = {}
    for index, (name, label) in enumerate(columns):
        effect, margin = float(effects[index]), float(half[index])
        found.setdefault(name, []).append(LevelEffect(label, int(counts[index]), effect, effect - margin, effect + margin))
    return found


def explained_levels(
    trials: Sequence[Trial], objectives: Sequence[Objective], early_stop: Mapping[str, Any] | None
) -> list[tuple[str, str, str, int, float, float, float]]:
    """(result, parameter, level, trials, effect, low, high) of every level, over all results that can be explained."""
    drawn = [trial for trial in trials if trial.state != "duplicate"]
    levels = levels_of(drawn)
    return [
        (name, parameter, each.label, each.count, each.mean, each.low, each.high)
        for name, results in results_to_explain(drawn, objectives, early_stop)
        for parameter, found in level_effects(results, levels).items()
        for each in found
    ]


def student_quantile(freedom: int) -> float:
    """The 97.5 % quantile of Student's t, to 2 % from four degrees of freedom on; scipy would take as long as the whole page.

    Source: Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.7.5.
    """
    z = 1.959964
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def posterior(design: Array, results: Array, ratios: Array = RATIOS) -> tuple[Array, Array]:
    """Mean (P,) and covariance (P, P) of the effects, averaged over the ratios of the variances.

    Args:
        design: (N, P), 1 where a trial has a level.
        results: (N,).
        ratios: variance of the noise over that of an effect; equally probable before the results are seen.
    """
    centred, values = design - design.mean(axis=0), results - results.mean()
    left, singular, right = np.linalg.svd(centred, full_matrices=False)
    projected, squares, free = left.T @ values, singular**2, len(values) - 1
    outside = max(float(values @ values - projected @ projected), 0.0)  # of the results, what no effects can explain
    fits = []
    for ratio in ratios:
        noise = (outside + float(projected**2 @ (ratio / (squares + ratio)))) / free
        likelihood = -0.5 * (free * math.log(max(noise, 1e-300)) + float(np.log1p(squares / ratio).sum()))
        mean = right.T @ (singular * projected / (squares + ratio))
        kept = right.T * (squares / (squares + ratio))
        covariance = noise / ratio * (np.eye(design.shape[1]) - kept @ right)
        fits.append((likelihood, mean, covariance))
    highest = max(likelihood for likelihood, _, _ in fits)
    weights = np.array([math.exp(likelihood - highest) for likelihood, _, _ in fits])
    weights /= weights.sum()
    average = np.einsum("f,fp->p", weights, np.array([mean for _, mean, _ in fits]))
    spread = np.array([mean - average for _, mean, _ in fits])
    within = np.einsum("f,fpq->pq", weights, np.array([covariance for _, _, covariance in fits]))
    return average, within + np.einsum("f,fp,fq->pq", weights, spread, spread)


def _natural(label: str) -> tuple[float, str]:
    """Numbers by their value, and before words."""
    try:
        return float(label.split(" ")[0]), label
    except ValueError:
        return math.inf, label
