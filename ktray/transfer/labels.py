"""Supervised training of the student on the labels of the data: an upper bound. There is no teacher.

Source: the row "Supervised" in the tables of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385.
"""

from __future__ import annotations

from typing import Literal

from ktray.spec import Augment
from ktray.strict import StrictSpec
from ktray.training import classification
from ktray.training.task import Targets, Task

REVISION = 1
TOOLS = (classification,)

NEEDS: dict[str, tuple[str, ...]] = {"labels": ()}


class Spec(StrictSpec):
    """No fields."""

    kind: Literal["labels"] = "labels"


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Classification of labels by a linear head.

    Raises:
        ValueError: a label lies outside [-1, K); -1 means no label.
    """
    return classification.joint_task(targets.heads, augment)
