"""Give every image of the transfer data the number of its nearest cluster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ktray.artifact import Artifact, Stage
from ktray.clustering import pseudo_labelling
from ktray.features import extraction
from ktray.pool import StageContext
from ktray.stages.images_stage import open_images

IDENTITY, REVISION = "stages.pseudo_labels", 1


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
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
    shards, spec = extraction.shards(inputs["features"].directory), stage.spec
    labels = pseudo_labelling.assign(shards, centroids, projection, context.pool)
    if spec["small"] == "merge":
        labels = pseudo_labelling.merge_small(labels, centroids, spec["min_size"])
    else:
        labels = pseudo_labelling.drop_small(labels, len(centroids), spec["min_size"])
    if not (labels >= 0).any():
        raise ValueError(f"every cluster has fewer than min_size={spec['min_size']} images: nothing is left to learn from")
    np.save(out / "labels.npy", labels)
    if spec["neighbours"]:
        nearest, squared = pseudo_labelling.nearest(shards, centroids, projection, spec["neighbours"], context.pool)
        np.save(out / "nearest.npy", nearest)
        np.save(out / "squared.npy", squared)
    images = open_images(stage, "transfer", inputs, "train")
    pseudo_labelling.sheet(images, labels, out / "clusters.png")
    metrics = {"entropy": pseudo_labelling.entropy(labels), "kept": pseudo_labelling.kept(labels)}
    if images.labels is not None:
        metrics["nmi"] = pseudo_labelling.nmi(labels, images.labels)
    return metrics
