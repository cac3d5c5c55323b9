"""Make a teacher: train it on its pretext task, fit a descriptor's state, or take weights made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ktray import checkpoint as checkpoints
from ktray import plugins, train
from ktray.artifact import Artifact, Stage
from ktray.fingerprint import require_sha256
from ktray.pool import Means
from ktray.stages import training
from ktray.stages.images import open_images

REVISION = 1
TOOLS = (training,)


def run(stage: Stage, inputs: Mapping[str, Artifact], out: Path, means: Means, start: Path | None) -> Mapping[str, float]:
    """Write a snapshot (`weights.safetensors`, ...) or, for a descriptor that is fitted, `state.npz`."""
    if "pretext" in stage.spec:
        images = open_images(stage, "pretext", inputs, "train")
        pretext = plugins.parse("pretext", stage.spec["pretext"])
        module = plugins.module_of("pretext", pretext)
        task = module.task(pretext, images.size, images) if hasattr(module, "NEEDS") else module.task(pretext, images.size)
        return training.run_training(stage, task, images, out, means, start)
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
        return train.adopt(spec, inputs["snapshot"].directory, out)
    checkpoint = Path(stage.local["checkpoint"])
    _refuse_another(checkpoint, stage.spec["checkpoint"])
    parameters = train.adopt(spec, checkpoint, out)
    _refuse_another(checkpoint, stage.spec["checkpoint"])  # it may have been replaced while it was read
    return parameters


def _refuse_another(checkpoint: Path, expected: str) -> None:
    require_sha256(checkpoints.weights_file(checkpoint), expected, checkpoints.WHERE)
