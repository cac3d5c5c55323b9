"""The ceiling: the student learns from the labels of the data, as in ordinary supervised training. No teacher.

Source: the row "Supervised" in the tables of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385.
"""

from __future__ import annotations

from typing import Literal

from ktray.spec import Augment
from ktray.strict import StrictSpec
from ktray.training import classification
from ktray.training.targets import Targets
from ktray.training.task import Task

REVISION = 1
TOOLS = (classification,)

NEEDS: dict[str, tuple[str, ...]] = {"labels": ()}


class Spec(StrictSpec):
    """Nothing to choose."""

    kind: Literal["labels"] = "labels"


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Classification of labels by a linear head.

    Raises:
        ValueError: a label is outside of [-1, K); -1 = no label.
    """
    return classification.joint_task(targets.heads, augment)
