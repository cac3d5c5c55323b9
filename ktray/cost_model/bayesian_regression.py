"""Bayesian linear regression that is robust against outliers and stays near its prior with few observations.

Source: Bishop, "Pattern Recognition and Machine Learning" (2006), section 3.3; observations are weighted for Student's t errors
as in Lange, Little and Taylor, "Robust Statistical Modeling Using the t Distribution" (JASA 1989), section 2.

n: observations. p: features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DEGREES_OF_FREEDOM = 4.0  # of the t errors
ROUNDS = 8
PRIOR_NOISE, PRIOR_OBSERVATIONS = 0.5, 3.0  # prior of the noise, and its weight in observations
INTERCEPT_DEVIATION = 10.0  # of the intercept's prior, which is nearly flat


@dataclass(frozen=True)
class Posterior:
    """The posterior of p weights and of an intercept, which comes first.

    Attributes:
        weights: (p + 1,) float64, relative to the prior's mean.
        covariance: (p + 1, p + 1) float64, of the weights.
        noise: standard deviation of one observation.
    """

    weights: NDArray[np.float64]
    covariance: NDArray[np.float64]
    noise: float

    def mean(self, row: Sequence[float]) -> float:
        """Expected value for (p + 1,) features, the first of which is 1, relative to the prior's mean."""
        return float(np.array(row) @ self.weights)

    def variance(self, row: Sequence[float]) -> float:
        """Variance of the mean for (p + 1,) features, or for a linear combination of rows, due to the uncertain weights."""
        combined = np.array(row)
        return float(combined @ self.covariance @ combined)


def fit(features: NDArray[np.float64], values: NDArray[np.float64], deviations: NDArray[np.float64]) -> Posterior:
    """The posterior after n observations.

    Args:
        features: (n, p), n at least 1; zero if unknown.
        values: (n,), minus the prior's mean.
        deviations: (p,), standard deviation of each weight's prior, which has mean zero.
    """
    design = np.hstack([np.ones((len(values), 1)), features])
    prior_precision = np.diag(1 / np.concatenate([[INTERCEPT_DEVIATION], deviations]) ** 2)
    trust = _trust(values - np.median(values), PRIOR_NOISE)
    noise = PRIOR_NOISE
    weights: NDArray[Any] = np.zeros(design.shape[1])
    covariance: NDArray[Any] = np.linalg.inv(prior_precision)
    for _ in range(ROUNDS):
        weighted = design * trust[:, None]
        covariance = np.linalg.inv(weighted.T @ design / noise**2 + prior_precision)
        weights = covariance @ (weighted.T @ values) / noise**2
        residuals = values - design @ weights
        used = float(((weighted @ covariance) * design).sum()) / noise**2  # degrees of freedom used by the weights
        free = max(0.0, len(values) - used)
        squares = PRIOR_OBSERVATIONS * PRIOR_NOISE**2 + (trust * residuals**2).sum()
        noise = float(np.sqrt(squares / (PRIOR_OBSERVATIONS + free)))
        trust = _trust(residuals, noise)
    return Posterior(weights, covariance, noise)


def _trust(residuals: NDArray[np.float64], noise: float) -> NDArray[np.float64]:
    """(n,) weights of observations: small for outliers."""
    weights: NDArray[np.float64] = (DEGREES_OF_FREEDOM + 1) / (DEGREES_OF_FREEDOM + (residuals / noise) ** 2)
    return weights
