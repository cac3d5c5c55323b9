"""Turn the images of one role into features, in shards; several layers of one teacher by one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ktray import features as tools
from ktray.artifact import Artifact, Stage
from ktray.pool import Means


def run(stage: Stage, inputs: Mapping[str, Artifact], out: Path, means: Means, start: Path | None) -> Mapping[str, float]:
    """Write ``features-00000.npy`` and so on, (n, D) each; metrics `dim` and `images_per_s`."""
    return tools.write(_source(stage, inputs, means), out, means.pool)


def run_family(
    stages: Sequence[Stage], inputs: Mapping[str, Artifact], outs: Sequence[Path], means: Means
) -> list[tuple[dict[str, float], float]]:
    """`run` for stages that differ in layer and pooling; metrics of each, and the seconds of work that it alone would cost."""
    return tools.write_views([_source(stage, inputs, means) for stage in stages], outs, means.pool)


def _source(stage: Stage, inputs: Mapping[str, Artifact], means: Means) -> dict[str, Any]:
    teacher = inputs.get("teacher")
    return {
        "teacher": stage.local["teacher"],
        "weights": str(teacher.directory) if teacher and (teacher.directory / "weights.safetensors").exists() else None,
        "state": str(teacher.directory) if teacher and (teacher.directory / "state.npz").exists() else None,
        "images": str(inputs["images"].directory),
        "data": stage.local["data"],
        "split": "train",
        "dtype": stage.spec["dtype"],
        "device": means.device,
        "most": means.most_images,
    }
