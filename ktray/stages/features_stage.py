"""Turn the images of one role into features, in shards; several layers of one teacher by one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktray import plugins
from ktray.artifact import Artifact, Stage
from ktray.features import extraction, precomputed
from ktray.fingerprint import require_sha256
from ktray.images import open_split
from ktray.pool import StageContext
from ktray.spec import PrecomputedTeacher

IDENTITY, REVISION = "stages.features", 1


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write ``features-00000.npy`` and so on, (n, D) each; metrics `dim` and `images_per_s`."""
    if "features" in stage.spec:
        return _taken(stage, inputs, out)
    return extraction.write(_source(stage, inputs, context), out, context.pool)


def run_family(
    stages: Sequence[Stage], inputs: Mapping[str, Artifact], outs: Sequence[Path], context: StageContext
) -> list[tuple[dict[str, float], float]]:
    """`run` for stages that differ in layer and pooling; metrics of each, and the seconds of work that it alone would cost."""
    return extraction.write_views([_source(stage, inputs, context) for stage in stages], outs, context.pool)


def _source(stage: Stage, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
    teacher = inputs.get("teacher")
    return {
        "teacher": stage.local["teacher"],
        "weights": str(teacher.directory) if teacher and (teacher.directory / "weights.safetensors").exists() else None,
        "state": str(teacher.directory) if teacher and (teacher.directory / "state.npz").exists() else None,
        "images": str(inputs["images"].directory),
        "data": stage.local["data"],
        "split": "train",
        "dtype": stage.spec["dtype"],
        "device": context.device,
        "most_images": context.most_images,
    }


def _taken(stage: Stage, inputs: Mapping[str, Artifact], out: Path) -> Mapping[str, float]:
    data = plugins.parse("dataset", stage.local["data"])
    images = open_split(inputs["images"].directory, "train", data)
    with reading(stage.local["teacher"], stage.spec["features"], data) as read:
        return precomputed.write(read, images, stage.spec["dtype"], out)


@contextmanager
def reading(teacher: Mapping[str, Any], expected: Mapping[str, Any], data: Any) -> Iterator[precomputed.Read]:
    """Read ready-made features, if their files are what they were when the run was planned, before and after.

    Args:
        teacher: dump of a ReadyTeacher.
        expected: `identity.features_identity` of it.
        data: spec of the data set whose images are asked for.

    Raises:
        UserError: a file has changed, or as `ready_features.reader`.
    """
    spec = PrecomputedTeacher.model_validate(teacher)
    files = precomputed.files(spec)
    hashes = {"features": expected["file"], "names": expected["names"]}
    for field, file in files.items():
        require_sha256(file, hashes[field], f"teacher.{field}")
    in_order = plugins.module_of("dataset", data).load(data).train.names if precomputed.by_row(spec) else ()
    yield precomputed.reader(spec, in_order)
    for field, file in files.items():
        require_sha256(file, hashes[field], f"teacher.{field}")
