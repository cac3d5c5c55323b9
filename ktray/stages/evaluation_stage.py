"""Evaluate a student, a teacher or the pseudo-labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import plugins
from ktray.artifact import Artifact, Stage
from ktray.checkpoints import Attempt, saving, step_of
from ktray.checksums import intact
from ktray.errors import UserError
from ktray.features import extraction, precomputed, shared_features
from ktray.features.extraction import View
from ktray.features.judged_network import JudgedNetwork
from ktray.fingerprint import require_sha256
from ktray.images import Images, splits_of
from ktray.ops import augmentation
from ktray.plugins import PluginSpec
from ktray.pool import StageContext
from ktray.spec import EvaluationSpec, Pooling, Student, TeacherSpec
from ktray.stages import features_stage
from ktray.stages.images_stage import DRY_RUN, data_of, open_images

IDENTITY, REVISION = "stage.evaluation", 1
TOOLS = (extraction, augmentation)

JUDGED = "judged"
"""Field that is added to those of the evaluation: the view whose features are judged; null if it judges pseudo-labels."""

READ_FILES = "evaluation_files"
"""Where a stage keeps the paths of the files that its evaluation reads; the spec has the sha256 of each in its place."""


def stage_of(
    evaluation: EvaluationSpec,
    judged: Student | TeacherSpec | None,
    inputs: Mapping[str, str],
    locations: Mapping[str, Mapping[str, Any]],
    precomputed_identity: Mapping[str, Any] | None,
    read_files: Mapping[str, tuple[str, str]] | None = None,
) -> Stage:
    """The stage of one evaluation. Its spec leaves out the display name.

    Args:
        judged: whose features are judged; None if it judges pseudo-labels.
        inputs: keys of ``images.target`` and of what is judged: ``student``, ``teacher``, or ``pseudo_labels`` with
            ``images.transfer``.
        locations: input -> locations of its data set (`images.location_fields`).
        precomputed_identity: `identity.features_identity` if `judged` is a PrecomputedTeacher, else None.
        read_files: `identity.evaluation_files`; they count by their content.
    """
    view, files = None, {}
    methods: list[PluginSpec | ModuleType] = [sys.modules[__name__], evaluation]
    computed_in = getattr(evaluation, "network_precision", None)  # a plugin from outside may have no such field
    if isinstance(judged, Student):
        resize = extraction.resized_to(judged.image_size)
        view = extraction.network_view(
            judged.backbone, evaluation.layer, evaluation.pool, computed_in=computed_in or "float32", resize=resize
        )
        methods += features_stage.methods_of_network(judged.backbone, view)
    elif judged is not None:
        view = features_stage.view_of(judged, precomputed_identity)
        if evaluation.layer:
            view |= {"layer": evaluation.layer, "pool": evaluation.pool.model_dump()}
        if computed_in:
            view |= {"precision": computed_in}
        methods += features_stage.methods_of(judged, view)
        files = features_stage.files_of(judged)
    spec = {**evaluation.model_dump(exclude={"name"}), JUDGED: view}
    local: dict[str, Any] = {"data": locations, **files}
    if read_files:
        spec |= {field: sha256 for field, (sha256, _) in read_files.items()}
        local[READ_FILES] = {field: path for field, (_, path) in read_files.items()}
    about = {}
    if getattr(plugins.module_of("evaluation", evaluation), "DEPENDS_ON_MACHINE", False):
        about["depends_on"] = "the machine: its metrics compare only with others from the same device and the same load"
    return Stage("evaluation", spec, plugins.revisions(*methods), inputs, local=local, about=about)


def reads_pseudo_labels(evaluation: EvaluationSpec) -> bool:
    """Whether an evaluation judges the pair's pseudo-labels instead of features."""
    return bool(getattr(plugins.module_of("evaluation", evaluation), "READS_PSEUDO_LABELS", False))


