"""Train a student from random weights on the targets of the transfer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import plugins
from ktray.artifact import Artifact, Stage, numbered
from ktray.checksums import intact
from ktray.features import extraction
from ktray.images import Images
from ktray.pool import StageContext
from ktray.spec import Augment, Student, TransferSpec
from ktray.stages import training_segment
from ktray.stages.images_stage import open_images
from ktray.training import loop, snapshot
from ktray.training.task import Features, Labels, Targets

IDENTITY, REVISION = "stage.student", 1
TOOLS = (training_segment,)


def trained(
    student: Student, transfer: TransferSpec, inputs: Mapping[str, str], locations: Mapping[str, Any], lineage: str
) -> Callable[[int], Stage]:
    """A function epoch -> the stage that trains a student up to the end of that epoch.

    Args:
        inputs: keys of ``images.transfer`` and of what the transfer needs: ``clusters``, ``pseudo_labels``, ``features``.
        locations: of the data set of the transfer (`images.location_fields`).
        lineage: its chain of teachers, for display (`naming.lineage`).
    """
    sized, tools = training_segment.resizing_of(student)
    tools += training_segment.tools_of(student.schedule, student.augment)
    fields = {
        **sized,
        "backbone": student.backbone.model_dump(),
        "augment": student.augment.model_dump(),
        "seed": student.seed,
        "transfer": transfer.model_dump(),
    }
    revisions = plugins.revisions(sys.modules[__name__], transfer, student.backbone, *tools)
    local, about = {"data": {"images.transfer": locations}}, {"lineage": lineage}

    def trained_stage_at(epoch: int) -> Stage:
        spec = training_segment.spec_at(epoch, student.schedule, fields)
        return Stage("student", spec, revisions, inputs, local=local, about=about)

    return trained_stage_at


def untrained(student: Student) -> Stage:
    """The stage of an untrained student. It does not depend on data, schedule or augmentation."""
    spec = {"backbone": student.backbone.model_dump(), "seed": student.seed, "epoch": 0}
    return Stage("student", spec, plugins.revisions(sys.modules[__name__], student.backbone))


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write a snapshot of the student at ``stage.spec["epoch"]``; epoch 0 is the untrained student."""
    if stage.spec["epoch"] == 0:
        return _write_untrained(stage, out)
    transfer = plugins.parse("transfer", stage.spec["transfer"])
    module = plugins.module_of("transfer", transfer)
    images = open_images(stage, "images.transfer", inputs, "train")
    targets = _targets(inputs, images, "labels" in module.NEEDS)
    task = module.task(transfer, targets, Augment.model_validate(stage.spec["augment"]))
    return training_segment.run_training(stage, task, images, out, context, start)


def _write_untrained(stage: Stage, out: Path) -> dict[str, float]:
    backbone = loop.untrained_backbone(plugins.parse("backbone", stage.spec["backbone"]), stage.spec["seed"])
    snapshot.write_untrained(backbone, out)
    return {"epoch": 0.0, "parameters": float(sum(p.numel() for p in backbone.parameters()))}


def _targets(inputs: Mapping[str, Artifact], images: Images, own_labels: bool) -> Targets:
    """The inputs that the transfer needs, opened; large arrays are mapped from their files."""
    heads = tuple(_labels_of(images) for _ in range(own_labels)) or tuple(_pseudo_labels(inputs))
    features = _features(inputs["features"]) if "features" in inputs else None
    found = Targets(len(images), heads, features, images.size)
    lengths = {*(len(head.of_image) for head in heads), *([len(found.features)] if found.features else [])}
    if lengths - {len(images)}:
        raise ValueError(f"there are {len(images)} images, and targets for {sorted(lengths)}")
    return found


def _pseudo_labels(inputs: Mapping[str, Artifact]) -> Iterator[Labels]:
    for index in count():
        if numbered("pseudo_labels", index) not in inputs:
            return
        made, clusters = (inputs[numbered(name, index)].directory for name in ("pseudo_labels", "clusters"))
        labels = np.load(intact(made / "labels.npy"), allow_pickle=False)
        centroids = np.load(intact(clusters / "centroids.npy"), mmap_mode="r", allow_pickle=False)
        yield Labels(labels, len(centroids), _optional(made / "nearest.npy"), _optional(made / "squared.npy"))


def _optional(path: Path) -> NDArray[Any] | None:
    return np.load(intact(path), mmap_mode="r", allow_pickle=False) if path.exists() else None


def _features(made: Artifact) -> Features:
    shards = extraction.shards(made.directory)
    return Features(tuple(np.load(intact(path), mmap_mode="r", allow_pickle=False) for path in shards))


def _labels_of(images: Images) -> Labels:
    if images.labels is None:
        raise ValueError("the transfer 'labels' needs labelled images, and this data has no labels")
    return Labels(images.labels, len(images.classes) or int(images.labels.max()) + 1)
