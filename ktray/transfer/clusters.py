"""Cluster classification: the student learns to predict the cluster of each image's teacher features.

Source: Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385 (figure 2; k = 2000 on ImageNet, flat from 500 to
10,000 in table 1). Its normalisation and iterations are not known; L2 and 20 iterations are common practice.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ktray import classification
from ktray.spec import Augment, Seed
from ktray.spec import Spec as SpecBase
from ktray.task import Task

REVISION = 1
TOOLS = (classification,)

NEEDS: dict[str, tuple[str, ...]] = {
    "features": (),
    "clusters": ("k", "l2", "pca", "whiten", "l2_after", "iterations", "seed"),
    "pseudo_labels": ("min_size",),
}


class Spec(SpecBase):
    """k-means on the teacher's features, projected in a fixed order with each step optional: L2, PCA, whiten, L2."""

    kind: Literal["clusters"] = "clusters"
    k: int = Field(default=500, ge=2, description="clusters")
    l2: bool = Field(default=True, description="features to length 1 first")
    pca: int | None = Field(default=None, ge=1, description="components kept; null: no PCA")
    whiten: bool = Field(default=False, description="components to unit variance")
    l2_after: bool = Field(default=False, description="to length 1 again at the end")
    iterations: int = Field(default=20, ge=1, le=1000)
    min_size: int = Field(default=2, ge=1, description="images of smaller clusters are left out")
    seed: Seed = 0


def task(spec: Spec, targets: NDArray[np.int64], classes: int, augment: Augment) -> Task:
    """Classification of pseudo-labels by a linear head.

    Args:
        targets: (N,) int64 in [-1, classes), -1 = left out.
        classes: K.

    Raises:
        ValueError: a target is outside of [-1, classes).
    """
    return classification.task(targets, classes, augment)
