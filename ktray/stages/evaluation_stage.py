"""Evaluate a student, a teacher or the pseudo-labels."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import plugins
from ktray.artifact import Artifact, Stage
from ktray.checksums import intact
from ktray.features import extraction, precomputed
from ktray.images import Images
from ktray.ops import augmentation
from ktray.plugins import PluginSpec
from ktray.pool import StageContext
from ktray.spec import EvaluationSpec, Student, TeacherSpec
from ktray.stages import features_stage
from ktray.stages.images_stage import DRY_RUN, data_of, open_images

IDENTITY, REVISION = "stage.evaluation", 1
TOOLS = (extraction, augmentation)

JUDGED = "judged"
"""Field that is added to those of the evaluation: the view whose features are judged; null if it judges pseudo-labels."""


def stage_of(
    evaluation: EvaluationSpec,
    judged: Student | TeacherSpec | None,
    inputs: Mapping[str, str],
    locations: Mapping[str, Mapping[str, Any]],
    precomputed_identity: Mapping[str, Any] | None,
) -> Stage:
    """The stage of one evaluation. Its spec leaves out the display name.

    Args:
        judged: whose features are judged; None if it judges pseudo-labels.
        inputs: keys of ``images.target`` and of what is judged: ``student``, ``teacher``, or ``pseudo_labels`` with
            ``images.transfer``.
        locations: input -> locations of its data set (`images.location_fields`).
        precomputed_identity: `identity.features_identity` if `judged` is a PrecomputedTeacher, else None.
    """
    view, files = None, {}
    methods: list[PluginSpec | ModuleType] = [sys.modules[__name__], evaluation]
    if isinstance(judged, Student):
        view = extraction.network_view(judged.backbone, evaluation.layer, evaluation.pool)
        methods.append(judged.backbone)
    elif judged is not None:
        view = features_stage.view_of(judged, precomputed_identity)
        if evaluation.layer:
            view |= {"layer": evaluation.layer, "pool": evaluation.pool.model_dump()}
        methods.append(features_stage.method_of(judged))
        files = features_stage.files_of(judged)
    spec = {**evaluation.model_dump(exclude={"name"}), JUDGED: view}
    return Stage("evaluation", spec, plugins.revisions(*methods), inputs, local={"data": locations, **files})


def reads_pseudo_labels(evaluation: EvaluationSpec) -> bool:
    """Whether an evaluation judges the pair's pseudo-labels instead of features."""
    return bool(getattr(plugins.module_of("evaluation", evaluation), "READS_PSEUDO_LABELS", False))


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write `metrics.json` and the plots of the evaluation; return the metrics, whose names have no prefix."""
    spec = plugins.parse("evaluation", {n: v for n, v in stage.spec.items() if n not in (JUDGED, DRY_RUN)})
    pseudo_labels = None
    learned_from = "images.target"
    if "pseudo_labels" in inputs:
        pseudo_labels = np.load(intact(inputs["pseudo_labels"].directory / "labels.npy"), allow_pickle=False)
        learned_from = "images.transfer"
    metrics: dict[str, float] = plugins.module_of("evaluation", spec).evaluate(
        spec,
        features=_features_of(stage, inputs, context),
        train=open_images(stage, learned_from, inputs, "train"),
        judged=open_images(stage, "images.target", inputs, spec.split),
        pseudo_labels=pseudo_labels,
        out=out,
        device=context.device,
    )
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True))
    return metrics


def _features_of(
    stage: Stage, inputs: Mapping[str, Artifact], context: StageContext
) -> Callable[[Images], NDArray[np.float32]]:
    """A function images -> features (N, D) of what is judged. Weights are loaded when it is called."""
    judged = stage.spec[JUDGED]

    def extracted(images: Images) -> NDArray[np.float32]:
        weights, state = features_stage.weights_and_state(inputs.get("teacher") or inputs.get("student"))
        extractor = extraction.view_extractor(judged, weights, state, context.device)
        return extraction.extract_all(extraction.in_smaller_batches(extractor, context.max_batch_size), images)

    def looked_up(images: Images) -> NDArray[np.float32]:
        data = data_of(stage, "images.target", inputs)
        with features_stage.reading(judged["features"], stage.local["files"], data) as read:
            return precomputed.read_rows(read, images)

    return looked_up if judged and "features" in judged else extracted
