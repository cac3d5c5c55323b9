"""Turn the images of one role into features, in shards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ktray import features as tools
from ktray.artifact import Artifact, Stage
from ktray.pool import Means


def run(stage: Stage, inputs: Mapping[str, Artifact], out: Path, means: Means, start: Path | None) -> Mapping[str, float]:
    """Write ``features-00000.npy`` and so on, (n, D) each; metrics `dim` and `images_per_s`."""
    teacher = inputs.get("teacher")
    source = {
        "teacher": stage.local["teacher"],
        "weights": str(teacher.directory) if teacher and (teacher.directory / "weights.safetensors").exists() else None,
        "state": str(teacher.directory) if teacher and (teacher.directory / "state.npz").exists() else None,
        "images": str(inputs["images"].directory),
        "data": stage.local["data"],
        "split": "train",
        "dtype": stage.spec["dtype"],
        "device": means.device,
    }
    return tools.write(source, out, means.pool)
