"""Linear probe: the accuracy of a linear classifier on frozen features.

Multinomial logistic regression on standardised features. The penalised loss is convex, so full-batch L-BFGS finds its optimum
without a learning rate, a number of epochs or a random initialisation to choose.

Source: Alain and Bengio, "Understanding intermediate layers using linear classifier probes" (2016); Kornblith, Shlens and Le,
"Do Better ImageNet Models Transfer Better?" (2019), on L-BFGS with an l2 penalty on frozen features.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ktray import fingerprint, progress
from ktray.images import Images
from ktray.plots import label_of, optional_plot
from ktray.spec import EvaluationFields, Seed

REVISION = 1
NEEDS_LABELS = True
DIRECTION: dict[str, Literal["max", "min"]] = {"top1": "max", "loss": "min"}
BLOCK = 1 << 16  # rows per block: bounds the memory of the (rows, classes) logits and fixes the order of summation
log = logging.getLogger("ktray")


class Spec(EvaluationFields):
    """A linear classifier on one layer of a network. `l2` is relative to the mean loss, so it means the same for any N."""

    kind: Literal["linear_probe"] = "linear_probe"
    l2: float = Field(default=1e-4, gt=0, description="weight of the penalty l2 / 2 * sum of squared weights")
    iterations: int = Field(default=300, ge=1, description="most iterations of L-BFGS")
    precision: Literal["float32", "float64"] = "float32"
    per_class: int | None = Field(default=None, ge=1, description="training labels used per class, drawn by `seed`; null: all")
    seed: Seed = 0


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

    Writes the confusion matrix as `confusion.png` into `out`: rows are the true classes, columns the predicted ones.

    Raises:
        ValueError: labels are missing, `train` or `judged` is empty, or features are not finite.
    """
    if train.labels is None or judged.labels is None or not len(train) or not len(judged):
        raise ValueError("a linear probe needs labelled training images and labelled images to judge")
    classes = 1 + max(int(train.labels.max()), int(judged.labels.max()), len(train.classes) - 1)
    dtype = getattr(torch, spec.precision)
    rows = features(train)
    labelled = subset_per_class(train.labels, spec.per_class, spec.seed)
    mean, scale = moments(rows)  # over all training images: `per_class` limits labels, not images
    train_rows = standardise(rows[labelled], mean, scale, dtype).to(device)
    weight, bias = fit(train_rows, train.labels[labelled], classes, l2=spec.l2, iterations=spec.iterations)
    scores = (standardise(features(judged), mean, scale, dtype).to(device) @ weight + bias).cpu()
    truth = torch.from_numpy(judged.labels)
    loss = float(torch.nn.functional.cross_entropy(scores.double(), truth))
    if not np.isfinite(loss):
        raise ValueError(f"the probe's loss is {loss}: features are not finite")
    predicted = scores.argmax(1)
    with optional_plot(out / "confusion.png"):
        _draw_confusion(judged, predicted.numpy(), classes, out / "confusion.png")
    return {"top1": float((predicted == truth).double().mean()), "loss": loss}


def subset_per_class(labels: NDArray[np.int64], per_class: int | None, seed: int) -> NDArray[np.int64]:
    """Ascending indices (n,) of up to `per_class` random images of each class; of all images if that is None.

    With the same seed, a larger `per_class` includes the images of a smaller one.
    """
    order = np.random.default_rng(fingerprint.seed_of(seed, "labels", len(labels))).permutation(len(labels))
    kept = [order[labels[order] == label][:per_class] for label in np.unique(labels)]
    return np.sort(np.concatenate(kept))


def moments(rows: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation (D,) of features (N, D), summed in float64.

    A feature that is constant up to rounding gets the deviation 1, so that its rounding noise is not amplified.
    """
    mean = rows.mean(0, dtype=np.float64)
    squares = np.zeros_like(mean)
    for start in range(0, len(rows), BLOCK):
        squares += np.square(rows[start : start + BLOCK] - mean).sum(0)
    scale = np.sqrt(squares / len(rows))
    constant = scale <= 1e-6 * np.abs(mean) + np.finfo(np.float32).tiny
    return mean, np.where(constant, 1.0, scale)


def standardise(rows: NDArray[np.float32], mean: NDArray[np.float64], scale: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
    """Features (N, D) as (rows - mean) / scale, in `dtype`."""
    result = torch.empty(rows.shape, dtype=dtype)
    for start in range(0, len(rows), BLOCK):
        result[start : start + BLOCK] = torch.from_numpy((rows[start : start + BLOCK] - mean) / scale)
    return result


def fit(rows: Tensor, labels: NDArray[np.int64], classes: int, *, l2: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Weights (D, C) and biases (C,) that minimise mean cross-entropy + l2 / 2 * sum of squared weights.

    Biases are not penalised. The fit starts at zero, so it needs no seed. If it has not converged after `iterations`, the last
    iterate is used and a warning is logged.

    Args:
        rows: (N, D), standardised. Products are computed in its dtype and on its device, the loss is summed in float64.
        labels: (N,) in [0, classes).
    """
    from scipy.optimize import minimize

    width = rows.shape[1]
    answer = minimize(
        _loss_and_gradient,
        np.zeros((width + 1) * classes),
        args=(rows, torch.from_numpy(labels).to(rows.device), classes, l2),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": iterations, "maxfun": 4 * iterations, "ftol": 1e-10, "gtol": 1e-6},
    )
    if answer.nit >= iterations:
        log.warning("a linear probe did not converge within %d iterations", iterations)
    matrix = torch.from_numpy(answer.x).view(width + 1, classes).to(rows)
    return matrix[:-1], matrix[-1]


def _loss_and_gradient(
    flat: NDArray[np.float64], rows: Tensor, labels: Tensor, classes: int, l2: float
) -> tuple[float, NDArray[np.float64]]:
    exact = torch.from_numpy(flat).view(-1, classes).to(rows.device)
    matrix = exact.to(rows.dtype)
    loss, gradient = 0.0, torch.zeros_like(exact)
    for start in range(0, len(rows), BLOCK):
        block, truth = rows[start : start + BLOCK], labels[start : start + BLOCK, None]
        log_shares = torch.addmm(matrix[-1], block, matrix[:-1]).log_softmax(1)
        loss -= float(log_shares.gather(1, truth).sum(dtype=torch.float64))
        error = log_shares.exp_()
        error.scatter_add_(1, truth, torch.full_like(truth, -1, dtype=error.dtype))
        gradient[:-1] += block.T @ error
        gradient[-1] += error.sum(0)
        progress.advance("blocks")
    gradient /= len(rows)
    gradient[:-1] += l2 * exact[:-1]
    return loss / len(rows) + l2 / 2 * float(exact[:-1].square().sum()), gradient.cpu().numpy().ravel()


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
