"""k nearest neighbours: classify each image by a vote of the most similar training images. Nothing is trained.

Similarity is the cosine; each neighbour votes for its class with weight exp(similarity / temperature).

Source: Wu, Xiong, Yu and Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018), section 3.4;
k = 20 and temperature 0.07 as in Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO, 2021),
section 4.1, whose code tries k of 10, 20, 100 and 200.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from ktray.classifiers import linear_classifiers, neighbours
from ktray.images import Images
from ktray.scoring import per_image
from ktray.spec import Count, EvaluationFields

REVISION = 2
TOOLS = (neighbours, linear_classifiers)
NEEDS_LABELS = True
DIRECTION: dict[str, Literal["max", "min"]] = {"top1": "max"}


class Spec(EvaluationFields):
    """A weighted vote of the nearest training images in feature space."""

    kind: Literal["knn"] = "knn"
    k: Count | Annotated[tuple[Count, ...], Field(min_length=1, max_length=50)] = Field(
        default=20, description="number of neighbours, all training images if there are fewer; of several, top1 is of the first"
    )
    temperature: float | None = Field(
        default=0.07, gt=0, description="lower gives near neighbours more weight; null: one vote each"
    )


def numbers(spec: Spec) -> tuple[int, ...]:
    """The numbers of neighbours."""
    return spec.k if isinstance(spec.k, tuple) else (spec.k,)


def directions(spec: Spec) -> dict[str, Literal["max", "min"]]:
    """The metrics of this spec: `top1`, and of several k also `top1_k10` and so on."""
    several = numbers(spec)
    return {**DIRECTION, **{f"top1_k{k}": "max" for k in several if len(several) > 1}}


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
    """`top1` in [0, 1]: the share of `judged` images whose class wins the vote of their neighbours in `train`.

    Of several k, `top1` is that of the first, and each has its own metric, such as `top1_k10`; the neighbours are found once.
    The results of each image are written to `per_image.parquet`.

    Args:
        features: images -> (N, D) float32, one row per image in their order.
        train: the voting images, with labels (N,) int64 in [0, classes).
        judged: the images to classify, with labels (M,) int64 in [0, classes).
        pseudo_labels: not used.
        out: where the file is written.
        device: torch device that holds the features and a block of similarities, such as ``cuda:0``.

    Raises:
        ValueError: labels are missing, `train` or `judged` is empty, or features are not finite.
    """
    if train.labels is None or judged.labels is None or not len(train) or not len(judged):
        raise ValueError("nearest neighbours need labelled training images and labelled images to judge")
    several = numbers(spec)
    found = predict(features(train), train.labels, features(judged), k=several, temperature=spec.temperature, device=device)
    right = (found == judged.labels[:, None]).astype(np.float64)  # (M, number of k)
    columns = {"top1": right[:, 0]} | {f"top1_k{k}": right[:, index] for index, k in enumerate(several) if len(several) > 1}
    per_image.write(out, judged.names, {**columns, "predicted": found[:, 0], "truth": judged.labels})
    return {name: float(values.mean()) for name, values in columns.items()}


def predict(
    bank: NDArray[np.float32],
    labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    *,
    k: tuple[int, ...],
    temperature: float | None,
    device: str = "cpu",
) -> NDArray[np.int64]:
    """Classes (M, number of k) of the queries (M, D), by votes of the k rows of the bank (N, D) with the highest cosines.

    Ties go to the smallest class. A row of zeros has similarity 0 to everything.

    Raises:
        ValueError: features are not finite.
    """
    rows, targets = (linear_classifiers.unit(linear_classifiers.on_device(each, device)) for each in (bank, queries))
    owners, classes = torch.from_numpy(labels).to(device), int(labels.max()) + 1
    predicted = []
    for _, similarities, nearest in neighbours.nearest(rows, targets, max(k)):
        voters = owners[nearest]
        votes = [neighbours.votes(similarities[:, :each], voters[:, :each], classes, temperature) for each in k]
        # numpy's argmax returns the first maximum, torch's any of them
        predicted.append(np.stack([each.cpu().numpy().argmax(1) for each in votes], 1))
    return np.concatenate(predicted)
