"""Inpainting: predict the missing square of an image (context encoders without the adversarial loss).

A square with half the side of the image is replaced by mid-grey, at the centre or at a random position. A decoder predicts the
mean colour of each missing cell of a grid from the backbone's feature vector.

Differences from the source: a two-layer decoder predicts cells instead of pixels; the source's random variant removes several
smaller regions; there is no adversarial loss, which the authors also omit when they learn features.

Source: Pathak, Krähenbühl, Donahue, Darrell, Efros, CVPR 2016, arXiv:1604.07379, sections 3.2 and 3.3 (equation 1).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from ktray.ops import augmentation, patches
from ktray.ops.random_draws import Draws
from ktray.spec import Augment, UnmixedAugment
from ktray.strict import StrictSpec
from ktray.training.task import Task

REVISION = 1
TOOLS = (augmentation, patches)


class Spec(StrictSpec):
    """`grid` / 2 by `grid` / 2 cells are missing; the image is cropped to a whole number of pixels per cell."""

    kind: Literal["inpainting"] = "inpainting"
    place: Literal["centre", "random"] = "centre"
    grid: int = Field(default=8, ge=2, le=64, description="cells per side of the image; even")
    hidden: int = Field(default=256, ge=8, le=8192, description="width of the decoder")
    augment: UnmixedAugment = Augment(crop=2, flip=True)

    @field_validator("grid")
    @classmethod
    def _halves(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"half of {value} cells is not a whole number of cells; use an even number")
        return value


def task(spec: Spec, size: int) -> Task:
    """Metric "explained": the explained share of the variance of the missing cells; 1 is perfect, 0 is their mean colour.

    Args:
        size: side of the images in pixels.
    """
    side = max(size - size % spec.grid, spec.grid)

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        draws: dict[str, Any] = {"views": augmentation.draw_views(len(indices), spec.augment, generator)}
        if spec.place == "random":
            draws["corner"] = torch.randint(spec.grid // 2 + 1, (2, len(indices), 1), generator=generator)
        return draws

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        squares = patches.resize_square(augmentation.random_views(images, spec.augment, draws["views"]), side).permute(
            0, 3, 1, 2
        )
        corner = (
            draws["corner"] if spec.place == "random" else torch.full((2, len(images), 1), spec.grid // 4, device=images.device)
        )
        hole = holes(corner, spec.grid)
        cells = nn.functional.avg_pool2d(squares, side // spec.grid)
        pixels = hole.repeat_interleave(side // spec.grid, dim=1).repeat_interleave(side // spec.grid, dim=2)
        seen = squares.masked_fill(pixels[:, None], 0.0)  # 0 is mid-grey in the range of `augmentation.to_float`
        return seen.contiguous(memory_format=torch.channels_last), torch.cat([cells, hole[:, None].float()], dim=1)

    def head(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, spec.hidden),
            nn.BatchNorm1d(spec.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(spec.hidden, 3 * spec.grid**2),
            nn.Unflatten(1, (3, spec.grid, spec.grid)),
        )

    return Task(head=head, draw=draw, batch=batch, loss=reconstruction, mean_over_images=True, capturable=True)


def holes(corner: Tensor, grid: int) -> Tensor:
    """Masks of the missing cells, (B, grid, grid) bool: a square of half the side, at a corner (2, B, 1): row and column."""
    along = torch.arange(grid, device=corner.device)
    rows, columns = (along >= corner) & (along < corner + grid // 2)
    masks: Tensor = rows[:, :, None] & columns[:, None, :]
    return masks


def reconstruction(predicted: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The mean squared error over the missing cells, and {"explained"}.

    Args:
        predicted: (B, 3, grid, grid) float.
        targets: (B, 4, grid, grid) float: the true colours of the cells, then 1 where a cell is missing.

    Source: Pathak et al., equation 1.
    """
    cells, hole = targets.split([3, 1], dim=1)
    count = 3 * hole.sum()
    error = ((predicted - cells).square() * hole).sum() / count
    mean = (cells * hole).sum(dim=(0, 2, 3), keepdim=True) * 3 / count
    variance = ((cells - mean).square() * hole).sum() / count
    return error, {"explained": 1 - error.detach() / variance.clamp_min(1e-12)}
