"""Dense clusters: the student predicts the cluster of the teacher's features at each position of a grid.

k-means on the features of positions (a seeded sample fits the centroids, all positions are assigned), as `clusters` on those of
images. A linear layer at each position of the student's map, resized to the grid, is the head. With `whole` a second head
learns the cluster of the whole image, the mean of its map, beside it. For students of detection and segmentation.

The teacher is a network with a `layer` and ``pool: {grid: …}``, the grid of the transfer. It saw the whole image once; the
clusters of its positions follow the crop and the flip of the student's view, each position that of the nearest one.

Source: Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385, for the clusters; clusters of patches: Darcet,
Baldassarre, Oquab, Mairal, Bojanowski, "CAPI", TMLR 2025, arXiv:2502.08769. Their combination, by labels that are computed
once, is our own.
"""

from __future__ import annotations

from typing import Literal, cast

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.ops import augmentation
from ktray.ops.random_draws import Draws, copies
from ktray.spec import KMEANS_FIELDS, Augment, KMeansFields
from ktray.training import feature_maps
from ktray.training.feature_maps import PositionHead
from ktray.training.task import Targets, Task, require_images

REVISION = 1
TOOLS = (augmentation, feature_maps)

READS_MAPS = True
NEEDS: dict[str, tuple[str, ...]] = {
    "clusters": (*KMEANS_FIELDS, "grid", "sample", "whole"),
    "pseudo_labels": (),
}


class Spec(KMeansFields):
    """k-means on the features of positions, after the optional steps L2, PCA, whitening and L2, in this order."""

    kind: Literal["dense_clusters"] = "dense_clusters"
    k: int = Field(default=500, ge=2, description="number of clusters of positions")
    grid: int = Field(default=4, ge=1, le=64, description="positions per side; the teacher's pool.grid")
    sample: int = Field(
        default=200_000, ge=2, description="positions that centroids are fitted to, drawn by the seed; fewer if there are fewer"
    )
    whole: int | None = Field(default=None, ge=2, description="clusters of whole images, learnt beside; null: none")
    layer: str | None = Field(default=None, description="the student's layer with maps; null: its last")


def check(spec: Spec, count: int, clustered: int) -> None:
    """Refuse more clusters than there is to cluster.

    Args:
        count: number of images that the student is trained on.
        clustered: number of images whose features are clustered.

    Raises:
        UserError: there are too few images.
    """
    require_images(spec.k, min(spec.sample, clustered * spec.grid**2))
    if spec.whole is not None:
        require_images(spec.whole, clustered)


check_networks = feature_maps.check_networks


class _Heads(nn.Module):
    """The layer for positions and, if there is one, the linear head for whole images."""

    def __init__(self, width: int, spec: Spec, k: int, whole: int | None) -> None:
        super().__init__()
        self.positions = PositionHead(k, spec.grid, spec.layer)
        self.whole = nn.Linear(width, whole) if whole else None


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Classification of positions, and of whole images. Metrics "top1" (over positions), with `whole` also "whole_top1".

    Raises:
        ValueError: the pseudo-labels are not those of positions.
    """
    dense, *others = targets.heads
    of_image = np.asarray(dense.of_image, np.int64).reshape(targets.count, -1)
    if of_image.shape[1] != spec.grid**2:
        raise ValueError(f"dense_clusters needs {spec.grid**2} pseudo-labels per image, and there are {of_image.shape[1]}")
    labels_on = copies(torch.from_numpy(of_image).view(-1, spec.grid, spec.grid))
    whole_on = copies(torch.from_numpy(np.asarray(others[0].of_image, np.int64))) if others else None

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen = augmentation.to_float(augmentation.random_views(images, augment, draws))
        labels = labels_on(images.device)[indices][:, None].float()  # cluster numbers are small, so float32 holds them
        moved = feature_maps.view_of_maps(labels, augment, draws, images.shape[1], "nearest").flatten(1).long()
        own = [] if whole_on is None else [whole_on(images.device)[indices][:, None]]
        return seen, torch.cat([moved, *own], dim=1)

    def loss(outputs: Tensor, wanted: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        cells = spec.grid**2
        logits = outputs[:, : dense.classes * cells].unflatten(1, (dense.classes, cells))
        found = nn.functional.cross_entropy(logits, wanted[:, :cells])
        metrics = {"top1": (logits.detach().max(1).indices == wanted[:, :cells]).float().mean()}
        if whole_on is None:
            return found, metrics
        rest = outputs[:, dense.classes * cells :]
        hits = rest.detach().max(1).indices == wanted[:, cells]
        both = torch.stack([found, nn.functional.cross_entropy(rest, wanted[:, cells])]).mean()
        return both, {**metrics, "whole_top1": hits.float().mean()}

    return Task(
        head=lambda width: _Heads(width, spec, dense.classes, others[0].classes if others else None),
        draw=lambda indices, generator: augmentation.draw_views(len(indices), augment, generator),
        batch=batch,
        loss=loss,
        prepare=lambda model: feature_maps.begin(model, cast(_Heads, model["head"]).positions, targets.size),
        forward=forward,
        mean_over_images=True,
        capturable=True,
    )


def forward(model: nn.ModuleDict, inputs: Tensor) -> Tensor:
    """(B, 3, h, w) -> logits of the clusters of each position, flattened, then those of the whole image."""
    heads = cast(_Heads, model["head"])
    found, maps = feature_maps.features_and_maps(model["backbone"], heads.positions.layer, inputs)
    logits = heads.positions(maps).flatten(1)
    return logits if heads.whole is None else torch.cat([logits, heads.whole(found)], dim=1)
