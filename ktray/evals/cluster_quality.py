"""Cluster quality: how well the pseudo-labels agree with the classes, and how balanced the clusters are.

It evaluates the student's targets before any student is trained. Images that the transfer left out (-1) do not count.

Source: Strehl and Ghosh, "Cluster Ensembles" (2002), section 2, for normalised mutual information; Manning, Raghavan and
Schuetze, "Introduction to Information Retrieval" (2008), section 16.3, for purity.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from ktray.clustering import pseudo_labelling
from ktray.errors import UserError
from ktray.images import Images
from ktray.spec import EvaluationFields, Pooling

REVISION = 1
TOOLS = (pseudo_labelling,)
NEEDS_LABELS = False
MAY_READ_LABELS = ("train",)  # `nmi` and `purity` are computed only where labels exist
READS_PSEUDO_LABELS = True  # and no features, so its stage does not depend on the student
DIRECTION: dict[str, Literal["max", "min"]] = {
    "nmi": "max",
    "purity": "max",
    "clusters": "max",
    "largest_share": "min",
    "smallest": "max",
}


class Spec(EvaluationFields):
    """Compares pseudo-labels with classes. No network is read, so its layers and precision do not apply."""

    kind: Literal["cluster_quality"] = "cluster_quality"
    layer: None = Field(default=None, description="always null")
    network_precision: None = Field(default=None, description="always null")

    @model_validator(mode="after")
    def _reads_no_features(self) -> Spec:
        if self.pool != Pooling():
            raise ValueError("cluster_quality reads pseudo-labels, not features; leave 'pool' out")
        return self


def evaluate(
    spec: Spec,
    *,
    features: Callable[[Images], NDArray[np.float32]],
    train: Images,
    judged: Images,
    pseudo_labels: NDArray[np.int64] | None,
    out: Path,
    device: str,
) -> dict[str, float]:
    """Sizes of the clusters, and their agreement with the labels of `train` where it has labels.

    `clusters` is the number of clusters that are not empty, `largest_share` in [0, 1] the share of images in the largest of
    them, and `smallest` the number of images in the smallest. `nmi` in [0, 1] is normalised by the mean of both entropies.
    `purity` in [0, 1] is the share of images that belong to the majority class of their cluster; splitting a cluster never
    lowers it, so compare it only at equal k. All metrics are 0 if no image is kept.

    Args:
        features, judged, device: not read.
        train: the N images of the transfer data, labels (N,) int64 >= 0 or None.
        pseudo_labels: (N,) int64 >= -1, -1 = left out; None if the transfer makes none.
        out: nothing is written there.

    Raises:
        UserError: the pair's transfer makes no pseudo-labels.
        ValueError: there is not one pseudo-label per image of `train`.
    """
    if pseudo_labels is None:
        raise UserError("cluster_quality needs pseudo-labels, and this transfer makes none", instead="Use transfer: clusters.")
    if len(pseudo_labels) != len(train):
        raise ValueError(f"there are {len(pseudo_labels)} pseudo-labels for {len(train)} images")
    kept = pseudo_labels >= 0
    names, assigned = np.unique(pseudo_labels[kept], return_inverse=True)
    sizes = np.bincount(assigned, minlength=len(names))
    metrics = {
        "clusters": float(len(names)),
        "largest_share": float(sizes.max() / sizes.sum()) if len(names) else 0.0,
        "smallest": float(sizes.min()) if len(names) else 0.0,
    }
    if train.labels is not None:
        metrics["nmi"] = pseudo_labelling.nmi(pseudo_labels, train.labels) if len(names) else 0.0
        metrics["purity"] = purity(assigned, train.labels[kept])
    return metrics


def purity(assigned: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Share in [0, 1] of the images that belong to the most frequent class of their cluster; 0 without images.

    Args:
        assigned: (N,) clusters, >= 0.
        labels: (N,) classes, >= 0.
    """
    if not len(assigned):
        return 0.0
    classes = int(labels.max()) + 1
    counts = np.bincount(assigned * classes + labels, minlength=(int(assigned.max()) + 1) * classes)
    return float(counts.reshape(-1, classes).max(1).sum() / len(assigned))
