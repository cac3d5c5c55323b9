"""The ceiling: the student learns from the labels of the data, as in ordinary supervised training. No teacher.

Source: the row "Supervised" in the tables of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ktray import classification
from ktray.spec import Augment
from ktray.spec import Spec as SpecBase
from ktray.task import Task

REVISION = 1
TOOLS = (classification,)

NEEDS: dict[str, tuple[str, ...]] = {"labels": ()}


class Spec(SpecBase):
    """Nothing to choose."""

    kind: Literal["labels"] = "labels"


def task(spec: Spec, targets: NDArray[np.int64], classes: int, augment: Augment) -> Task:
    """Classification of labels by a linear head.

    Args:
        targets: (N,) int64 in [-1, classes), -1 = no label.
        classes: K.

    Raises:
        ValueError: a target is outside of [-1, classes).
    """
    return classification.task(targets, classes, augment)
