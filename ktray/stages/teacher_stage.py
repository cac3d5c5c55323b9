"""Make a teacher: train it on its pretext task, fit a descriptor, or import existing weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ktray import plugins
from ktray.artifact import Artifact, Stage
from ktray.checksums import intact
from ktray.fingerprint import require_sha256
from ktray.ops import resizing
from ktray.pool import StageContext
from ktray.spec import Augment, HandcraftedTeacher, LoadedTeacher, TrainedTeacher
from ktray.stages import training_segment
from ktray.stages.images_stage import open_images
from ktray.training import pretrained, timm_weights
from ktray.training.checkpoint_file import WHERE
from ktray.training.timm_weights import NamedNetwork

IDENTITY, REVISION = "stage.teacher", 1
TOOLS = (training_segment,)


def trained(teacher: TrainedTeacher, images: str, locations: Mapping[str, Any]) -> Callable[[int], Stage]:
    """A function epoch -> the stage that trains a teacher on its pretext task up to the end of that epoch.

    Args:
        images: key of the images of the pretext task.
        locations: of their data set (`images.location_fields`).
    """
    sized, tools = training_segment.resizing_of(teacher)
    fields = {"pretext": teacher.pretext.model_dump(), "backbone": teacher.backbone.model_dump(), "seed": teacher.seed, **sized}
    augment = getattr(teacher.pretext, "augment", None)
    tools += training_segment.tools_of(teacher.schedule, augment if isinstance(augment, Augment) else None)
    revisions = plugins.revisions(sys.modules[__name__], teacher.pretext, teacher.backbone, *tools)
    inputs, local = {"images.pretext": images}, {"data": {"images.pretext": locations}}

    def trained_stage_at(epoch: int) -> Stage:
        return Stage("teacher", training_segment.spec_at(epoch, teacher.schedule, fields), revisions, inputs, local=local)

    return trained_stage_at


def loaded(teacher: LoadedTeacher, sha256: str | None, taken: str = "") -> Stage:
    """The stage that imports weights.

    Args:
        sha256: of the weights in the file or folder ``teacher.checkpoint``; None if that is the key of an artifact.
        taken: what is taken from a file (`pretrained.Weights.summary`), for its record.
    """
    spec: dict[str, Any] = {"checkpoint": sha256 or teacher.checkpoint, "backbone": teacher.backbone.model_dump()}
    if sha256 is None:
        revisions = plugins.revisions(sys.modules[__name__], teacher.backbone)
        return Stage("teacher", spec, revisions, {"snapshot": teacher.checkpoint})
    spec |= {"key": teacher.key, "prefix": teacher.prefix}
    revisions = plugins.revisions(sys.modules[__name__], pretrained, teacher.backbone)
    local = {"checkpoint": str(pretrained.checkpoint_path(teacher.checkpoint))}
    return Stage("teacher", spec, revisions, local=local, about={"weights": taken})


def named(network: NamedNetwork, sha256: str) -> Stage:
    """The stage that imports pretrained weights, found by their name.

    Args:
        sha256: of the file with the weights.
    """
    spec = {
        "weights": sha256,
        "backbone": network.backbone.model_dump(),
        "own_image": network.own_backbone.model_dump()["image"],
    }
    revisions = plugins.revisions(sys.modules[__name__], timm_weights, network.backbone)
    about = {"weights": f"{network.name}, {network.place}", "licence": network.licence}
    return Stage("teacher", spec, revisions, local={"weights": str(network.file)}, about=about)


def fitted(teacher: HandcraftedTeacher, images: str, locations: Mapping[str, Any]) -> Stage:
    """The stage that fits a descriptor.

    Args:
        images: key of the images that it is fitted to.
        locations: of their data set (`images.location_fields`).
    """
    spec = {"descriptor": teacher.descriptor.model_dump()}
    revisions = plugins.revisions(sys.modules[__name__], teacher.descriptor)
    return Stage("teacher", spec, revisions, {"images.cluster": images}, local={"data": {"images.cluster": locations}})


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write a snapshot (`weights.safetensors`, ...) or, for a descriptor that is fitted, `state.npz`."""
    if "pretext" in stage.spec:
        images = open_images(stage, "images.pretext", inputs, "train")
        images = resizing.at_size(images, stage.spec.get(training_segment.IMAGE_SIZE))
        pretext = plugins.parse("pretext", stage.spec["pretext"])
        module = plugins.module_of("pretext", pretext)
        task = module.task(pretext, images.size, images) if hasattr(module, "NEEDS") else module.task(pretext, images.size)
        return training_segment.run_training(stage, task, images, out, context, start)
    if "checkpoint" in stage.spec:
        return {"parameters": float(_import(stage, inputs, out))}
    if "weights" in stage.spec:
        return {"parameters": float(_import_named(stage, out))}
    descriptor = plugins.parse("descriptor", stage.spec["descriptor"])
    images = open_images(stage, "images.cluster", inputs, "train")
    state = plugins.module_of("descriptor", descriptor).fit(descriptor, images)
    np.savez(out / "state.npz", **state)
    return {}


def _import(stage: Stage, inputs: Mapping[str, Artifact], out: Path) -> int:
    spec = plugins.parse("backbone", stage.spec["backbone"])
    if "snapshot" in inputs:
        snapshot = inputs["snapshot"].directory
        intact(pretrained.weights_file(snapshot))
        return pretrained.import_weights(spec, snapshot, out)
    checkpoint = Path(stage.local["checkpoint"])
    _require_unchanged(checkpoint, stage.spec["checkpoint"])
    parameters = pretrained.import_weights(spec, checkpoint, out, stage.spec["key"], stage.spec["prefix"])
    _require_unchanged(checkpoint, stage.spec["checkpoint"])  # it may have been replaced while it was being read
    return parameters


def _import_named(stage: Stage, out: Path) -> int:
    file, expected = Path(stage.local["weights"]), stage.spec["weights"]
    require_sha256(file, expected, timm_weights.WEIGHTS)
    backbone = plugins.parse("backbone", stage.spec["backbone"])
    own = plugins.parse("backbone", {**stage.spec["backbone"], "image": stage.spec["own_image"]})
    parameters = timm_weights.write_snapshot(file, backbone, own, out)
    require_sha256(file, expected, timm_weights.WEIGHTS)  # it may have been replaced while it was being read
    return parameters


def _require_unchanged(checkpoint: Path, expected: str) -> None:
    require_sha256(pretrained.weights_file(checkpoint), expected, WHERE)
