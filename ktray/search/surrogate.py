"""What a draw is worth before it is tried: a Gaussian process over the draws of a space, and what it makes expect.

Two draws are alike part by part, along the tree of the space: what differs in one part is still alike in the others, so a
student that did well behind one teacher is expected to do well behind the next. Parts of different branches are not compared.
What was judged early says less of the end: a layer that is ahead after two epochs may fall behind, which trials that were
stopped there cannot show. So draws are less alike the more rungs lie between what they were judged at. By how much, and how
much of a result is chance, differs from space to space: of a few values those are taken that explain the trials best.
Only the order of the trials counts: a rank does not care whether scores are shares or losses, one objective or several. What
runs and has no result yet is believed to become what is expected of it, so that no two workers try the same.

Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), algorithm 2.1 and equation 5.8. From rung to
rung: Kennedy and O'Hagan, "Predicting the Output from a Complex Computer Code When Fast Approximations Are Available" (2000),
equation 1, with one variance for all rungs. Expected improvement: Jones, Schonlau and Welch, "Efficient Global Optimization of
Expensive Black-Box Functions" (1998), equation 15. Belief in what runs: Ginsbourger, Le Riche and Carraro, "Kriging Is
Well-Suited to Parallelize Optimization" (2010), section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.special import ndtr, ndtri

from ktray.ops import blas
from ktray.search.space import Space
from ktray.search.space_tree import Choice, OneOf, Parameter, Range, Scalar, all_values, children, parameters

FAR = math.exp(-0.5)  # how alike draws are that differ in one part and in nothing else
NEAR = 0.5  # of a number's range: at this distance two values are still rather alike
COMMON = 1.0  # variance of what all draws share, in units of what sets them apart
STEPS = (1.0, 0.9, 0.8, 0.6, 0.4)  # how alike the same draw may be to itself one rung further on
NOISES = np.array([0.05, 0.1, 0.2, 0.4, 0.8])  # what the variance of a result may be: another seed would rank otherwise
FITTED = 32  # trials that these two are chosen by

Matrix = NDArray[np.float64]
Rows = Matrix
"""(draws, columns): per parameter the place of its value, from 0 to 1 for numbers and 0, 1, ... for names; NaN if not drawn."""


@dataclass(frozen=True)
class _Part:
    """One parameter, or a choice of branches with the parts of each by the place of its name."""

    column: int
    ordered: bool
    branches: Mapping[int, tuple[_Part, ...]]

    def alike(self, one: Rows, other: Rows) -> Matrix:
        """(n, m) float64 from 0 to 1, of n draws with m others."""
        ours, theirs = one[:, self.column, None], other[None, :, self.column]
        if self.ordered:
            found = np.exp(-0.5 * ((ours - theirs) / NEAR) ** 2)
            return np.nan_to_num(found, copy=False)
        found = (ours == theirs).astype(np.float64)
        for place, parts in self.branches.items():
            here, there = np.flatnonzero(one[:, self.column] == place), np.flatnonzero(other[:, self.column] == place)
            if parts and len(here) and len(there):
                found[np.ix_(here, there)] = _together(parts, one[here], other[there])
        return found


def _together(parts: Sequence[_Part], one: Rows, other: Rows) -> Matrix:
    found = np.ones((len(one), len(other)))
    for part in parts:
        found *= FAR + (1 - FAR) * part.alike(one, other)
    return found


class Surrogate:
    """Expects of draws what trials that are like them have shown.

    Args:
        space: whose tree says what is compared with what.
    """

    def __init__(self, space: Space) -> None:
        listed = [parameter for parameter, _ in parameters(space.root)]
        self._places = {parameter.name: _places(parameter) for parameter in listed}
        self._columns = {parameter.name: column for column, parameter in enumerate(listed)}
        self._parameters = {parameter.name: parameter for parameter in listed}
        self._parts = tuple(self._grow(space.root))

    def _grow(self, node: Any) -> list[_Part]:
        if isinstance(node, OneOf):
            branches = {place: tuple(self._grow(body)) for place, body in enumerate(node.branches.values())}
            return [_Part(self._columns[node.choice.name], False, branches)]
        if isinstance(node, Choice | Range):
            single = len(all_values(node) or (0, 0)) == 1
            return [] if single else [_Part(self._columns[node.name], isinstance(node, Range) or _numbers(node), {})]
        return [part for child in children(node) for part in self._grow(child)]

    def rows(self, draws: Sequence[Mapping[str, Scalar]]) -> Rows:
        """Draws as numbers; what a draw lacks, as one of a study with other parameters may, is like nothing."""
        found = np.full((len(draws), len(self._columns)), np.nan)
        for row, draw in zip(found, draws, strict=True):
            for name, value in draw.items():
                column = self._columns.get(name)
                if column is not None:
                    row[column] = self._place(name, value)
        return found

    def _place(self, name: str, value: Scalar) -> float:
        places = self._places[name]
        return _along(self._parameters[name], value) if places is None else places[value]

    def expected_improvement(
        self,
        ranked: Sequence[Mapping[str, Scalar]],
        unknown: Sequence[Mapping[str, Scalar]],
        draws: Sequence[Mapping[str, Scalar]],
        left: Sequence[int] = (),
    ) -> Matrix:
        """For each draw, by how much it is expected to beat in the end what is expected of the best trial.

        Args:
            ranked: draws of trials with a result, at least one, the best first.
            unknown: draws of trials that run.
            left: rungs that each of `ranked` had still ahead when it was judged; empty: all were judged at their end.

        Returns:
            (len(draws),) float64, in standard deviations of a rank turned into a normal score.
        """
        tried, asked, count = self.rows([*ranked, *unknown]), self.rows(draws), len(ranked)
        ahead = np.zeros(len(tried))  # what runs is believed to become what is expected of its end
        ahead[: len(left)] = left
        scores = ndtri(1 - (np.arange(count) + 0.5) / count)
        with blas.one_thread():  # the same draw on any number of cores, and more of them are slower for so small matrices
            alike = self._alike(tried, tried)
            step, noise = _fitted(alike[:count, :count], ahead[:count], scores)
            across = _covariance(self._alike(tried, asked), ahead, 0.0, step)
            factor = cholesky(_covariance(alike, ahead, ahead, step) + noise * np.eye(len(tried)), lower=True)
            known = factor[:count, :count]  # the factor of what has a result, as that comes first
            weights = cho_solve((known, True), scores)
            ended = _covariance(alike[:count, :count], ahead[:count], 0.0, step)
            mean, best = across[:count].T @ weights, (ended.T @ weights).max()
            explained = (solve_triangular(factor, across, lower=True) ** 2).sum(0)
        deviation = np.sqrt(np.maximum(COMMON + 1 - explained, 1e-9))
        above = (mean - best) / deviation
        found: Matrix = deviation * (above * ndtr(above) + np.exp(-(above**2) / 2) / math.sqrt(2 * math.pi))
        return found

    def _alike(self, one: Rows, other: Rows) -> Matrix:
        return _together(self._parts, one, other)


def _covariance(alike: Matrix, ahead: Matrix, others: Matrix | float, step: float) -> Matrix:
    """(n, m) of draws that are so alike, with so many rungs still ahead of each when it was judged."""
    found: Matrix = COMMON + np.exp(math.log(step) * np.abs(ahead[:, None] - others)) * alike
    return found


def _fitted(alike: Matrix, ahead: Matrix, scores: Matrix) -> tuple[float, float]:
    """How alike a draw is to itself one rung further on, and the variance of a result, by their marginal likelihood."""
    some = slice(None, None, math.ceil(len(scores) / FITTED))  # from the best to the worst
    alike, ahead, scores = alike[some, some], ahead[some], scores[some]
    likely = []
    for step in STEPS:
        values, vectors = np.linalg.eigh(_covariance(alike, ahead, ahead, step))
        variances = values[:, None] + NOISES
        likely.append(-((vectors.T @ scores) ** 2 @ (1 / variances)) - np.log(variances).sum(0))
    best, noise = np.unravel_index(np.argmax(likely), (len(STEPS), len(NOISES)))
    return STEPS[best], float(NOISES[noise])


def _numbers(choice: Choice) -> bool:
    """Whether the options are numbers, so that neighbours are alike."""
    return not choice.branches and all(isinstance(each, int | float) and not isinstance(each, bool) for each in choice.labels)


def _places(parameter: Parameter) -> dict[Scalar, float] | None:
    """Value -> its place; None for a range."""
    if not isinstance(parameter, Choice):
        return None
    if not _numbers(parameter):
        return {label: float(place) for place, label in enumerate(parameter.labels)}
    steps = max(1, len(parameter.labels) - 1)  # options are steps that whoever wrote them takes for even
    return {label: place / steps for place, label in enumerate(sorted(parameter.labels, key=lambda label: float(str(label))))}


def _along(parameter: Parameter, value: Scalar) -> float:
    """How far a value is along its range, from 0 to 1."""
    assert not isinstance(parameter, Choice)
    low, high, at = float(parameter.low), float(parameter.high), float(str(value))
    if parameter.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low) if high > low else 0.0
