"""Average precision (AP) by the rules of PASCAL VOC's devkit, from ranked results of which each is right, wrong or ignored.

The devkit of 2007 takes the mean of the best precision at eleven recalls ("voc07"); that of 2010 and later takes the area below
the precision made monotonic ("area"). Neither is scikit-learn's `average_precision_score`, which makes nothing monotonic.

Source: Everingham, Van Gool, Williams, Winn, Zisserman, "The PASCAL Visual Object Classes (VOC) Challenge" (2010), section 4.2;
VOCevalcls.m and VOCevaldet.m of the devkits of 2007 and 2012.

Legend: n results of one class in descending order of their score, C classes, B resamples.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

IDENTITY, REVISION = "average_precision", 1

Rule = Literal["voc07", "area"]
RIGHT, WRONG, IGNORED = 1, -1, 0
"""Values of a result: of a positive, of a negative, of a difficult one, which counts neither for nor against."""

# 0:0.1:1 as MATLAB computes it, from both ends: only 0.3 differs from the decimal number, by one unit in the last place. So the
# recall 3/10 does not reach it.
RECALLS = np.array([*(0.1 * step for step in range(6)), *(1 - 0.1 * step for step in range(4, -1, -1))])


def ranking(scores: NDArray[np.floating]) -> NDArray[np.int64]:
    """Indices (n,) in descending order of the scores. Ties keep their order, as in MATLAB's ``sort(-scores)``.

    Raises:
        ValueError: a score is not a number.
    """
    if np.isnan(scores).any():
        raise ValueError(f"{int(np.isnan(scores).sum())} of {len(scores)} scores are not numbers")
    return np.argsort(-scores, kind="stable")


def precision_recall(
    results: NDArray[np.integer], positives: float, weights: NDArray[np.floating] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Recall (n,) and precision (n,) after each result, in descending order of the scores.

    Precision is NaN as long as all results are ignored; recall is NaN if there are no positives.

    Args:
        results: (n,) RIGHT, WRONG or IGNORED, best score first.
        positives: how many there are to find, without the difficult ones.
        weights: (n,) how often each result counts; None for once. `positives` is counted in the same way.
    """
    each = np.ones(len(results)) if weights is None else weights
    right, wrong = np.cumsum(each * (results == RIGHT)), np.cumsum(each * (results == WRONG))
    with np.errstate(divide="ignore", invalid="ignore"):
        return right / np.float64(positives), right / (right + wrong)


def ap_of(recall: NDArray[np.float64], precision: NDArray[np.float64], rule: Rule) -> float:
    """AP in [0, 1] of `precision_recall`; NaN if there are no positives, 0 if there are but nothing was found.

    Args:
        rule: "voc07" for the mean over eleven recalls, "area" for the area below the monotonic precision.
    """
    if np.isnan(recall).any():
        return float("nan")
    seen = np.nan_to_num(precision, nan=0.0)
    best = np.maximum.accumulate(seen[::-1])[::-1]  # the best precision at this recall or a higher one
    if rule == "voc07":
        first = np.searchsorted(recall, RECALLS)  # the first result with at least this recall
        return float(sum(np.append(best, 0.0)[first]) / 11)
    steps = np.diff(np.concatenate([[0.0], recall]))
    return float((steps * best).sum())


def classification_ap(scores: NDArray[np.floating], truth: NDArray[np.integer], rule: Rule) -> float:
    """AP of one class in [0, 1]; NaN if no image is positive.

    Args:
        scores: (N,), higher for images that are more likely to show the class.
        truth: (N,) 1 if the image shows it, -1 if not, 0 if only as difficult objects: such an image is left out.

    Raises:
        ValueError: a score is not a number.
    """
    results = np.asarray(truth)[ranking(scores)]
    recall, precision = precision_recall(results, float((results == RIGHT).sum()))
    return ap_of(recall, precision, rule) if (results == RIGHT).any() else float("nan")


def resampled_aps(
    results: NDArray[np.integer],
    images: NDArray[np.int64],
    positives: NDArray[np.integer],
    rule: Rule,
    *,
    draws: NDArray[np.int64],
) -> NDArray[np.float64]:
    """APs (B,) of one class on resampled images: a bootstrap, without matching or ranking anything again.

    An image that is drawn twice counts twice, its objects and its results alike. A draw without positives gives NaN.

    Args:
        results: (n,) RIGHT, WRONG or IGNORED, best score first.
        images: (n,) the image of each result.
        positives: (N,) number of objects to find in each image.
        draws: (B, N) how often each image is drawn.
    """
    found = []
    for counts in draws:
        total = float((counts * positives).sum())
        recall, precision = precision_recall(results, total, counts[images].astype(np.float64))
        found.append(ap_of(recall, precision, rule) if total else float("nan"))
    return np.array(found)


def bootstrap_draws(count: int, times: int, seed: int) -> NDArray[np.int64]:
    """How often each of `count` images occurs in each of `times` samples with replacement, (times, count)."""
    generator = np.random.default_rng(seed)
    return generator.multinomial(count, np.full(count, 1 / count), size=times).astype(np.int64)


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of resampled values, those that are NaN left out; NaN if all are."""
    known = values[~np.isnan(values)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)
