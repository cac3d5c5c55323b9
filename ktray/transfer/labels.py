"""Supervised training of the student on the labels of the data: an upper bound. There is no teacher.

Source: the row "Supervised" in the tables of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385.
"""

from __future__ import annotations

from typing import Literal

from ktray.spec import Augment
from ktray.strict import StrictSpec, added_field
from ktray.training import classification
from ktray.training.task import Targets, Task

REVISION = 1
TOOLS = (classification,)

MIXES_IMAGES = True
NEEDS: dict[str, tuple[str, ...]] = {"labels": ()}


class Spec(StrictSpec):
    """A linear head on the student predicts the label of each image."""

    kind: Literal["labels"] = "labels"
    label_smoothing: float = added_field(0.0, ge=0, lt=1, description="share of each label that is spread over all classes")


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Classification of labels by a linear head.

    Raises:
        ValueError: a label lies outside [-1, K); -1 means no label.
    """
    return classification.joint_task(targets.heads, augment, spec.label_smoothing)
