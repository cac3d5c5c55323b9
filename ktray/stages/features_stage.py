"""Turn the images of one role into features, in shards; several layers of one teacher by one forward pass."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ktray import plugins
from ktray.artifact import Artifact, Stage
from ktray.features import extraction, precomputed
from ktray.fingerprint import require_sha256
from ktray.ops import augmentation, resizing
from ktray.plugins import PluginSpec
from ktray.pool import StageContext
from ktray.spec import DataSpec, HandcraftedTeacher, PrecomputedTeacher, TeacherSpec
from ktray.stages.images_stage import DRY_RUN, data_of, open_images

IDENTITY, REVISION = "stage.features", 1
TOOLS = (extraction, augmentation)


def stage_of(
    teacher: TeacherSpec,
    inputs: Mapping[str, str],
    locations: Mapping[str, Any],
    precomputed_identity: Mapping[str, Any] | None,
) -> Stage:
    """The stage that turns images into a teacher's features.

    Args:
        inputs: keys of ``images`` and, for a teacher that has weights or a state, ``teacher``.
        locations: of the images' data set (`images.location_fields`).
        precomputed_identity: `identity.features_identity` of a PrecomputedTeacher, else None.
    """
    view = view_of(teacher, precomputed_identity)
    revisions = plugins.revisions(sys.modules[__name__], *methods_of(teacher, view))
    local = {"data": {"images": locations}, **files_of(teacher)}
    varying_fields = ("layer", "pool") if "layer" in view else ()  # one forward pass gives every layer
    return Stage("features", {**view, "dtype": teacher.dtype}, revisions, inputs, local=local, varying_fields=varying_fields)


def view_of(teacher: TeacherSpec, precomputed_identity: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a teacher's features depend on besides its weights or state, as plain data; arguments as in `stage_of`."""
    return extraction.teacher_view(teacher) if precomputed_identity is None else {"features": dict(precomputed_identity)}


def methods_of(teacher: TeacherSpec, view: Mapping[str, Any]) -> tuple[PluginSpec | ModuleType, ...]:
    """What computes a teacher's features: its descriptor or backbone, or the reader of precomputed ones.

    Args:
        view: of `view_of`.
    """
    if isinstance(teacher, PrecomputedTeacher):
        return (precomputed,)
    if isinstance(teacher, HandcraftedTeacher):
        return (teacher.descriptor,)
    return methods_of_network(plugins.parse("backbone", view["backbone"]), view)


def methods_of_network(backbone: PluginSpec, view: Mapping[str, Any]) -> tuple[PluginSpec | ModuleType, ...]:
    """A network, and how images are resized for it if they are; `view` is a `network_view`."""
    return (backbone, resizing) if extraction.resize_of(view) else (backbone,)


def files_of(teacher: TeacherSpec) -> dict[str, dict[str, str]]:
    """The part of `Stage.local` with the files of precomputed features; empty for any other teacher."""
    if not isinstance(teacher, PrecomputedTeacher):
        return {}
    return {"files": {field: str(path) for field, path in precomputed.feature_files(teacher).items()}}


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write ``features-00000.npy`` and so on, (n, D) each; metrics `dim` and `images_per_s`."""
    if "features" in stage.spec:
        return _write_precomputed(stage, inputs, out)
    return extraction.write(_source(stage, inputs, context), out, context.pool)


def run_family(
    stages: Sequence[Stage], inputs: Mapping[str, Artifact], outs: Sequence[Path], context: StageContext
) -> list[tuple[dict[str, float], float]]:
    """`run` for stages that differ in layer and pooling: for each its metrics and the seconds that it would cost alone."""
    return extraction.write_views([_source(stage, inputs, context) for stage in stages], outs, context.pool)


def _source(stage: Stage, inputs: Mapping[str, Artifact], context: StageContext) -> dict[str, Any]:
    """The argument of `extraction.write`."""
    weights, state = weights_and_state(inputs.get("teacher"))
    return {
        "view": {name: value for name, value in stage.spec.items() if name not in ("dtype", DRY_RUN)},
        "weights": str(weights) if weights else None,
        "state": str(state) if state else None,
        "images": str(inputs["images"].directory),
        "data": data_of(stage, "images", inputs).model_dump(),
        "split": "train",
        "dtype": stage.spec["dtype"],
        "device": context.device,
        "max_batch_size": context.max_batch_size,
    }


def weights_and_state(teacher: Artifact | None) -> tuple[Path | None, Path | None]:
    """Directories of a network's weights and of a descriptor's state; None for what a teacher does not have."""
    if teacher is None:
        return None, None
    weights, state = (
        teacher.directory if (teacher.directory / file).exists() else None for file in ("weights.safetensors", "state.npz")
    )
    return weights, state


def _write_precomputed(stage: Stage, inputs: Mapping[str, Artifact], out: Path) -> Mapping[str, float]:
    images = open_images(stage, "images", inputs, "train")
    with reading(stage.spec["features"], stage.local["files"], data_of(stage, "images", inputs)) as read:
        return precomputed.write(read, images, stage.spec["dtype"], out)


@contextmanager
def reading(expected: Mapping[str, Any], files: Mapping[str, str], data: DataSpec) -> Iterator[precomputed.Read]:
    """Open precomputed features for reading; before and after, check that their files have not changed since planning.

    Args:
        expected: `identity.features_identity` of the teacher.
        files: field of the teacher -> where its file lies.
        data: spec of the data set whose images are asked for.

    Raises:
        UserError: a file has changed, or as `precomputed.open_features`.
    """
    teacher = PrecomputedTeacher.model_validate({**files, "columns": expected["columns"]})
    hashes = {"features": expected["file"], "names": expected["names"]}
    paths = precomputed.feature_files(teacher)
    for field, path in paths.items():
        require_sha256(path, hashes[field], f"teacher.{field}")
    in_order = plugins.module_of("dataset", data).load(data).train.names if precomputed.matched_by_row(teacher) else ()
    yield precomputed.open_features(teacher, in_order)
    for field, path in paths.items():
        require_sha256(path, hashes[field], f"teacher.{field}")
