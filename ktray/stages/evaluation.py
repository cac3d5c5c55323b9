"""Judge a student, a teacher or the pseudo-labels by one evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from ktray import features, plugins, ready_features
from ktray.artifact import Artifact, Stage
from ktray.images import Images
from ktray.pool import Means
from ktray.spec import TeacherSpec
from ktray.stages.features import reading
from ktray.stages.images import open_images

REVISION = 1


def run(stage: Stage, inputs: Mapping[str, Artifact], out: Path, means: Means, start: Path | None) -> Mapping[str, float]:
    """Write `metrics.json` and the plots of the evaluation; metric names without prefix."""
    spec = plugins.parse("evaluation", stage.local["evaluation"])
    pseudo_labels = None
    role = "target"
    if "pseudo_labels" in inputs:
        pseudo_labels = np.load(inputs["pseudo_labels"].directory / "labels.npy", allow_pickle=False)
        role = "transfer"
    train_images = open_images(stage, role, inputs, "train")
    judged = open_images(stage, "target", inputs, spec.split)
    features_of = _features_of(stage, inputs, spec, means)
    metrics = plugins.module_of("evaluation", spec).evaluate(
        spec,
        features=features_of,
        train=train_images,
        judged=judged,
        pseudo_labels=pseudo_labels,
        out=out,
        device=means.device,
    )
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1, sort_keys=True))
    return metrics


def _features_of(
    stage: Stage, inputs: Mapping[str, Artifact], spec: object, means: Means
) -> Callable[[Images], NDArray[np.float32]]:
    """Images -> features (N, D) of what is judged; nothing is loaded before the evaluation asks."""

    def build() -> features.Extractor:
        if stage.local["judges"] == "teacher":
            teacher = TypeAdapter(TeacherSpec).validate_python(stage.local["teacher"])
            made = inputs.get("teacher")
            directory = made.directory if made else None
            weights = directory if directory and (directory / "weights.safetensors").exists() else None
            state = directory if directory and (directory / "state.npz").exists() else None
            return features.of_teacher(teacher, weights, state, means.device)
        backbone = plugins.parse("backbone", stage.spec["backbone"])
        weights = inputs["student"].directory
        return features.of_network(backbone, spec.layer, spec.pool, weights, means.device)  # type: ignore[attr-defined]

    def read(images: Images) -> NDArray[np.float32]:
        data = plugins.parse("dataset", stage.local["data"]["target"])
        with reading(stage.local["teacher"], stage.spec["teacher"]["features"], data) as reader:
            return ready_features.all_of(reader, images)

    ready = "features" in stage.spec.get("teacher", {})
    return read if ready else lambda images: features.all_of(features.in_pieces(build(), means.most_images), images)
