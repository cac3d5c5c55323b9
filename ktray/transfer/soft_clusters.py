"""Soft clusters: the student learns how near each image's features are to several clusters, not only which is the nearest.

The target of an image at squared distances d_1 <= ... <= d_m of its m nearest centroids is softmax(-d / (temperature * s)) over
these m clusters, 0 for all others, with s the mean of d_1 over the images. So a temperature means the same for every teacher,
whatever the scale of its features; at temperature 0 it would be `clusters`.

Source: Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385, for the clusters; Hinton, Vinyals, Dean,
"Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2, for softened targets. Their combination by
distances is ours.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from ktray.ops import augmentation
from ktray.spec import Augment, Seed
from ktray.strict import StrictSpec
from ktray.training.targets import Targets, require_images
from ktray.training.task import Task

REVISION = 1
TOOLS = (augmentation,)

NEEDS: dict[str, tuple[str, ...]] = {
    "clusters": ("k", "l2", "pca", "whiten", "l2_after", "iterations", "seed"),
    "pseudo_labels": ("neighbours",),
}


class Spec(StrictSpec):
    """k-means as in `clusters`; every image is kept, and belongs to its nearest clusters by degrees."""

    kind: Literal["soft_clusters"] = "soft_clusters"
    k: int = Field(default=500, ge=2, description="clusters")
    neighbours: int = Field(default=10, ge=2, le=1000, description="nearest clusters that share an image; at most k")
    temperature: float = Field(default=0.1, gt=0, le=100, description="of the mean squared distance to the nearest centroid")
    l2: bool = Field(default=True, description="features to length 1 first")
    pca: int | None = Field(default=None, ge=1, description="components kept; null: no PCA")
    whiten: bool = Field(default=False, description="components to unit variance")
    l2_after: bool = Field(default=False, description="to length 1 again at the end")
    iterations: int = Field(default=20, ge=1, le=1000)
    seed: Seed = 0

    @model_validator(mode="after")
    def _as_many_neighbours_as_clusters(self) -> Spec:
        if self.neighbours > self.k:
            raise ValueError(f"there are k={self.k} clusters, and neighbours={self.neighbours} of them; use at most {self.k}")
        return self


def check(spec: Spec, count: int, clustered: int) -> None:
    """Refuse more clusters than images.

    Args:
        count: number of images that the student is trained on.
        clustered: number of images whose features are clustered.

    Raises:
        UserError: there are too few images.
    """
    require_images(spec.k, clustered)


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """A linear head; the loss is the cross entropy to the soft target, "top1" how often the nearest cluster comes first.

    Raises:
        ValueError: the pseudo-labels say nothing of distances.
    """
    (head,) = targets.heads
    if head.nearest is None or head.squared is None:
        raise ValueError("soft_clusters reads the distances to the nearest clusters, and there are none")
    nearest = torch.from_numpy(np.array(head.nearest, np.int64))
    shares = torch.from_numpy(shared(np.asarray(head.squared), spec.temperature))

    def batch(images: Tensor, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seen = augmentation.to_float(augmentation.views(images, augment, generator))
        soft = torch.zeros(len(indices), head.classes).scatter_(1, nearest[indices], shares[indices])
        return seen, soft.to(images.device)

    return Task(head=lambda width: nn.Linear(width, head.classes), batch=batch, loss=cross_entropy, mean_over_images=True)


def shared(squared: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Shares (N, m) float32 of each image's nearest clusters, rows that sum to 1.

    Args:
        squared: (N, m) squared distances, ascending.
        temperature: in units of the mean of the first column.
    """
    wide = squared.astype(np.float64)
    scale = max(
        temperature * float(wide[:, 0].mean()), 1e-30
    )  # 0 if every image is a centroid: then its own cluster has it all
    weights = np.exp(-(wide - wide[:, :1]) / scale)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def cross_entropy(logits: Tensor, soft: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean cross entropy of soft targets, and {"top1"} in [0, 1].

    Args:
        logits: (B, K) float.
        soft: (B, K) float, rows that sum to 1.
    """
    hits = logits.detach().max(1).indices == soft.max(1).indices
    return nn.functional.cross_entropy(logits, soft), {"top1": hits.float().mean()}
