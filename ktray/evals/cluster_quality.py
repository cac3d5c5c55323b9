"""Cluster quality: how well the pseudo-labels agree with the classes, and how evenly they are spread.

Judges what the student learns from, before any student is trained. Images that the transfer left out (-1) do not count.

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

from ktray import spec as specs
from ktray.errors import UserError
from ktray.images import Images

REVISION = 1
NEEDS_LABELS = False
DIRECTION: dict[str, Literal["max", "min"]] = {
    "nmi": "max",
    "purity": "max",
    "clusters": "max",
    "largest_share": "min",
    "smallest": "max",
}


class Spec(specs.Spec):
    """Pseudo-labels against classes; there is no network to choose a layer of."""

    kind: Literal["cluster_quality"] = "cluster_quality"
    name: str | None = None
    of: Literal["student", "teacher"] = "student"
    layer: None = Field(default=None, description="always null")
    pool: specs.Pooling = specs.Pooling()
    split: Literal["val", "test"] = "val"

    @model_validator(mode="after")
    def _reads_no_features(self) -> Spec:
        if self.pool != specs.Pooling():
            raise ValueError("cluster_quality reads pseudo-labels and no features; leave 'pool' out")
        return self


def evaluate(
    spec: Spec,
    *,
    features: Callable[[Images], NDArray[np.float32]],
    train: Images,
    judged: Images,
    pseudo_labels: NDArray[np.int64] | None,
    out: Path,
) -> dict[str, float]:
    """Sizes of the clusters, and their agreement with the labels of `train` where it has labels.

    `clusters` counts those that are not empty; `largest_share` in [0, 1] and `smallest` (images) are of those. `nmi` in [0, 1]
    is normalised by the mean of both entropies. `purity` in [0, 1] is the share of images in the majority class of their
    cluster; splitting a cluster never lowers it, so compare it at equal k. With no image kept, everything is 0.

    Raises:
        UserError: the pair's transfer makes no pseudo-labels.
        ValueError: there is not one pseudo-label per image of `train`.
    """
    if pseudo_labels is None:
        raise UserError("cluster_quality judges pseudo-labels, and this transfer makes none", instead="Use transfer: clusters.")
    if len(pseudo_labels) != len(train):
        raise ValueError(f"{len(pseudo_labels)} pseudo-labels do not belong to {len(train)} images")
    kept = pseudo_labels >= 0
    names, assigned = np.unique(pseudo_labels[kept], return_inverse=True)
    sizes = np.bincount(assigned, minlength=len(names))
    metrics = {
        "clusters": float(len(names)),
        "largest_share": float(sizes.max() / sizes.sum()) if len(names) else 0.0,
        "smallest": float(sizes.min()) if len(names) else 0.0,
    }
    if train.labels is not None:
        metrics |= agreement(contingency(assigned, train.labels[kept]))
    return metrics


def contingency(assigned: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts (K, C) of the images in each cluster and class, from two (N,) arrays of indices >= 0."""
    clusters, classes = int(assigned.max(initial=-1)) + 1, int(labels.max(initial=-1)) + 1
    return np.bincount(assigned * classes + labels, minlength=clusters * classes).reshape(clusters, classes)


def agreement(counts: NDArray[np.int64]) -> dict[str, float]:
    """`nmi` and `purity`, both in [0, 1], of counts (K, C); both 0 without images.

    Two partitions of one part each agree fully (nmi 1), one part against several tells nothing (nmi 0), as in scikit-learn.
    """
    total = int(counts.sum())
    if not total:
        return {"nmi": 0.0, "purity": 0.0}
    by_cluster, by_class, joint = (_entropy(part / total) for part in (counts.sum(1), counts.sum(0), counts.ravel()))
    mean = (by_cluster + by_class) / 2
    information = max(by_cluster + by_class - joint, 0.0)
    nmi = min(information / mean, 1.0) if mean > 0 else 1.0
    return {"nmi": nmi, "purity": float(counts.max(1).sum() / total)}


def _entropy(shares: NDArray[np.float64]) -> float:
    present = shares[shares > 0]
    return max(float(-(present * np.log(present)).sum()), 0.0)
