"""Random clusters, a control: the student learns classes that mean nothing, as many as there were clusters. No teacher.

What a student gains from `clusters` beyond this comes from the teacher, and not from training against any labels at all. The
clusters of a network with random weights, another control, are those of the descriptor `random_network`.

Source: Zhang, Bengio, Hardt, Recht, Vinyals, "Understanding deep learning requires rethinking generalization", ICLR 2017,
arXiv:1611.03530, section 2, for training on random labels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ktray.fingerprint import seed_of
from ktray.spec import Augment, Seed
from ktray.strict import StrictSpec
from ktray.training import classification
from ktray.training.targets import Targets, require_images
from ktray.training.task import Task

REVISION = 1
TOOLS = (classification,)

NEEDS: dict[str, tuple[str, ...]] = {}


class Spec(StrictSpec):
    """Every image in one of k classes, by a seeded shuffle; the sizes of the classes differ by at most one image."""

    kind: Literal["random_clusters"] = "random_clusters"
    k: int = Field(default=500, ge=2, description="classes")
    seed: Seed = 0


def check(spec: Spec, count: int, clustered: int) -> None:
    """Refuse more classes than images.

    Args:
        count: number of images that the student is trained on.
        clustered: number of images whose features are clustered; none here.

    Raises:
        UserError: there are too few images.
    """
    require_images(spec.k, count)


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Classification of random labels by a linear head.

    Raises:
        ValueError: there are fewer images than classes.
    """
    return classification.task(labels(targets.count, spec.k, spec.seed), spec.k, augment)


def labels(count: int, k: int, seed: int) -> NDArray[np.int64]:
    """(count,) int64 in [0, k): a function of the arguments alone.

    Raises:
        ValueError: there are fewer images than classes.
    """
    if k > count:
        raise ValueError(f"k={k} classes cannot be made of {count} images")
    return np.random.default_rng(seed_of(seed, "random clusters", count)).permutation(count) % k
