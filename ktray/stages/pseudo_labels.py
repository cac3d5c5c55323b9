"""Give every image of the transfer data the number of its nearest cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ktray import features
from ktray import pseudo_labels as tools
from ktray.artifact import Artifact, Stage
from ktray.pool import Means
from ktray.stages.images import open_images

REVISION = 1


def run(stage: Stage, inputs: Mapping[str, Artifact], out: Path, means: Means, start: Path | None) -> Mapping[str, float]:
    """Write `labels.npy` (N,) int64 with -1 for images left out, and a sheet of images per cluster.

    Where the spec has `neighbours` m, also `nearest.npy` (N, m) int32, the nearest clusters, the nearest first, and
    `squared.npy` (N, m) float32, the squared distances to them in the projected space.

    Raises:
        ValueError: no image is left.
    """
    clusters = inputs["clusters"].directory
    centroids = np.load(clusters / "centroids.npy", allow_pickle=False)
    with np.load(clusters / "projection.npz", allow_pickle=False) as file:
        projection = dict(file)
    shards, spec = features.shards(inputs["features"].directory), stage.spec
    labels = tools.assign(shards, centroids, projection, means.pool)
    if spec["small"] == "merge":
        labels = tools.merge_small(labels, centroids, spec["min_size"])
    else:
        labels = tools.drop_small(labels, len(centroids), spec["min_size"])
    if not (labels >= 0).any():
        raise ValueError(f"every cluster has fewer than min_size={spec['min_size']} images: nothing is left to learn from")
    np.save(out / "labels.npy", labels)
    if spec["neighbours"]:
        nearest, squared = tools.nearest(shards, centroids, projection, spec["neighbours"], means.pool)
        np.save(out / "nearest.npy", nearest)
        np.save(out / "squared.npy", squared)
    images = open_images(stage, "transfer", inputs, "train")
    tools.sheet(images, labels, out / "clusters.png")
    metrics = {"entropy": tools.entropy(labels), "kept": tools.kept(labels)}
    if images.labels is not None:
        metrics["nmi"] = tools.nmi(labels, images.labels)
    return metrics
