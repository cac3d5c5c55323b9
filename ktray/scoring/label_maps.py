"""Scores of label maps, which give every pixel a class: mean intersection over union (mIoU), pixels of no class left out.

Source: VOCevalseg.m of PASCAL VOC's devkit: over all images together, the pixels of a class that are right, over those that are
of the class or were given it; then the mean over classes.

Legend: C classes, the background included.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ktray.images import VOID

IDENTITY, REVISION = "label_maps", 1


def confusion(truth: NDArray[np.integer], predicted: NDArray[np.integer], classes: int) -> NDArray[np.int64]:
    """Pixels (C, C) by true class (row) and predicted class (column); those whose truth is `VOID` are left out.

    Raises:
        ValueError: the maps differ in shape, or have a value outside [0, C).
    """
    if truth.shape != predicted.shape:
        raise ValueError(f"a map of {predicted.shape} pixels was predicted for one of {truth.shape}")
    known = truth != VOID
    rows, columns = truth[known].astype(np.int64), predicted[known].astype(np.int64)
    for values in (rows, columns):
        if len(values) and not 0 <= values.min() <= values.max() < classes:
            raise ValueError(f"a label map has values in [{values.min()}, {values.max()}], and there are {classes} classes")
    return np.bincount(rows * classes + columns, minlength=classes**2).reshape(classes, classes)


def ious(pixels: NDArray[np.int64]) -> NDArray[np.float64]:
    """IoU (C,) of each class from the `confusion` of all images; NaN for one that is in no map, neither true nor predicted."""
    return ious_of(np.diag(pixels), pixels.sum(1), pixels.sum(0))


def ious_of(right: NDArray[np.int64], truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> NDArray[np.float64]:
    """The same from the pixels (C,) that are right, that are of each class, and that were predicted as it."""
    union = truth + predicted - right
    found = np.full(len(right), np.nan)
    np.divide(right, union, out=found, where=union > 0)
    return found
