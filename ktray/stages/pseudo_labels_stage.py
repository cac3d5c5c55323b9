"""Give every image of the transfer data the number of its nearest cluster."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ktray import plugins, progress
from ktray.artifact import Artifact, Stage
from ktray.checksums import intact
from ktray.clustering import grid, kmeans, projection, pseudo_labelling
from ktray.clustering.grid import Codebook
from ktray.features import extraction
from ktray.pool import StageContext
from ktray.spec import TransferSpec
from ktray.stages.clusters_stage import LABELS, Clustering, rows_of
from ktray.stages.images_stage import open_images

IDENTITY, REVISION = "stage.pseudo_labels", 1
TOOLS = (grid, kmeans, projection, pseudo_labelling)

_DEFAULTS = {"min_size": 1, "small": "drop", "neighbours": 0}
"""Values for a transfer without these fields: every cluster is kept, and only the nearest is stored."""


def stage_of(transfer: TransferSpec, clustering: Clustering, inputs: Mapping[str, str], locations: Mapping[str, Any]) -> Stage:
    """The stage that gives images their pseudo-labels.

    Args:
        clustering: which one of the transfer's.
        inputs: keys of ``features``, ``clusters`` and ``images.transfer``.
        locations: of the data set of the transfer (`images.location_fields`).
    """
    fields = plugins.module_of("transfer", transfer).NEEDS["pseudo_labels"]
    rows = {"rows": dict(clustering.rows)} if clustering.rows else {}
    spec = {**_DEFAULTS, **transfer.model_dump(include=set(fields)), **rows}
    revisions = {**plugins.revisions(sys.modules[__name__]), **clustering.revisions}
    return Stage("pseudo_labels", spec, revisions, inputs, local={"data": {"images.transfer": locations}})


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write `labels.npy` (N,) int64 with -1 for images left out, and a sheet of images per cluster.

    Labels of positions are (N, positions); the sheet then shows the images in which a cluster has most positions.

    Where the spec has `neighbours` m, also `nearest.npy` (N, m) int32, the nearest clusters, the nearest first, and
    `squared.npy` (N, m) float32, the squared distances to them in the projected space.

    Raises:
        ValueError: no image is left.
    """
    clusters = inputs["clusters"].directory
    codebook = Codebook.load(clusters / "codebook.npz")
    with np.load(intact(clusters / "projection.npz"), allow_pickle=False) as file:
        project = dict(file)
    shards, spec = extraction.shards(inputs["features"].directory), stage.spec
    if inputs["clusters"].record["inputs"]["features"] == inputs["features"].key and (clusters / LABELS).exists():
        labels = np.load(intact(clusters / LABELS), allow_pickle=False).astype(np.int64)  # the same images were clustered
        progress.advance("shards", len(shards))
    else:
        with rows_of(shards, spec, out) as rows:
            labels = pseudo_labelling.assign(rows, codebook, project, context.pool)
    if spec["small"] == "merge":
        labels = pseudo_labelling.merge_small(labels, codebook, spec["min_size"])
    else:
        labels = pseudo_labelling.drop_small(labels, len(codebook.points), spec["min_size"])
    if not (labels >= 0).any():
        raise ValueError(f"every cluster has fewer than min_size={spec['min_size']} images: no image is left to learn from")
    np.save(out / "labels.npy", labels)
    if spec["neighbours"]:
        nearest, squared = pseudo_labelling.nearest(shards, codebook, project, spec["neighbours"], context.pool)
        np.save(out / "nearest.npy", nearest)
        np.save(out / "squared.npy", squared)
    images = open_images(stage, "images.transfer", inputs, "train")
    if len(labels) > len(images):  # of positions, which are all kept
        dense = labels.reshape(len(images), -1)
        np.save(out / "labels.npy", dense)
        pseudo_labelling.write_contact_sheet(images, pseudo_labelling.most_frequent(dense), out / "clusters.png")
        return {"entropy": pseudo_labelling.entropy(labels), "kept": pseudo_labelling.kept_share(labels)}
    pseudo_labelling.write_contact_sheet(images, labels, out / "clusters.png")
    metrics = {"entropy": pseudo_labelling.entropy(labels), "kept": pseudo_labelling.kept_share(labels)}
    if images.labels is not None:
        metrics["nmi"] = pseudo_labelling.nmi(labels, images.labels)
    return metrics
