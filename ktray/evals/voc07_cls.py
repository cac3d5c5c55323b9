"""VOC07 classification: one-against-all linear classifiers on frozen features of images with several labels, by mean AP.

For each class a linear machine with squared hinge loss, or a logistic regression, whose cost C is chosen by cross-validation.
An image in which a class is only difficult is left out of that class, in training and in judging.

Source: Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge" (2010), for the task; Goyal, Mahajan, Gupta and
Misra, "Scaling and Benchmarking Self-Supervised Visual Representation Learning" (2019), section 6.1, for the machines, whose
code (VISSL) has these costs, three folds, features of length 1 and twice the weight for positive images.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ktray.classifiers import linear_classifiers
from ktray.classifiers.linear_classifiers import Problem
from ktray.images import Images
from ktray.scoring import average_precision, per_image
from ktray.spec import EvaluationFields

REVISION = 1
TOOLS = (linear_classifiers, average_precision)
NEEDS_LABELS = False
NEEDS_ANNOTATIONS = ("presence",)
DIRECTION: dict[str, Literal["max", "min"]] = {"map": "max", "map_area": "max"}
VISSL = (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)

Cost = Annotated[float, Field(gt=0)]


class Spec(EvaluationFields):
    """A linear classifier for each class."""

    kind: Literal["voc07_cls"] = "voc07_cls"
    classifier: Literal["svm", "logistic"] = Field(default="svm", description="svm: squared hinge loss; logistic: log loss")
    costs: Annotated[tuple[Cost, ...], Field(min_length=1, max_length=100)] = Field(
        default=VISSL, description="values of C; of several, the best of each class by cross-validated AP"
    )
    folds: int = Field(default=3, ge=2, le=20, description="of the cross-validation")
    normalize: bool = Field(default=True, description="scale features to length 1 first")
    positive_weight: float = Field(default=2.0, gt=0, description="of the loss of images that show the class; VISSL's is 2")
    iterations: int = Field(default=2000, ge=1, description="most iterations of L-BFGS")


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
    """`map` in [0, 1] by the eleven recalls of 2007, and `map_area` by the area below the curve, as since 2010.

    A class without a positive image to learn from or to judge has no AP and is left out of the means. `classes.json` says so,
    and has the AP and the chosen cost of each class; `per_image.parquet` has the scores.

    Raises:
        ValueError: presence is missing, no class has positive images in both splits, or features are not finite.
    """
    if train.presence is None or judged.presence is None or not len(train) or not len(judged):
        raise ValueError("VOC07 classification needs images with several labels, to learn from and to judge")
    rows, queries = (linear_classifiers.on_device(features(images), device) for images in (train, judged))
    if spec.normalize:
        rows, queries = linear_classifiers.unit(rows), linear_classifiers.unit(queries)
    learnable = (train.presence > 0).any(0) & (train.presence < 0).any(0)
    known = [int(of) for of in np.flatnonzero(learnable & (judged.presence > 0).any(0))]
    if not known:
        raise ValueError("no class has both images that show it and images that do not to learn from, and one to judge")
    presence = torch.from_numpy(train.presence).to(device)
    costs = _chosen_costs(spec, rows, presence, known)
    everything = torch.ones(1, len(rows), dtype=torch.bool, device=device)
    fitted = _fit(spec, rows, presence, everything, [Problem(of, costs[of], 0) for of in known])
    scores = linear_classifiers.machine_scores(queries, fitted).cpu().numpy()
    columns = {"scores": scores, "presence": judged.presence[:, known]}
    per_image.write(out, judged.names, columns)
    table = {}
    for column, of in enumerate(known):
        aps = _aps(scores[:, column], judged.presence[:, of])
        table[_name(judged, of)] = {"ap": aps["map"], "ap_area": aps["map_area"], "cost": costs[of]}
    left_out = [_name(judged, of) for of in range(judged.presence.shape[1]) if of not in known]
    (out / "classes.json").write_text(json.dumps({"classes": table, "left_out": left_out}, indent=1))
    return recompute(columns, np.arange(len(judged)))


def recompute(columns: per_image.Columns, rows: NDArray[np.int64]) -> dict[str, float]:
    """The mean APs of some of the images; a class without positives among them is left out."""
    scores, presence = columns["scores"][rows], columns["presence"][rows]
    found = [
        _aps(scores[:, column], presence[:, column]) for column in range(scores.shape[1]) if (presence[:, column] > 0).any()
    ]
    return {name: float(np.mean([each[name] for each in found])) if found else float("nan") for name in DIRECTION}


def _aps(scores: NDArray[np.floating], presence: NDArray[np.int8]) -> dict[str, float]:
    return {
        "map": average_precision.classification_ap(scores, presence, "voc07"),
        "map_area": average_precision.classification_ap(scores, presence, "area"),
    }


def _name(images: Images, of: int) -> str:
    return images.classes[of] if images.classes else str(of)


def _chosen_costs(spec: Spec, rows: Tensor, presence: Tensor, known: list[int]) -> dict[int, float]:
    """Class -> the cost with the best mean AP (area) over the folds; the smallest of equals."""
    if len(spec.costs) == 1:
        return dict.fromkeys(known, spec.costs[0])
    folds = {of: _folds(presence[:, of].cpu().numpy(), spec.folds) for of in known}
    sets = np.stack([folds[of] != fold for of in known for fold in range(spec.folds)])
    problems = [
        Problem(of, cost, place * spec.folds + fold)
        for place, of in enumerate(known)
        for cost in spec.costs
        for fold in range(spec.folds)
    ]
    fitted = _fit(spec, rows, presence, torch.from_numpy(sets).to(rows.device), problems)
    scores, truth = linear_classifiers.machine_scores(rows, fitted).cpu().numpy(), presence.cpu().numpy()
    worth: dict[tuple[int, float], list[float]] = {}
    for column, problem in enumerate(problems):
        held = ~sets[problem.images]
        ap = average_precision.classification_ap(scores[held, column], truth[held, problem.of], "area")
        worth.setdefault((problem.of, problem.cost), []).append(ap)
    means = {key: float(np.nanmean(values)) if not np.isnan(values).all() else 0.0 for key, values in worth.items()}
    return {of: max(sorted(spec.costs), key=lambda cost: means[of, cost]) for of in known}


def _folds(presence: NDArray[np.int8], count: int) -> NDArray[np.int64]:
    """Fold (N,) of each image: those that show the class in turn, and likewise those that do not."""
    folds = np.zeros(len(presence), np.int64)
    for value in (1, -1, 0):
        here = np.flatnonzero(presence == value)
        folds[here] = np.arange(len(here)) % count
    return folds


def _fit(spec: Spec, rows: Tensor, presence: Tensor, sets: Tensor, problems: list[Problem]) -> Tensor:
    return linear_classifiers.linear_machines(
        rows,
        presence,
        sets,
        problems,
        loss="squared_hinge" if spec.classifier == "svm" else "log",
        positive_weight=spec.positive_weight,
        iterations=spec.iterations,
    )
