"""Linear probe: the accuracy of a linear classifier on frozen features.

Multinomial logistic regression on standardised features. The penalised loss is convex, so its optimum has no learning rate, no
number of epochs and no random initialisation to choose. The penalty is chosen on held-out training images, and the classifier
is then fitted to all of them.

Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (2016); Kornblith, Shlens and Le,
"Do Better ImageNet Models Transfer Better?" (2019), on L-BFGS with an l2 penalty chosen on held-out images; Oquab et al.,
"DINOv2" (2023), whose logistic regression has the grid of 45 penalties.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from ktray.classifiers import linear_classifiers
from ktray.classifiers.linear_classifiers import Classifiers, Scaling
from ktray.images import Images
from ktray.plots import label_of, optional_plot
from ktray.scoring import per_image
from ktray.spec import EvaluationFields, Seed

REVISION = 2
TOOLS = (linear_classifiers,)
NEEDS_LABELS = True
DIRECTION: dict[str, Literal["max", "min"]] = {"top1": "max", "loss": "min"}
PATH = tuple(10.0 ** (-5.5 + index / 2) for index in range(10))
"""The penalties of `l2: path`: from 3e-6 to 0.1 in steps of half a decade."""
DINOV2 = tuple(10.0 ** (-6 + 11 * index / 44) for index in range(45))
"""The 45 values of C between 1e-6 and 1e5 that DINOv2 tries. There the losses are summed: C = 1 / (l2 * number of images)."""

Penalty = Annotated[float, Field(gt=0)]


class Spec(EvaluationFields):
    """A linear classifier on one layer of a network. `l2` is relative to the mean loss, so it means the same for any N."""

    kind: Literal["linear_probe"] = "linear_probe"
    l2: Penalty | Annotated[tuple[Penalty, ...], Field(min_length=1, max_length=200)] | Literal["path", "dinov2"] = Field(
        default="path",
        description="weight of the penalty l2 / 2 * sum of squared weights; of several, or of a named grid, the one that is "
        "best on held-out training images: path has ten from 3e-6 to 0.1, dinov2 its 45 values of C",
    )
    held_out: float = Field(default=0.1, gt=0, lt=1, description="share of the training images that chooses among several l2")
    scaling: Literal["standard", "none"] = Field(
        default="standard", description="features to mean 0 and deviation 1, or as they are"
    )
    iterations: int = Field(default=500, ge=1, description="most iterations of L-BFGS")
    precision: Literal["float32", "float64"] = "float32"
    per_class: int | None = Field(default=None, ge=1, description="training labels used per class, drawn by `seed`; null: all")
    seed: Seed = 0

    @model_validator(mode="after")
    def _leaves_images_to_choose_on(self) -> Spec:
        if self.per_class == 1 and len(penalties(self, 1)) > 1:
            raise ValueError("of one label per class none can be held out to choose among several l2; give one, such as 0.001")
        return self


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
    """`top1` in [0, 1] and `loss` (mean cross-entropy in nats, without the penalty) of the probe on `judged`.

    Writes the confusion matrix as `confusion.png` (rows are the true classes, columns the predicted ones), the results of each
    image as `per_image.parquet`, and as `penalties.json` which penalty was chosen and what each was worth on the held-out
    images.

    Raises:
        ValueError: labels are missing, `train` or `judged` is empty, or features are not finite.
    """
    if train.labels is None or judged.labels is None or not len(train) or not len(judged):
        raise ValueError("a linear probe needs labelled training images and labelled images to judge")
    classes = 1 + max(int(train.labels.max()), int(judged.labels.max()), len(train.classes) - 1)
    given = linear_classifiers.on_device(features(train), device)
    scaling = _scaling(spec, given)  # over all training images: `per_class` limits labels, not images
    labelled = linear_classifiers.subset_per_class(train.labels, spec.per_class, spec.seed)
    dtype: torch.dtype = getattr(torch, spec.precision)
    rows = scaling.apply(given if len(labelled) == len(given) else given[torch.from_numpy(labelled).to(device)], dtype)
    fitted = fit(spec, rows, train.labels[labelled], classes, out)
    queries = scaling.apply(linear_classifiers.on_device(features(judged), device), dtype)
    truth = torch.from_numpy(judged.labels).to(device)
    scores = fitted.scores(queries, 0)
    losses = torch.nn.functional.cross_entropy(scores.double(), truth, reduction="none").cpu().numpy()
    predicted = scores.argmax(1).cpu().numpy()
    if not np.isfinite(losses).all():
        raise ValueError(f"the probe's loss is {losses.mean()}: features are not finite")
    right = (predicted == judged.labels).astype(np.float64)
    per_image.write(out, judged.names, {"top1": right, "loss": losses, "predicted": predicted, "truth": judged.labels})
    with optional_plot(out / "confusion.png"):
        _draw_confusion(judged, predicted, classes, out / "confusion.png")
    return {"top1": float(right.mean()), "loss": float(losses.mean())}


def _scaling(spec: Spec, rows: Tensor) -> Scaling:
    if spec.scaling == "standard":
        return linear_classifiers.scaling_of(rows)
    zeros = torch.zeros(rows.shape[1], dtype=torch.float64, device=rows.device)
    return Scaling(zeros, torch.ones_like(zeros))


def penalties(spec: Spec, count: int) -> tuple[float, ...]:
    """The penalties to try for a fit to `count` images."""
    if spec.l2 == "dinov2":
        return tuple(1 / (cost * count) for cost in DINOV2)
    if spec.l2 == "path":
        return PATH
    return spec.l2 if isinstance(spec.l2, tuple) else (float(spec.l2),)


def fit(spec: Spec, rows: Tensor, labels: NDArray[np.int64], classes: int, out: Path) -> Classifiers:
    """The classifier of features (N, D), with the penalty that is best on held-out images if the spec has several.

    Of equally accurate penalties the one with the lowest loss counts. Classes with a single image have none held out.

    Args:
        out: where `penalties.json` is written, if there are several.
    """
    targets = torch.from_numpy(labels).to(rows.device)
    given = penalties(spec, len(rows))
    if len(given) == 1:
        return linear_classifiers.logistic_regressions(rows, targets, classes, given, iterations=spec.iterations)
    held = linear_classifiers.held_out_rows(labels, spec.held_out, spec.seed)
    if not held.any():
        raise ValueError(
            f"of {len(rows)} training images none can be held out to choose among {len(given)} penalties; give one l2"
        )
    kept, chosen_on = (torch.from_numpy(np.flatnonzero(mask)).to(rows.device) for mask in (~held, held))
    tried = penalties(spec, len(kept))
    found = linear_classifiers.logistic_regressions(rows[kept], targets[kept], classes, tried, iterations=spec.iterations)
    held_rows, truth = rows[chosen_on], targets[chosen_on]
    worth = []
    for index in range(len(tried)):
        scores = found.scores(held_rows, index)
        loss = float(torch.nn.functional.cross_entropy(scores.double(), truth))
        worth.append((float((scores.argmax(1) == truth).double().mean()), -loss))
    best = max(range(len(tried)), key=worth.__getitem__)
    table = [
        {"l2": penalty, "top1": top1, "loss": -loss, "converged": converged}
        for penalty, (top1, loss), converged in zip(given, worth, found.converged, strict=True)
    ]
    record = {"l2": given[best], "held_out": int(held.sum()), "tried": table}
    (out / "penalties.json").write_text(json.dumps(record, indent=1))
    start = torch.cat([found.weights[best], found.biases[best][None]])
    return linear_classifiers.logistic_regressions(
        rows, targets, classes, given[best : best + 1], iterations=spec.iterations, start=start
    )


def _draw_confusion(judged: Images, predicted: NDArray[np.int64], classes: int, path: Path) -> None:
    from matplotlib import style

    with style.context("default"):  # not that of the user's own matplotlibrc
        _draw_shares(judged, predicted, classes, path)


def _draw_shares(judged: Images, predicted: NDArray[np.int64], classes: int, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert judged.labels is not None
    counts = np.bincount(judged.labels * classes + predicted, minlength=classes**2).reshape(classes, classes)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = float(np.clip(2 + 0.4 * classes, 4, 12))
    figure = Figure(figsize=(side, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, shrink=0.7, label="share of the class")
    axes.set(xlabel="predicted", ylabel="class", title=f"linear probe, {len(judged)} images")
    if len(judged.classes) == classes <= 40:  # more names would be illegible
        names = [label_of(name) for name in judged.classes]
        axes.set_xticks(range(classes), names, rotation=90, parse_math=False)
        axes.set_yticks(range(classes), names, parse_math=False)
    figure.savefig(path, dpi=100, metadata={"Software": None})
