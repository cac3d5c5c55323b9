"""Decode a data source once: uint8 pixels, splits, labels, and what was unreadable."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ktray import images, plugins
from ktray.artifact import Artifact, Stage
from ktray.images import Images
from ktray.pool import StageContext

IDENTITY, REVISION = "stages.images", 1


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write the images of ``stage.local["data"]``, or ``stage.local["sample"]`` of them; metrics `count` and `unreadable`."""
    spec = plugins.parse("dataset", stage.local["data"])
    if "sample" in stage.local:
        return images.write_sample(spec, out, stage.local["sample"])
    return images.write(spec, out, context.pool, context.memmap_bytes)


def open_images(stage: Stage, role: str, inputs: Mapping[str, Artifact], split: str) -> Images:
    """The images that a stage reads in the data role `role`, such as ``target``."""
    spec = plugins.parse("dataset", stage.local["data"][role])
    return images.open_split(inputs[f"images.{role}"].directory, split, spec)
