"""Soft clusters: the student learns how near each image's features are to several clusters, not only to the nearest one.

With several teachers the student has one head per teacher, whose losses are averaged.

The target of an image whose m nearest centroids lie at squared distances d_1 <= ... <= d_m is softmax(-d / (temperature * s))
over these m clusters and 0 for all others, where s is the mean of d_1 over all images. Dividing by s makes a temperature mean
the same for every teacher, whatever the scale of its features. As the temperature goes to 0, this becomes `clusters`.

Source: Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385, for the clusters; Hinton, Vinyals, Dean,
"Distilling the Knowledge in a Neural Network", 2015, arXiv:1503.02531, section 2, for softened targets. Combining the two by
distance is our own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor, nn

from ktray.ops import augmentation, mixing
from ktray.ops.random_draws import Draws, copies
from ktray.spec import KMEANS_FIELDS, Augment, KMeansFields
from ktray.training.task import Labels, Targets, Task, require_images

REVISION = 1
TOOLS = (augmentation,)
TOOLS_OF_SOME = (mixing,)  # through `augmentation.tools_of`

MIXES_IMAGES = True
SEVERAL_TEACHERS = True
NEEDS: dict[str, tuple[str, ...]] = {
    "clusters": KMEANS_FIELDS,
    "pseudo_labels": ("neighbours",),
}


class Spec(KMeansFields):
    """k-means as in `clusters`; every image is kept and gets a soft assignment to its nearest clusters."""

    kind: Literal["soft_clusters"] = "soft_clusters"
    k: int = Field(default=500, ge=2, description="number of clusters")
    neighbours: int = Field(default=10, ge=2, le=1000, description="nearest clusters in an image's target; at most k")
    temperature: float = Field(
        default=0.1, gt=0, le=100, description="in units of the mean squared distance to the nearest centroid"
    )

    @model_validator(mode="after")
    def _as_many_neighbours_as_clusters(self) -> Spec:
        if self.neighbours > self.k:
            raise ValueError(f"neighbours={self.neighbours} exceeds the k={self.k} clusters; use at most {self.k}")
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
    """Cross entropy to soft targets by a linear head. Metric "top1": how often the nearest cluster is predicted.

    Raises:
        ValueError: the pseudo-labels carry no distances.
    """
    targets_of = [_soft_targets(head, spec.temperature) for head in targets.heads]
    widths = [head.classes for head in targets.heads]

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        views = augmentation.draw_views(len(indices), augment, generator)
        mixture = mixing.draw_mixing(len(indices), augment, generator)
        return {**views, "mixture": mixture} if mixture else views

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen = augmentation.to_float(augmentation.random_views(images, augment, draws))
        soft = torch.cat([of_head(indices) for of_head in targets_of], dim=1)
        if augment.mixes:
            seen, own = mixing.mix(seen, draws["mixture"])
            soft = own[:, None] * soft + (1 - own)[:, None] * soft[draws["mixture"]["partner"]]
        return seen, soft

    return Task(
        head=lambda width: nn.Linear(width, sum(widths)),
        draw=draw,
        batch=batch,
        loss=cross_entropy if len(widths) == 1 else functools.partial(joint_cross_entropy, widths=widths),
        mean_over_images=True,
        capturable=True,
    )


def _soft_targets(head: Labels, temperature: float) -> Callable[[Tensor], Tensor]:
    """A function: indices (B,) int64 of images -> their targets (B, K) float32 on the device of the indices."""
    if head.nearest is None or head.squared is None:
        raise ValueError("soft_clusters needs the distances to the nearest clusters, and the pseudo-labels carry none")
    nearest_on = copies(torch.from_numpy(np.array(head.nearest, np.int64)))
    assignments_on = copies(torch.from_numpy(soft_assignments(np.asarray(head.squared), temperature)))

    def of_images(indices: Tensor) -> Tensor:
        nearest, assignments = nearest_on(indices.device)[indices], assignments_on(indices.device)[indices]
        return assignments.new_zeros(len(indices), head.classes).scatter_(1, nearest, assignments)

    return of_images


def soft_assignments(squared: NDArray[np.float32], temperature: float) -> NDArray[np.float32]:
    """Soft assignments (N, m) float32 to each image's nearest clusters; rows sum to 1.

    Args:
        squared: (N, m) squared distances, ascending.
        temperature: in units of the mean of the first column.
    """
    distances = squared.astype(np.float64)
    # If every image is a centroid, the mean is 0; the lower bound then gives each image wholly to its own cluster.
    scale = max(temperature * float(distances[:, 0].mean()), 1e-30)
    weights = np.exp(-(distances - distances[:, :1]) / scale)
    assignments: NDArray[np.float32] = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return assignments


def cross_entropy(logits: Tensor, soft: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean cross entropy with soft targets, and {"top1"} in [0, 1].

    Args:
        logits: (B, K) float.
        soft: (B, K) float, rows that sum to 1.
    """
    hits = logits.detach().max(1).indices == soft.max(1).indices
    return nn.functional.cross_entropy(logits, soft), {"top1": hits.float().mean()}


def joint_cross_entropy(logits: Tensor, soft: Tensor, widths: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean over heads of `cross_entropy` and of its {"top1"}.

    Args:
        logits, soft: (B, sum of widths) float, head by head.
        widths: number of clusters of each head.
    """
    parts = zip(logits.split(list(widths), dim=1), soft.split(list(widths), dim=1), strict=True)
    losses, tops = zip(*((loss, found["top1"]) for loss, found in itertools.starmap(cross_entropy, parts)), strict=True)
    return torch.stack(losses).mean(), {"top1": torch.stack(tops).mean()}
