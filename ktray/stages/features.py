"""Turn the images of one role into features, in shards; several layers of one teacher by one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktray import features as tools
from ktray import plugins, ready_features
from ktray.artifact import Artifact, Stage
from ktray.fingerprint import require_sha256
from ktray.images import open_split
from ktray.pool import Means
from ktray.spec import ReadyTeacher

REVISION = 1


def run(stage: Stage, inputs: Mapping[str, Artifact], out: Path, means: Means, start: Path | None) -> Mapping[str, float]:
    """Write ``features-00000.npy`` and so on, (n, D) each; metrics `dim` and `images_per_s`."""
    if "features" in stage.spec:
        return _taken(stage, inputs, out)
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
        "most_images": means.most_images,
    }


def _taken(stage: Stage, inputs: Mapping[str, Artifact], out: Path) -> Mapping[str, float]:
    data = plugins.parse("dataset", stage.local["data"])
    images = open_split(inputs["images"].directory, "train", data)
    with reading(stage.local["teacher"], stage.spec["features"], data) as read:
        return ready_features.write(read, images, stage.spec["dtype"], out)


@contextmanager
def reading(teacher: Mapping[str, Any], expected: Mapping[str, Any], data: Any) -> Iterator[ready_features.Read]:
    """Read ready-made features, if their files are what they were when the run was planned, before and after.

    Args:
        teacher: dump of a ReadyTeacher.
        expected: `identity.features_identity` of it.
        data: spec of the data set whose images are asked for.

    Raises:
        UserError: a file has changed, or as `ready_features.reader`.
    """
    spec = ReadyTeacher.model_validate(teacher)
    files = ready_features.files(spec)
    hashes = {"features": expected["file"], "names": expected["names"]}
    for field, file in files.items():
        require_sha256(file, hashes[field], f"teacher.{field}")
    in_order = plugins.module_of("dataset", data).load(data).train.names if ready_features.by_row(spec) else ()
    yield ready_features.reader(spec, in_order)
    for field, file in files.items():
        require_sha256(file, hashes[field], f"teacher.{field}")
