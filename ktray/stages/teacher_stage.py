"""Make a teacher: train it on its pretext task, fit a descriptor's state, or take weights made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ktray import plugins
from ktray.artifact import Artifact, Stage
from ktray.fingerprint import require_sha256
from ktray.pool import StageContext
from ktray.stages import training_segment
from ktray.stages.images_stage import open_images
from ktray.training import loop, pretrained

IDENTITY, REVISION = "stages.teacher", 1
TOOLS = (training_segment,)


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write a snapshot (`weights.safetensors`, ...) or, for a descriptor that is fitted, `state.npz`."""
    if "pretext" in stage.spec:
        images = open_images(stage, "pretext", inputs, "train")
        pretext = plugins.parse("pretext", stage.spec["pretext"])
        module = plugins.module_of("pretext", pretext)
        task = module.task(pretext, images.size, images) if hasattr(module, "NEEDS") else module.task(pretext, images.size)
        return training_segment.run_training(stage, task, images, out, context, start)
    if "checkpoint" in stage.spec:
        return {"parameters": float(_adopt(stage, inputs, out))}
    descriptor = plugins.parse("descriptor", stage.spec["descriptor"])
    images = open_images(stage, "cluster", inputs, "train")
    state = plugins.module_of("descriptor", descriptor).fit(descriptor, images)
    np.savez(out / "state.npz", **state)
    return {}


def _adopt(stage: Stage, inputs: Mapping[str, Artifact], out: Path) -> int:
    spec = plugins.parse("backbone", stage.spec["backbone"])
    if "snapshot" in inputs:
        return loop.adopt(spec, inputs["snapshot"].directory, out)
    checkpoint = Path(stage.local["checkpoint"])
    _refuse_another(checkpoint, stage.spec["checkpoint"])
    parameters = loop.adopt(spec, checkpoint, out)
    _refuse_another(checkpoint, stage.spec["checkpoint"])  # it may have been replaced while it was read
    return parameters


def _refuse_another(checkpoint: Path, expected: str) -> None:
    require_sha256(pretrained.weights_file(checkpoint), expected, pretrained.WHERE)
