"""Similarity to a queue and spatial regression at once: the student learns the teacher's soft labels and its feature map.

The losses of `queue_similarity` and `spatial_regression`, added. The global feature of an image is the mean of its map, so both
come from the same features of the teacher, which is a network with a `layer` and ``pool: {grid: …}``.

Differences from the source: those of the two transfers; the weights of the two losses are our own.

Source: what LightlyTrain's documentation describes as `distillation` v3, "strong on both global tasks and dense tasks"
(docs.lightly.ai/train/0.16.4, methods, distillation; read there, not in its code): v1 and v2 together.
Defaults: as of the two transfers, whose descriptions have their sources; equal weights are our own.
"""

from __future__ import annotations

from typing import Annotated, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.ops import augmentation
from ktray.ops.random_draws import Draws
from ktray.spec import Augment
from ktray.strict import StrictSpec
from ktray.training import distillation, feature_maps, teacher_queue
from ktray.training.feature_maps import PositionHead
from ktray.training.task import Targets, Task

REVISION = 1
TOOLS = (augmentation, distillation, feature_maps, teacher_queue)

READS_MAPS = True
NEEDS: dict[str, tuple[str, ...]] = {"features": ()}


class Spec(StrictSpec):
    """Two heads: an MLP on the student's features for the queue, and a linear layer on its map for the positions."""

    kind: Literal["queue_and_spatial"] = "queue_and_spatial"
    queue: int = Field(default=4096, ge=2, le=131072, description="images in the queue of a step")
    temperature: float = Field(default=0.04, gt=0, le=10, description="softmax temperature of the student")
    teacher_temperature: float | None = Field(
        default=None, gt=0, le=10, description="softmax temperature of the teacher; null: the same as the student's"
    )
    hidden: tuple[Annotated[int, Field(ge=8, le=16384)], ...] = Field(
        default=(512,), max_length=8, description="widths of the global head's hidden layers; []: a linear head"
    )
    grid: int = Field(default=4, ge=1, le=64, description="positions per side; the teacher's pool.grid")
    layer: str | None = Field(default=None, description="the student's layer with maps; null: its last")
    standardise: bool = Field(default=True, description="first scale each teacher channel to mean 0 and variance 1")
    spatial: float = Field(default=1.0, gt=0, le=1000, description="weight of the spatial loss; that of the queue is 1")


check_networks = feature_maps.check_networks


class _Heads(nn.Module):
    """The MLP for global features, and the layer for positions."""

    def __init__(self, width: int, spec: Spec, out: int) -> None:
        super().__init__()
        self.whole = distillation.mlp_head(width, spec.hidden, out)
        self.positions = PositionHead(out, spec.grid, spec.layer)


def task(spec: Spec, targets: Targets, augment: Augment) -> Task:
    """Both losses. Metrics "nearest" (of the queue) and "cosine" (over positions).

    Raises:
        ValueError: there are no teacher features, or they are no maps of the grid.
        UserError: they do not fit on a device.
    """
    features = targets.require_features()
    teacher_queue.require_resident(features)
    width = feature_maps.channels(features, spec.grid)
    maps_of = feature_maps.standardised(features, spec.grid, spec.standardise)
    draw_rows, rows = distillation.feature_batch(features, augment, lambda rows: rows)

    def whole_of(found: Tensor) -> Tensor:
        means: Tensor = found.unflatten(1, (width, -1)).mean(dim=2)
        return means

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        return {**draw_rows(indices, generator), "queue": teacher_queue.draw_queue(len(features), spec.queue, generator)}

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen, found = rows(images, indices, draws)
        maps = feature_maps.view_of_maps(maps_of(found), augment, draws["views"], images.shape[1])
        both = torch.cat([nn.functional.normalize(whole_of(found), dim=1), maps.flatten(1)], dim=1)
        return seen, teacher_queue.with_queue(both, draws["queue"])

    def loss(outputs: Tensor, given: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        unit, maps, queue = given.split([width, features.width, spec.queue], dim=1)
        predicted, predicted_maps = outputs.split([width, features.width], dim=1)
        shape = (width, spec.grid, spec.grid)
        spatial, agreement = feature_maps.mean_squared_error(predicted_maps.unflatten(1, shape), maps.unflatten(1, shape))
        colder = spec.teacher_temperature or spec.temperature
        divergence, nearest = teacher_queue.queue_divergence(
            predicted, unit, queue, lambda which: whole_of(features.rows_on(outputs.device, which)), spec.temperature, colder
        )
        return divergence + spec.spatial * spatial, {**nearest, **agreement}

    return Task(
        head=lambda own: _Heads(own, spec, width),
        draw=draw,
        batch=batch,
        loss=loss,
        prepare=lambda model: feature_maps.begin(model, cast(_Heads, model["head"]).positions, targets.size),
        forward=forward,
        mean_over_images=True,
        capturable=True,
    )


def forward(model: nn.ModuleDict, inputs: Tensor) -> Tensor:
    """(B, 3, h, w) -> the predicted global feature and map of the teacher, (B, C + C * grid * grid)."""
    heads = cast(_Heads, model["head"])
    found, maps = feature_maps.features_and_maps(model["backbone"], heads.positions.layer, inputs)
    return torch.cat([heads.whole(found), heads.positions(maps).flatten(1)], dim=1)
