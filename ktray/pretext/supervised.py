"""Supervised training on the labels of the images: an upper bound for teachers. The report says that labels were used.

Source: the row "Supervised" in the tables of Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385.
"""

from __future__ import annotations

from typing import Literal

from ktray.images import Images
from ktray.spec import Augment
from ktray.strict import StrictSpec
from ktray.training import classification
from ktray.training.task import Task

REVISION = 1
TOOLS = (classification,)

NEEDS = ("labels",)


class Spec(StrictSpec):
    """Random views of the images, augmented as for a student."""

    kind: Literal["supervised"] = "supervised"
    augment: Augment = Augment()


def task(spec: Spec, size: int, images: Images) -> Task:
    """Classification of labels by a linear head. Metric "top1": accuracy over the training views.

    Args:
        size: side of the images in pixels; any.
        images: with labels in [0, K); images with label -1 are left out.

    Raises:
        ValueError: the images have no labels.
    """
    if images.labels is None:
        raise ValueError("the pretext task 'supervised' needs labelled images, and this data has no labels")
    return classification.task(images.labels, len(images.classes) or int(images.labels.max()) + 1, spec.augment)
