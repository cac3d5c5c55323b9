"""Robustness: the accuracy of a classifier that learned from clean images, on corrupted ones.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (2019). Its
mean corruption error divides by the errors of AlexNet on ImageNet; here accuracies are averaged as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, field_validator

from ktray import fingerprint
from ktray.classifiers import linear_classifiers, neighbours
from ktray.images import Images
from ktray.ops import corruptions
from ktray.scoring import per_image
from ktray.spec import EvaluationFields, Seed

REVISION = 1
TOOLS = (corruptions, linear_classifiers, neighbours)
NEEDS_LABELS = True
READS_PIXELS = True
DIRECTION: dict[str, Literal["max", "min"]] = {"top1": "max", "clean_top1": "max", "relative": "max"}

Severity = Annotated[int, Field(ge=1, le=corruptions.SEVERITIES)]


class Spec(EvaluationFields):
    """A classifier of clean features, applied to those of corrupted images."""

    kind: Literal["robustness"] = "robustness"
    corruptions: tuple[str, ...] = Field(default=tuple(corruptions.KINDS), min_length=1, description="kinds of corruption")
    severities: Annotated[tuple[Severity, ...], Field(min_length=1, max_length=5)] = Field(
        default=(1, 2, 3, 4, 5), description="from 1, mild, to 5"
    )
    images: int | None = Field(default=1000, ge=1, description="judged images that are corrupted, drawn by `seed`; null: all")
    classifier: Literal["knn", "linear"] = Field(default="knn", description="knn: 20 neighbours; linear: a probe with `l2`")
    l2: float = Field(default=1e-3, gt=0, description="penalty of the linear classifier")
    seed: Seed = 0

    @field_validator("corruptions")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in value if name not in corruptions.KINDS]
        if unknown:
            raise ValueError(f"there is no corruption {unknown[0]!r}; known: {', '.join(corruptions.KINDS)}")
        return value


def directions(spec: Spec) -> dict[str, Literal["max", "min"]]:
    """The metrics of this spec: those of all corruptions together, and one for each, such as `top1_fog`."""
    return {**DIRECTION, **{f"top1_{kind}": "max" for kind in spec.corruptions}}


def evaluate(
    spec: Spec,
    *,
    features: Callable[[Images], NDArray[np.float32]],
    train: Images,
    judged: Images,
    pseudo_labels: NDArray[np.int64] | None,
    out: Path,
    device: str,
) -> dict[str, float]:
    """`top1` in [0, 1], the mean over corruptions and severities, `clean_top1` of the same images, and their ratio `relative`.

    `top1_fog` and so on are means over severities. The results of each image, and of each corruption and severity, are written
    to `per_image.parquet`.

    Raises:
        ValueError: labels are missing, `train` or `judged` is empty, or features are not finite.
    """
    if train.labels is None or judged.labels is None or not len(train) or not len(judged):
        raise ValueError("robustness needs labelled training images and labelled images to judge")
    chosen = np.random.default_rng(fingerprint.seed_of(spec.seed, "images", len(judged))).permutation(len(judged))
    chosen = np.sort(chosen[: spec.images])
    some = _some(judged, chosen)
    assert some.labels is not None
    classify = _classifier(spec, linear_classifiers.on_device(features(train), device), train.labels, device)
    columns = {"clean_top1": _right(classify(features(some)), some.labels)}
    for kind in spec.corruptions:
        results = []
        for severity in spec.severities:
            corrupted = replace(some, read=_reader(some, kind, severity, spec.seed))
            results.append(_right(classify(features(corrupted)), some.labels))
            columns[f"{kind}, severity {severity}"] = results[-1]
        columns[f"top1_{kind}"] = np.mean(results, axis=0)
    columns["top1"] = np.mean([columns[f"top1_{kind}"] for kind in spec.corruptions], axis=0)
    per_image.write(out, some.names, columns)
    return recompute(columns, np.arange(len(chosen)))


def recompute(columns: per_image.Columns, rows: NDArray[np.int64]) -> dict[str, float]:
    """The metrics of some of the images."""
    found = {name: float(values[rows].mean()) for name, values in columns.items() if "top1" in name}
    clean = found["clean_top1"]
    return {**found, "relative": found["top1"] / clean if clean else 0.0}


def _right(predicted: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    right: NDArray[np.float64] = (predicted == labels).astype(np.float64)
    return right


def _some(images: Images, rows: NDArray[np.int64]) -> Images:
    """Some of the images, in this order, with what an extraction and this evaluation read of them."""
    assert images.labels is not None
    names = tuple(images.names[row] for row in rows) if images.names else ()
    return Images(len(rows), images.size, lambda index: images.read(rows[index]), images.labels[rows], images.classes, names)


def _reader(images: Images, kind: str, severity: int, seed: int) -> Callable[[NDArray[np.int64]], NDArray[np.uint8]]:
    def read(index: NDArray[np.int64]) -> NDArray[np.uint8]:
        rows = np.arange(len(images))[index]
        seeds = [fingerprint.seed_of(seed, "image", int(row)) for row in rows]
        return corruptions.corrupt(torch.from_numpy(images.read(rows)), kind, severity, seeds).numpy()

    return read


def _classifier(
    spec: Spec, rows: torch.Tensor, labels: NDArray[np.int64], device: str
) -> Callable[[NDArray[np.float32]], NDArray[np.int64]]:
    """A function features (M, D) -> classes (M,), learned from clean features (N, D)."""
    owners, classes = torch.from_numpy(labels).to(device), int(labels.max()) + 1
    if spec.classifier == "linear":
        scaling = linear_classifiers.scaling_of(rows)
        given = scaling.apply(rows, torch.float32)
        fitted = linear_classifiers.logistic_regressions(given, owners, classes, [spec.l2], iterations=500)

        def of_scores(queries: NDArray[np.float32]) -> NDArray[np.int64]:
            scaled = scaling.apply(linear_classifiers.on_device(queries, device), torch.float32)
            best: NDArray[np.int64] = fitted.scores(scaled, 0).cpu().numpy().argmax(1)
            return best

        return of_scores
    bank = linear_classifiers.unit(rows)

    def of_neighbours(queries: NDArray[np.float32]) -> NDArray[np.int64]:
        given = linear_classifiers.unit(linear_classifiers.on_device(queries, device))
        found = [
            neighbours.votes(similarities, owners[nearest], classes, 0.07).cpu().numpy().argmax(1)
            for _, similarities, nearest in neighbours.nearest(bank, given, 20)
        ]
        return np.concatenate(found)

    return of_neighbours
