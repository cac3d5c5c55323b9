"""Average precision as PASCAL VOC defines it: the mean of eleven precisions (2007), and the area below the curve (since 2010).

Images of equal score keep their order, as in the development kit. A recall counts as reached by exact comparison of whole numbers,
so that three of ten found is a recall of 0.3.

Source: Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge" (2010), section 3.4.1; the development kits of 2007
and 2010.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IDENTITY, REVISION = "average_precision", 1


@dataclass(frozen=True)
class Curve:
    """Precision and recall after each answer, the most confident first.

    Attributes:
        found: (n,) int64, true answers so far.
        precision: (n,) float64.
        positives: how many there are to find.
    """

    found: NDArray[np.int64]
    precision: NDArray[np.float64]
    positives: int

    def recall(self) -> NDArray[np.float64]:
        """(n,) float64."""
        return self.found / max(self.positives, 1)


def curve_of_answers(scores: NDArray[np.floating], true: NDArray[np.bool_], positives: int) -> Curve:
    """The curve of n answers, such as detections.

    Args:
        scores: (n,) confidences.
        true: (n,) whether an answer is right.
        positives: how many right answers there are, found or not.
    """
    order = np.argsort(-scores.astype(np.float64), kind="stable")
    found = np.cumsum(true[order].astype(np.int64))
    return Curve(found, found / np.arange(1, len(found) + 1), positives)


def curve_of_images(scores: NDArray[np.floating], presence: NDArray[np.int8]) -> Curve:
    """The curve of a class in N images: `presence` is 1 where the class is, -1 where it is not, and 0 leaves an image out."""
    judged = presence != 0
    return curve_of_answers(scores[judged], presence[judged] > 0, int((presence > 0).sum()))


def eleven_point(curve: Curve) -> float:
    """The mean, over the recalls 0, 0.1, ..., 1, of the highest precision at that recall or more; NaN without positives."""
    if not curve.positives:
        return float("nan")
    reached = [curve.precision[10 * curve.found >= tenths * curve.positives] for tenths in range(11)]
    return float(sum(each.max() if len(each) else 0.0 for each in reached) / 11)


def area(curve: Curve) -> float:
    """The area below the curve after each precision is raised to the highest at that recall or more; NaN without positives."""
    if not curve.positives:
        return float("nan")
    raised = np.maximum.accumulate(curve.precision[::-1])[::-1]
    steps = np.diff(curve.found, prepend=0)
    return float((raised * steps).sum() / curve.positives)
