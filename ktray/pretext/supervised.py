"""The ceiling of teachers: classification of the images' own labels. Labels are used, and the report says so.

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
    """Random views of the images, as a student has them."""

    kind: Literal["supervised"] = "supervised"
    augment: Augment = Augment()


def task(spec: Spec, size: int, images: Images) -> Task:
    """A linear head that predicts each image's label; "top1" over the views trained on.

    Args:
        size: side of the images in pixels; any.
        images: with labels in [0, K), or -1 for images to leave out.

    Raises:
        ValueError: the images have no labels.
    """
    if images.labels is None:
        raise ValueError("the pretext task 'supervised' needs labelled images, and this data has no labels")
    return classification.task(images.labels, len(images.classes) or int(images.labels.max()) + 1, spec.augment)
