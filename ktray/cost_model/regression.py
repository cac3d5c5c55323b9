"""Bayesian linear regression that an outlier does not bend and that a few observations do not carry far from its prior.

Source: Bishop, "Pattern Recognition and Machine Learning" (2006), section 3.3; the weights are those of Student's t errors as
in Lange, Little and Taylor, "Robust Statistical Modeling Using the t Distribution" (JASA 1989), section 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FREEDOM = 4.0  # of the t errors
ROUNDS = 8
NOISE, WORTH = 0.5, 3.0  # what the noise is before any observation, and how many observations that opinion is worth
CENTRE = 10.0  # standard deviation of the intercept's prior: nearly nothing is known


@dataclass(frozen=True)
class Posterior:
    """The posterior of the weights of p features and of an intercept, which comes first.

    Attributes:
        weights: (p + 1,) float64, relative to the prior's mean.
        covariance: (p + 1, p + 1) float64, of the weights.
        noise: standard deviation of one observation.
    """

    weights: NDArray[np.float64]
    covariance: NDArray[np.float64]
    noise: float


def fit(features: NDArray[np.float64], values: NDArray[np.float64], spread: NDArray[np.float64]) -> Posterior:
    """The posterior after n observations.

    Args:
        features: (n, p), n at least 1; zero where nothing speaks for a deviation.
        values: (n,), less what the prior's mean says of them.
        spread: (p,), standard deviation of each weight's prior around zero.
    """
    design = np.hstack([np.ones((len(values), 1)), features])
    precision = np.diag(1 / np.concatenate([[CENTRE], spread]) ** 2)
    trust = _trust(values - np.median(values), NOISE)
    noise, weights = NOISE, np.zeros(design.shape[1])
    covariance: NDArray[Any] = np.linalg.inv(precision)
    for _ in range(ROUNDS):
        weighted = design * trust[:, None]
        covariance = np.linalg.inv(weighted.T @ design / noise**2 + precision)
        weights = covariance @ (weighted.T @ values) / noise**2
        rest = values - design @ weights
        spent = float(((weighted @ covariance) * design).sum()) / noise**2  # observations that the weights have used up
        free = max(0.0, len(values) - spent)
        noise = float(np.sqrt((WORTH * NOISE**2 + (trust * rest**2).sum()) / (WORTH + free)))
        trust = _trust(rest, noise)
    return Posterior(weights, covariance, noise)


def _trust(rest: NDArray[np.float64], noise: float) -> NDArray[np.float64]:
    weights: NDArray[np.float64] = (FREEDOM + 1) / (FREEDOM + (rest / noise) ** 2)
    return weights