def reads_network(evaluation: EvaluationSpec) -> bool:
    """Whether an evaluation reads more of the judged network than features: it must be a network then."""
    return bool(getattr(plugins.module_of("evaluation", evaluation), "READS_NETWORK", False))


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write `metrics.json` and the plots of the evaluation; return the metrics, whose names have no prefix."""
    plain = {n: v for n, v in stage.spec.items() if n not in (JUDGED, DRY_RUN)}
    for field, path in stage.local.get(READ_FILES, {}).items():
        require_sha256(Path(path), plain[field], f"evals.{field}")
        plain[field] = path
    spec = plugins.parse("evaluation", plain)
    module = plugins.module_of("evaluation", spec)
    pseudo_labels = None
    learned_from = "images.target"
    if "pseudo_labels" in inputs:
        pseudo_labels = np.load(intact(inputs["pseudo_labels"].directory / "labels.npy"), allow_pickle=False)
        learned_from = "images.transfer"
    splits = _Splits(stage, inputs)
    more: dict[str, Any] = {}
    if reads_network(spec):
        save = saving(out, context.checkpoint_seconds, start)
        more["network"] = _judged_network(stage, inputs, splits, context)
        more["attempt"] = Attempt(start, step_of(start) if start else 0, save, context.progress)
    if getattr(module, "READS_SPLITS", False):
        more["images_of"] = splits.target_split
    try:
        metrics: dict[str, float] = module.evaluate(
            spec,
            features=_features_of(stage, inputs, splits, context),
            train=splits.opened(learned_from, "train"),
            judged=splits.opened("images.target", spec.split),
            pseudo_labels=pseudo_labels,
            out=out,
            device=context.device,
            **more,
        )
    finally:
        extraction.release_large_network()
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True))
    return metrics


class _Splits:
    """The splits that an evaluation reads, each opened once, and from where the images that it asks features of came.

    They have the size at which the judged network sees them.
    """

    def __init__(self, stage: Stage, inputs: Mapping[str, Artifact]) -> None:
        self.stage, self.inputs = stage, inputs
        self._opened: dict[tuple[str, str], Images] = {}

    def opened(self, role: str, split: str) -> Images:
        """A split of the images that the stage reads as its input `role`."""
        if (role, split) not in self._opened:
            images = open_images(self.stage, role, self.inputs, split)
            self._opened[role, split] = extraction.seen_by(self.stage.spec[JUDGED], images)
        return self._opened[role, split]

    def target_split(self, split: str) -> Images | None:
        """A split of the target data; None if there is no such split."""
        present = splits_of(self.inputs["images.target"].directory)
        return self.opened("images.target", split) if split in present else None

    def origin(self, images: Images) -> tuple[Path, str] | None:
        """The artifact that holds these images, and their split in it; None for images that the evaluation made itself."""
        for (role, split), opened in self._opened.items():
            if opened is images:
                return self.inputs[role].directory, split
        return None

    def count(self) -> int:
        """Number of images of the opened splits together."""
        return sum(len(opened) for opened in self._opened.values())


def _judged(inputs: Mapping[str, Artifact], context: StageContext) -> shared_features.Judged:
    weights, state = features_stage.weights_and_state(inputs.get("teacher") or inputs.get("student"))
    return shared_features.Judged(weights, state, context.device, context.max_batch_size)


def _features_of(
    stage: Stage, inputs: Mapping[str, Artifact], splits: _Splits, context: StageContext
) -> Callable[[Images], NDArray[np.float32]]:
    """A function images -> features (N, D) of what is judged. Weights are loaded when it is called."""
    view = stage.spec[JUDGED]

    def extracted(images: Images) -> NDArray[np.float32]:
        origin = splits.origin(images)
        [rows] = shared_features.rows_of(_judged(inputs, context), [view], stage.other_views, images, origin, splits.count())
        return rows

    def looked_up(images: Images) -> NDArray[np.float32]:
        data = data_of(stage, "images.target", inputs)
        with features_stage.reading(view["features"], stage.local["files"], data) as read:
            return precomputed.read_rows(read, images)

    return looked_up if view and "features" in view else extracted


def _judged_network(stage: Stage, inputs: Mapping[str, Artifact], splits: _Splits, context: StageContext) -> JudgedNetwork:
    view = stage.spec[JUDGED]
    if not view or "backbone" not in view:
        raise UserError("this evaluation reads a network, and what it judges is none", instead="Judge a student.")
    backbone, judged = plugins.parse("backbone", view["backbone"]), _judged(inputs, context)

    def features(images: Images, views: Sequence[View]) -> list[NDArray[np.float32]]:
        several = [{**view, "layer": layer, "pool": pool.model_dump()} for layer, pool in views]
        origin = splits.origin(images)
        return shared_features.rows_of(judged, several, stage.other_views, images, origin, splits.count())

    return JudgedNetwork(
        backbone=backbone,
        layer=view["layer"],
        pool=Pooling.model_validate(view["pool"]),
        normalize=view["normalize"],
        precision=view["precision"],
        device=context.device,
        max_batch_size=context.max_batch_size,
        build=lambda: extraction.trained_network(backbone, judged.weights).to(context.device).eval(),
        features=features,
    )
