"""The surrogate model: a Gaussian process over the draws of a space, and the expected improvement of a draw.

The kernel is a product over the tree of the space: draws that differ in one parameter are still similar because of the others,
so a student that did well with one teacher is expected to do well with the next. Parameters of different branches are not
compared. Scores at early rungs predict the final result less well: a layer that leads after two epochs may fall behind later,
which trials stopped at that rung cannot show. Therefore the covariance of two draws decreases with the number of rungs between
their last scores. The rate of this decrease and the noise variance differ between spaces; both are chosen from a few
candidates by marginal likelihood. The targets are normal scores of ranks, so any metric and several objectives can be used.
Pending trials are assumed to reach their predicted mean (kriging believer), so that workers do not all try the same draw.

Source: Rasmussen and Williams, "Gaussian Processes for Machine Learning" (2006), algorithm 2.1 and equation 5.8. From rung to
rung: Kennedy and O'Hagan, "Predicting the Output from a Complex Computer Code When Fast Approximations Are Available" (2000),
equation 1, with one variance for all rungs. Expected improvement: Jones, Schonlau and Welch, "Efficient Global Optimization of
Expensive Black-Box Functions" (1998), equation 15. Kriging believer: Ginsbourger, Le Riche and Carraro, "Kriging Is
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
from ktray.search.space_tree import Choice, OneOf, Parameter, Range, Scalar, all_values, children, parameters_with_conditions

DIFFERENT = math.exp(-0.5)  # similarity of two draws that differ completely in one parameter and agree in all others
LENGTH_SCALE = 0.5  # of the kernel of a number, as a share of its range
SHARED_VARIANCE = 1.0  # variance of the common mean of all draws, in units of the variance between draws
RUNG_CORRELATIONS = (1.0, 0.9, 0.8, 0.6, 0.4)  # candidates: correlation of the same draw at neighbouring rungs
NOISE_VARIANCES = np.array([0.05, 0.1, 0.2, 0.4, 0.8])  # candidates: variance of a result between seeds
MAX_FITTED = 32  # trials that correlation and noise are fitted to

Matrix = NDArray[np.float64]
Rows = Matrix
"""(draws, parameters) float64: position in the range, from 0 to 1, or index of an option; NaN if it is not drawn."""


@dataclass(frozen=True)
class _KernelFactor:
    """A factor of the kernel, for one parameter; if that chooses a branch, `branches` has the factors of each, by index."""

    column: int
    ordered: bool
    branches: Mapping[int, tuple[_KernelFactor, ...]]

    def similarity(self, one: Rows, other: Rows) -> Matrix:
        """(n, m) float64 from 0 to 1, the similarities of n draws with m others."""
        left, right = one[:, self.column, None], other[None, :, self.column]
        if self.ordered:
            found: Matrix = np.exp(-0.5 * ((left - right) / LENGTH_SCALE) ** 2)
            np.nan_to_num(found, copy=False)
            return found
        found = (left == right).astype(np.float64)
        for index, factors in self.branches.items():
            rows, columns = np.flatnonzero(one[:, self.column] == index), np.flatnonzero(other[:, self.column] == index)
            if factors and len(rows) and len(columns):
                found[np.ix_(rows, columns)] = _kernel_product(factors, one[rows], other[columns])
        return found


def _kernel_product(factors: Sequence[_KernelFactor], one: Rows, other: Rows) -> Matrix:
    found = np.ones((len(one), len(other)))
    for factor in factors:
        found *= DIFFERENT + (1 - DIFFERENT) * factor.similarity(one, other)
    return found


class Surrogate:
    """Predicts the quality of draws from trials with a result.

    Args:
        space: its tree determines the kernel.
    """

    def __init__(self, space: Space) -> None:
        listed = [parameter for parameter, _ in parameters_with_conditions(space.root)]
        self._options = {parameter.name: _option_positions(parameter) for parameter in listed}
        self._columns = {parameter.name: column for column, parameter in enumerate(listed)}
        self._parameters = {parameter.name: parameter for parameter in listed}
        self._factors = tuple(self._factors_of(space.root))

    def _factors_of(self, node: Any) -> list[_KernelFactor]:
        if isinstance(node, OneOf):
            branches = {index: tuple(self._factors_of(body)) for index, body in enumerate(node.branches.values())}
            return [_KernelFactor(self._columns[node.choice.name], False, branches)]
        if isinstance(node, Choice | Range):
            single = len(all_values(node) or (0, 0)) == 1
            return [] if single else [_KernelFactor(self._columns[node.name], isinstance(node, Range) or _is_numeric(node), {})]
        return [factor for child in children(node) for factor in self._factors_of(child)]

    def encode_draws(self, draws: Sequence[Mapping[str, Scalar]]) -> Rows:
        """Draws as rows. A missing parameter (of another branch, or in a trial of another study) is NaN: similar to nothing."""
        found = np.full((len(draws), len(self._columns)), np.nan)
        for row, draw in zip(found, draws, strict=True):
            for name, value in draw.items():
                column = self._columns.get(name)
                if column is not None:
                    row[column] = self._encode_value(name, value)
        return found

    def _encode_value(self, name: str, value: Scalar) -> float:
        options = self._options[name]
        return _position_in_range(self._parameters[name], value) if options is None else options[value]

    def expected_improvement(
        self,
        ranked: Sequence[Mapping[str, Scalar]],
        pending: Sequence[Mapping[str, Scalar]],
        draws: Sequence[Mapping[str, Scalar]],
        rungs_ahead: Sequence[int] = (),
    ) -> Matrix:
        """Expected improvement of each draw after its full training, over the best predicted mean of the trials.

        Args:
            ranked: draws of trials with a result, at least one, the best first.
            pending: draws of running trials without a result.
            rungs_ahead: per trial in `ranked`, the number of rungs after its last score; empty: all are completed.

        Returns:
            (len(draws),) float64, in units of the normal scores of ranks.
        """
        tried, candidates, count = self.encode_draws([*ranked, *pending]), self.encode_draws(draws), len(ranked)
        ahead = np.zeros(len(tried))  # pending trials are assumed to reach their predicted final mean
        ahead[: len(rungs_ahead)] = rungs_ahead
        scores = ndtri(1 - (np.arange(count) + 0.5) / count)
        with blas.one_thread():  # for the same result on any number of cores; for matrices this small, more threads are slower
            similar = self._kernel_matrix(tried, tried)
            correlation, noise = _fit_hyperparameters(similar[:count, :count], ahead[:count], scores)
            across = _covariance(self._kernel_matrix(tried, candidates), ahead, 0.0, correlation)
            factor = cholesky(_covariance(similar, ahead, ahead, correlation) + noise * np.eye(len(tried)), lower=True)
            known = factor[:count, :count]  # the Cholesky factor for the trials with a result, which come first
            weights = cho_solve((known, True), scores)
            ended = _covariance(similar[:count, :count], ahead[:count], 0.0, correlation)
            mean, best = across[:count].T @ weights, (ended.T @ weights).max()
            explained = (solve_triangular(factor, across, lower=True) ** 2).sum(0)
        deviation = np.sqrt(np.maximum(SHARED_VARIANCE + 1 - explained, 1e-9))
        above = (mean - best) / deviation
        found: Matrix = deviation * (above * ndtr(above) + np.exp(-(above**2) / 2) / math.sqrt(2 * math.pi))
        return found

    def _kernel_matrix(self, one: Rows, other: Rows) -> Matrix:
        return _kernel_product(self._factors, one, other)


def _covariance(similar: Matrix, ahead: Matrix, others: Matrix | float, correlation: float) -> Matrix:
    """(n, m) from the (n, m) similarities and the number of rungs after the last score of each draw."""
    found: Matrix = SHARED_VARIANCE + np.exp(math.log(correlation) * np.abs(ahead[:, None] - others)) * similar
    return found


def _fit_hyperparameters(similar: Matrix, ahead: Matrix, scores: Matrix) -> tuple[float, float]:
    """(correlation between neighbouring rungs, noise variance): the candidates with the largest marginal likelihood."""
    subset = slice(None, None, math.ceil(len(scores) / MAX_FITTED))  # evenly from the best to the worst
    similar, ahead, scores = similar[subset, subset], ahead[subset], scores[subset]
    likelihoods = []
    for correlation in RUNG_CORRELATIONS:
        values, vectors = np.linalg.eigh(_covariance(similar, ahead, ahead, correlation))
        variances = values[:, None] + NOISE_VARIANCES
        likelihoods.append(-((vectors.T @ scores) ** 2 @ (1 / variances)) - np.log(variances).sum(0))
    best, noise = np.unravel_index(np.argmax(likelihoods), (len(RUNG_CORRELATIONS), len(NOISE_VARIANCES)))
    return RUNG_CORRELATIONS[best], float(NOISE_VARIANCES[noise])


def _is_numeric(choice: Choice) -> bool:
    """Whether all options are numbers, so that neighbouring ones are similar."""
    return not choice.branches and all(isinstance(each, int | float) and not isinstance(each, bool) for each in choice.labels)


def _option_positions(parameter: Parameter) -> dict[Scalar, float] | None:
    """Option -> its index, or its position from 0 to 1 if all options are numbers; None for a range."""
    if not isinstance(parameter, Choice):
        return None
    if not _is_numeric(parameter):
        return {label: float(index) for index, label in enumerate(parameter.labels)}
    steps = max(1, len(parameter.labels) - 1)  # options count as evenly spaced
    return {label: index / steps for index, label in enumerate(sorted(parameter.labels, key=lambda label: float(str(label))))}


def _position_in_range(parameter: Parameter, value: Scalar) -> float:
    """Position of a value in its range, from 0 to 1."""
    assert not isinstance(parameter, Choice)
    low, high, at = float(parameter.low), float(parameter.high), float(str(value))
    if parameter.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low) if high > low else 0.0
