"""Judge a student, a teacher or the pseudo-labels by one evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from ktray import plugins
from ktray.artifact import Artifact, Stage
from ktray.features import extraction, precomputed
from ktray.images import Images
from ktray.pool import StageContext
from ktray.spec import TeacherSpec
from ktray.stages.features_stage import reading
from ktray.stages.images_stage import open_images

IDENTITY, REVISION = "stages.evaluation", 1


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write `metrics.json` and the plots of the evaluation; metric names without prefix."""
    spec = plugins.parse("evaluation", stage.local["evaluation"])
    pseudo_labels = None
    role = "target"
    if "pseudo_labels" in inputs:
        pseudo_labels = np.load(inputs["pseudo_labels"].directory / "labels.npy", allow_pickle=False)
        role = "transfer"
    train_images = open_images(stage, role, inputs, "train")
    judged = open_images(stage, "target", inputs, spec.split)
    features_of = _features_of(stage, inputs, spec, context)
    metrics = plugins.module_of("evaluation", spec).evaluate(
        spec,
        features=features_of,
        train=train_images,
        judged=judged,
        pseudo_labels=pseudo_labels,
        out=out,
        device=context.device,
    )
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True))
    return metrics


def _features_of(
    stage: Stage, inputs: Mapping[str, Artifact], spec: object, context: StageContext
) -> Callable[[Images], NDArray[np.float32]]:
    """Images -> features (N, D) of what is judged; nothing is loaded before the evaluation asks."""

    def build() -> extraction.Extractor:
        if stage.local["judges"] == "teacher":
            teacher = TypeAdapter(TeacherSpec).validate_python(stage.local["teacher"])
            made = inputs.get("teacher")
            directory = made.directory if made else None
            weights = directory if directory and (directory / "weights.safetensors").exists() else None
            state = directory if directory and (directory / "state.npz").exists() else None
            return extraction.of_teacher(teacher, weights, state, context.device)
        backbone = plugins.parse("backbone", stage.spec["backbone"])
        weights = inputs["student"].directory
        return extraction.of_network(backbone, spec.layer, spec.pool, weights, context.device)  # type: ignore[attr-defined]

    def read(images: Images) -> NDArray[np.float32]:
        data = plugins.parse("dataset", stage.local["data"]["target"])
        with reading(stage.local["teacher"], stage.spec["teacher"]["features"], data) as reader:
            return precomputed.all_of(reader, images)

    ready = "features" in stage.spec.get("teacher", {})
    return read if ready else lambda images: extraction.all_of(extraction.in_pieces(build(), context.most_images), images)
