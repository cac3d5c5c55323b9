"""k nearest neighbours: classify each image by a vote of the most similar training images. Nothing is trained.

Similarity is the cosine; each neighbour votes for its class with weight exp(similarity / temperature).

Source: Wu, Xiong, Yu and Lin, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination" (2018), section 3.4;
k = 20 and temperature 0.07 as in Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (DINO, 2021),
section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ktray import progress
from ktray.images import Images
from ktray.spec import EvaluationFields

REVISION = 1
NEEDS_LABELS = True
DIRECTION: dict[str, Literal["max", "min"]] = {"top1": "max"}
SIMILARITIES = 1 << 26  # most similarities held at once: 256 MiB


class Spec(EvaluationFields):
    """A weighted vote of the nearest training images in feature space."""

    kind: Literal["knn"] = "knn"
    k: int = Field(default=20, ge=1, description="number of neighbours; all training images if there are fewer")
    temperature: float | None = Field(
        default=0.07, gt=0, description="lower gives near neighbours more weight; null: one vote each"
    )


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

    Args:
        features: images -> (N, D) float32, one row per image in their order.
        train: the voting images, with labels (N,) int64 in [0, classes).
        judged: the images to classify, with labels (M,) int64 in [0, classes).
        pseudo_labels: not used.
        out: nothing is written there.
        device: torch device that holds the features and up to `SIMILARITIES` similarities, such as ``cuda:0``.

    Raises:
        ValueError: labels are missing, `train` or `judged` is empty, or features are not finite.
    """
    if train.labels is None or judged.labels is None or not len(train) or not len(judged):
        raise ValueError("nearest neighbours need labelled training images and labelled images to judge")
    bank, queries = features(train), features(judged)
    predicted = predict(bank, train.labels, queries, k=spec.k, temperature=spec.temperature, device=device)
    return {"top1": float((predicted == judged.labels).mean())}


def predict(
    bank: NDArray[np.float32],
    labels: NDArray[np.int64],
    queries: NDArray[np.float32],
    *,
    k: int,
    temperature: float | None,
    device: str = "cpu",
) -> NDArray[np.int64]:
    """Classes (M,) of the queries (M, D), by a vote of the k rows of the bank (N, D) with the highest cosine similarity.

    Ties go to the smallest class. A row of zeros has similarity 0 to everything.

    Raises:
        ValueError: features are not finite.
    """
    rows, targets = _unit(bank, device), _unit(queries, device)
    owners, classes = torch.from_numpy(labels).to(device), int(labels.max()) + 1
    block = max(1, SIMILARITIES // len(rows))
    predicted = []
    for start in range(0, len(targets), block):
        nearest, index = (targets[start : start + block] @ rows.T).topk(min(k, len(rows)), dim=1)
        if temperature is None:
            weights = torch.ones_like(nearest, dtype=torch.float64)
        else:  # relative to the nearest, because exp(1 / temperature) overflows for small temperatures
            weights = ((nearest - nearest[:, :1]).double() / temperature).exp()
        votes = torch.zeros(len(nearest), classes, dtype=torch.float64, device=device).scatter_add_(1, owners[index], weights)
        progress.advance("judged", len(votes))
        predicted.append(votes.cpu().numpy().argmax(1))  # numpy's argmax returns the first maximum, torch's any of them
    return np.concatenate(predicted)


def _unit(rows: NDArray[np.float32], device: str) -> Tensor:
    if not np.isfinite(rows).all():
        raise ValueError(f"{int((~np.isfinite(rows).all(1)).sum())} of {len(rows)} features are not finite")
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32, device=device), dim=1)
