"""Train a fresh student to predict what the transfer asks of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ktray import plugins, train
from ktray.artifact import Artifact, Stage
from ktray.images import Images
from ktray.pool import Means
from ktray.spec import Augment
from ktray.stages.images import open_images
from ktray.stages.training import run_training


def run(stage: Stage, inputs: Mapping[str, Artifact], out: Path, means: Means, start: Path | None) -> Mapping[str, float]:
    """Write a snapshot of the student at ``stage.spec["epoch"]``; epoch 0 is the student as drawn."""
    transfer = plugins.parse("transfer", stage.local["transfer"])
    module = plugins.module_of("transfer", transfer)
    if not hasattr(module, "task"):
        return _as_drawn(stage, out)
    images = open_images(stage, "transfer", inputs, "train")
    targets, classes = _targets(inputs, images)
    task = module.task(transfer, targets, classes, Augment.model_validate(stage.spec["augment"]))
    return run_training(stage, task, images, out, means, start)


def _as_drawn(stage: Stage, out: Path) -> dict[str, float]:
    backbone = train.fresh(plugins.parse("backbone", stage.spec["backbone"]), stage.spec["seed"])
    train.write_untrained(backbone, out)
    return {"epoch": 0.0, "parameters": float(sum(p.numel() for p in backbone.parameters()))}


def _targets(inputs: Mapping[str, Artifact], images: Images) -> tuple[NDArray[np.int64], int]:
    """(N,) targets and the number of classes: pseudo-labels where the pair has them, else the images' own labels."""
    if "pseudo_labels" in inputs:
        labels = np.load(inputs["pseudo_labels"].directory / "labels.npy", allow_pickle=False)
        centroids = np.load(inputs["clusters"].directory / "centroids.npy", mmap_mode="r", allow_pickle=False)
        return labels, len(centroids)
    if images.labels is None:
        raise ValueError("the transfer 'labels' needs labelled images, and this data has no labels")
    return images.labels, len(images.classes) or int(images.labels.max()) + 1
