"""Decode a data set once: uint8 pixels, splits, labels, and the list of unreadable images."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktray import images, plugins
from ktray.artifact import Artifact, Stage
from ktray.errors import UserError
from ktray.images import Images, own_crop
from ktray.pool import StageContext
from ktray.spec import TOLERANCE, DataSpec, without_max_unreadable
from ktray.text import some_of

IDENTITY, REVISION = "stage.images", 1
TOOLS = (images,)

DRY_RUN = "dry_run"
"""Field that a dry run adds to the spec of every stage: how many images of each split are taken."""


OWN_CROP = "own_crop"
"""Field of the spec of images that are cropped as the weights of a pretrained network expect them."""


def refuse_unreadable(stage: Stage, made: Artifact) -> None:
    """Refuse decoded images that another tolerance accepted.

    Raises:
        UserError: more of them are unreadable than this stage tolerates.
    """
    count, tolerance = int(made.metrics["unreadable"]), float(stage.local[TOLERANCE])
    total = count + int(made.metrics["count"])
    if count > tolerance * total:
        raise UserError(
            f"{some_of(count, total, 'image', ('is', 'are'))} unreadable, more than max_unreadable={tolerance:g} allows",
            "data",
            "Repair or remove these files, or raise max_unreadable of the data set; ktray data check lists them.",
        )


def stage_of(data: DataSpec, content: str, own: images.OwnCrop | None = None) -> Stage:
    """The stage that decodes a data set.

    Args:
        content: sha256 of its content.
        own: how a pretrained network expects its images; None for squares of the data's size.
    """
    locations = images.location_fields(data)
    spec = {**without_max_unreadable(data).model_dump(exclude=set(locations)), "content": content}
    revisions = plugins.revisions(sys.modules[__name__], data)
    if own is not None:
        spec |= {OWN_CROP: dict(own)}
        revisions |= plugins.revisions(own_crop)
    if getattr(data, "range", None) is not None:
        revisions = {**revisions, f"{images.IDENTITY}.range": images.RANGE_REVISION}
    return Stage("images", spec, revisions, local={"data": {"images": locations}, TOLERANCE: data.max_unreadable})


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write the images of the data set, or a sample of them in a dry run; metrics `count` and `unreadable`."""
    places = {**stage.local["data"]["images"], TOLERANCE: stage.local[TOLERANCE]}
    data, own = _data_spec(stage.spec, places), stage.spec.get(OWN_CROP)
    if DRY_RUN in stage.spec:
        return images.write_sample(data, out, stage.spec[DRY_RUN], own)
    return images.write(data, out, context.pool, context.memmap_bytes, own)


def data_of(stage: Stage, role: str, inputs: Mapping[str, Artifact]) -> DataSpec:
    """The spec of the data set whose images a stage reads as its input `role`, such as ``images.target``."""
    return _data_spec(inputs[role].record["spec"], stage.local["data"][role])


def open_images(stage: Stage, role: str, inputs: Mapping[str, Artifact], split: str) -> Images:
    """One split of the images that a stage reads as its input `role`, such as ``images.target``."""
    return images.open_split(inputs[role].directory, split, data_of(stage, role, inputs))


def _data_spec(spec: Mapping[str, Any], locations: Mapping[str, Any]) -> DataSpec:
    """The spec of a data set, from the spec of its images stage and the locations that this leaves out."""
    own = {name: value for name, value in spec.items() if name not in ("content", OWN_CROP, DRY_RUN)}
    data: DataSpec = plugins.parse("dataset", {**own, **locations})
    return data
