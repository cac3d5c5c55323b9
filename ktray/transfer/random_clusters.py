"""Random clusters: a control that trains the student on k random classes instead of clusters. There is no teacher.

Whatever `clusters` gains over this comes from the teacher, not merely from training on some labels. For another control,
cluster the features of a network with random weights: use the descriptor `random_network` as the teacher.

Source: Zhang, Bengio, Hardt, Recht, Vinyals, "Understanding deep learning requires rethinking generalization", ICLR 2017,
arXiv:1611.03530, section 2, on training with random labels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ktray.fingerprint import seed_of
from ktray.spec import Augment, Seed
from ktray.strict import StrictSpec, added_field
from ktray.text import counted
from ktray.training import classification
from ktray.training.task import Targets, Task, require_images

REVISION = 1
TOOLS = (classification,)

MIXES_IMAGES = True
NEEDS: dict[str, tuple[str, ...]] = {}


class Spec(StrictSpec):
    """Assigns every image to one of k classes by a seeded shuffle; class sizes differ by at most one image."""

    kind: Literal["random_clusters"] = "random_clusters"
    k: int = Field(default=500, ge=2, description="number of classes")
    seed: Seed = 0
    label_smoothing: float = added_field(0.0, ge=0, lt=1, description="share of each target that is spread over all classes")


def check(spec: Spec, count: int, clustered: int) -> None:
    """Refuse more classes than images.

    Args:
        count: number of images that the student is trained on.
        clustered: number of images whose features are clustered; not used.

    Raises:
        UserError: there are too few images.
    """
    require_images(spec.k, count)


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Classification of random labels by a linear head.

    Raises:
        ValueError: there are fewer images than classes.
    """
    return classification.task(random_labels(targets.count, spec.k, spec.seed), spec.k, augment, spec.label_smoothing)


def random_labels(count: int, k: int, seed: int) -> NDArray[np.int64]:
    """Random labels (count,) int64 in [0, k), determined by the arguments alone.

    Raises:
        ValueError: there are fewer images than classes.
    """
    if k > count:
        raise ValueError(f"k={k} classes cannot be made of {counted(count, 'image')}")
    return np.random.default_rng(seed_of(seed, "random clusters", count)).permutation(count) % k
