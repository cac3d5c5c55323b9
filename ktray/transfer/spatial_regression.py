"""Spatial regression: the student predicts the teacher's features at each position of a grid.

The teacher is a network with a `layer` and ``pool: {grid: …}``; its grid is that of the transfer. A linear layer on the
student's map, resized to the grid, is the head, and is discarded after training. For students of detection and segmentation.

Differences from the source: the teacher sees each image once, and the geometry of the student's view is applied to its map
(see `ktray.training.feature_maps`), where the source applies the same strong augmentation to the inputs of both.

Source: what LightlyTrain's documentation describes as `distillation` v2 (docs.lightly.ai/train/0.7.0, "What's under the hood":
the mean squared error between the features of student and teacher; read there, not in its code), after Beyer et al.,
"Knowledge distillation: A good teacher is patient and consistent", CVPR 2022, arXiv:2106.05237; regression of maps: Romero et
al., "FitNets", ICLR 2015, arXiv:1412.6550. `grid` and `standardise` are our own defaults, the latter so
that no channel's scale decides.
"""

from __future__ import annotations

from typing import Literal, cast

from pydantic import Field
from torch import Tensor, nn

from ktray.ops import augmentation
from ktray.ops.random_draws import Draws
from ktray.spec import Augment
from ktray.strict import StrictSpec
from ktray.training import distillation, feature_maps
from ktray.training.feature_maps import PositionHead
from ktray.training.task import Targets, Task

REVISION = 1
TOOLS = (augmentation, distillation, feature_maps)

READS_MAPS = True
NEEDS: dict[str, tuple[str, ...]] = {"features": ()}


class Spec(StrictSpec):
    """A linear layer on the student's feature map predicts the teacher's features of each position."""

    kind: Literal["spatial_regression"] = "spatial_regression"
    grid: int = Field(default=4, ge=1, le=64, description="positions per side; the teacher's pool.grid")
    layer: str | None = Field(default=None, description="the student's layer with maps; null: its last")
    standardise: bool = Field(default=True, description="first scale each teacher channel to mean 0 and variance 1")


check_networks = feature_maps.check_networks


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Regression of the teacher's map. Metric "cosine": the mean similarity to it over positions, in [-1, 1].

    Raises:
        ValueError: there are no teacher features, or they are no maps of the grid.
    """
    features = targets.require_features()
    width = feature_maps.channels(features, spec.grid)
    maps_of = feature_maps.standardised(features, spec.grid, spec.standardise)
    draw, rows = distillation.feature_batch(features, augment, lambda rows: rows)

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen, found = rows(images, indices, draws)
        return seen, feature_maps.view_of_maps(maps_of(found), augment, draws["views"], images.shape[1])

    return Task(
        head=lambda own: PositionHead(width, spec.grid, spec.layer),
        draw=draw,
        batch=batch,
        loss=feature_maps.mean_squared_error,
        prepare=lambda model: feature_maps.begin(model, cast(PositionHead, model["head"]), targets.size),
        forward=forward,
        mean_over_images=True,
        capturable=True,
    )


def forward(model: nn.ModuleDict, inputs: Tensor) -> Tensor:
    """(B, 3, h, w) -> the student's predictions (B, C, grid, grid)."""
    head = cast(PositionHead, model["head"])
    _, maps = feature_maps.features_and_maps(model["backbone"], head.layer, inputs)
    predicted: Tensor = head(maps)
    return predicted
