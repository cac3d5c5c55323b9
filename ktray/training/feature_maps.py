"""Feature maps in the training of a student: what it predicts at each position, and the teacher's features there as targets.

The teacher's features of a layer, pooled to a grid, are the targets of the cells of that grid. It saw the whole image once, so
the geometry of the student's view (crop, flip, resized crop) is applied to its map: an approximation, since the features of a
cropped image are not the crop of its features. RandAugment moves images in other ways, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ktray.errors import UserError
from ktray.ops import augmentation
from ktray.ops.random_draws import Draws, copies
from ktray.spec import Augment, Pooling
from ktray.training import distillation
from ktray.training.task import Features

TeacherView = tuple[str | None, Pooling] | None
"""The layer of a teacher whose features are read, and how its maps are pooled; None for a teacher that is no network."""

IDENTITY, REVISION = "feature_maps", 1
TOOLS = (augmentation, distillation)


class PositionHead(nn.Module):
    """A linear layer at each position of a student's feature map, resized to a grid: (B, W, h, w) -> (B, out, grid, grid).

    `begin` adds the layer once the width of the map is known.
    """

    project: nn.Conv2d

    def __init__(self, out: int, grid: int, layer: str | None) -> None:
        super().__init__()
        self.out, self.grid, self.layer = out, grid, layer

    def forward(self, maps: Tensor) -> Tensor:
        """Maps finer than the grid are averaged over its cells, coarser ones are interpolated."""
        if min(maps.shape[2:]) >= self.grid:
            resized = nn.functional.adaptive_avg_pool2d(maps, self.grid)
        else:
            resized = nn.functional.interpolate(maps, (self.grid, self.grid), mode="bilinear", align_corners=False)
        found: Tensor = self.project(resized)
        return found


def begin(model: nn.ModuleDict, head: PositionHead, size: int) -> None:
    """Add the linear layer to `head`, whose width is that of the maps that the backbone has of an image.

    Args:
        size: side of the images in pixels.
    """
    backbone = model["backbone"]
    device, training = next(backbone.parameters()).device, backbone.training
    with torch.no_grad():
        _, maps = features_and_maps(backbone.eval(), head.layer, torch.zeros(1, 3, size, size, device=device))
    backbone.train(training)
    head.project = nn.Conv2d(maps.shape[1], head.out, 1).to(device)


def features_and_maps(backbone: nn.Module, layer: str | None, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The features (B, D) of a network and the maps (B, W, h, w) of one of its layers, None for the last.

    Raises:
        UserError: there is no such layer, or it has no maps.
    """
    layers: tuple[str, ...] = backbone.layers  # type: ignore[assignment]
    name = layers[-1] if layer is None else layer
    if name not in layers:
        raise UserError(f"the student has no layer {name!r}", "layer", f"One of: {', '.join(layers)}.")
    found: list[Tensor] = []
    handle = backbone.get_submodule(name).register_forward_hook(lambda module, given, output: found.append(output))
    try:
        features: Tensor = backbone(inputs)
    finally:
        handle.remove()
    if found[0].ndim != 4:
        raise UserError(f"the layer {name!r} of the student has no maps", "layer", f"One of: {', '.join(layers)}.")
    return features, found[0]


class MapsSpec(Protocol):
    """What the Spec of a transfer has that learns feature maps."""

    @property
    def grid(self) -> int:
        """Cells per side of the teacher's map."""

    @property
    def layer(self) -> str | None:
        """The student's layer with maps; None for its last."""


def check_networks(spec: MapsSpec, teacher: TeacherView, student: nn.Module, size: int) -> None:
    """Refuse a teacher without maps of this grid, and a student's layer without maps.

    Args:
        teacher: the layer and the pooling of its features; None if it is no network.
        student: the untrained backbone.
        size: side of the student's images in pixels.

    Raises:
        UserError: with the field that is wrong.
    """
    grid = spec.grid
    if grid > 1:
        if teacher is None or teacher[0] is None or teacher[0].partition(":")[2] not in ("", "patches"):
            raise UserError(
                f"the student learns features at {grid} x {grid} positions, and the teacher's features are no maps",
                "grid",
                "Use a network as the teacher, with a 'layer' (or tokens: patches) and pool: {grid: " + str(grid) + "}.",
            )
        if teacher[1].grid != grid:
            raise UserError(
                f"the teacher's maps are pooled to grid={teacher[1].grid}, and grid={grid} is learnt",
                "grid",
                f"Write teacher.pool: {{grid: {grid}}}.",
            )
    with torch.no_grad():
        features_and_maps(student.eval(), spec.layer, torch.zeros(1, 3, size, size))


def channels(features: Features, grid: int) -> int:
    """C of features that are maps of C x grid x grid.

    Raises:
        ValueError: they are not.
    """
    if features.width % grid**2:
        raise ValueError(f"the teacher has {features.width} features per image, which are no maps of {grid} x {grid}")
    return features.width // grid**2


def standardised(features: Features, grid: int, wanted: bool) -> Callable[[Tensor], Tensor]:
    """A function: rows (B, C * grid * grid) -> maps (B, C, grid, grid), each channel with mean 0 and variance 1 if `wanted`.

    The moments are over all images and positions.
    """
    width = channels(features, grid)
    mean, deviation = torch.zeros(width), torch.ones(width)
    if wanted:
        means, deviations = (each.reshape(width, -1).astype(np.float64) for each in distillation.feature_moments(features))
        whole = means.mean(axis=1)
        spread = np.sqrt((deviations**2 + (means - whole[:, None]) ** 2).mean(axis=1))
        mean, deviation = torch.from_numpy(whole).float(), torch.from_numpy(np.where(spread > 0, spread, 1)).float()
    mean_on, deviation_on = copies(mean[:, None, None]), copies(deviation[:, None, None])
    return lambda rows: (rows.unflatten(1, (width, grid, grid)) - mean_on(rows.device)) / deviation_on(rows.device)


def view_of_maps(maps: Tensor, augment: Augment, draws: Draws, size: int, mode: str = "bilinear") -> Tensor:
    """The maps under the geometry of the student's views.

    Args:
        maps: (B, C, h, w) float32 of whole images.
        draws: of `augmentation.draw_views`, on their device.
        size: side of the images in pixels.
        mode: of `grid_sample`; beyond the border the nearest cell counts.
    """
    if not (augment.crop or augment.flip or augment.area is not None):
        return maps
    transforms = torch.eye(2, 3, device=maps.device).repeat(len(maps), 1, 1)
    if augment.area is not None:  # the last change of a view is the first on the way back to the image
        transforms = draws["crop"]
    if augment.flip:
        sign = 1 - 2 * draws["mirrored"].to(transforms.dtype)
        transforms = torch.stack([transforms[:, 0] * sign[:, None], transforms[:, 1]], dim=1)
    if augment.crop:
        shift = 2 * (draws["corner"][:, :, 0].flip(0).T - augment.crop).to(transforms.dtype) / size  # (B, 2): x, y
        transforms = torch.cat([transforms[:, :, :2], transforms[:, :, 2:] + shift[:, :, None]], dim=2)
    grid = nn.functional.affine_grid(transforms, list(maps.shape), align_corners=False)
    return nn.functional.grid_sample(maps, grid, mode=mode, padding_mode="border", align_corners=False)


def mean_squared_error(predictions: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean squared error over all channels and positions, and {"cosine"}, the mean cosine similarity over positions.

    Args:
        predictions, targets: (B, C, grid, grid) float.
    """
    cosine = nn.functional.cosine_similarity(predictions.detach(), targets, dim=1).mean()
    return (predictions - targets).square().mean(), {"cosine": cosine}
