"""Histograms of oriented gradients (HOG): the position and orientation of edges.

As in scikit-image with blocks of 2 x 2 cells and `block_norm="L2-Hys"`: at each pixel the colour channel with the largest
gradient, unsigned orientations without interpolation, no smoothing within cells.

This is the plain descriptor of the whole image. For the bag of words of Noroozi et al., CVPR 2018, see `bag_of_hog`.

Source: Dalal and Triggs, CVPR 2005, section 6; tested against `skimage.feature.hog`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from ktray.errors import UserError
from ktray.strict import StrictSpec

REVISION = 1

_RANGE = 255  # the difference of two pixels lies in [-255, 255]
_PIXELS = 1 << 18  # most pixels computed at once, so that images of 224 px do not need gigabytes
_EPSILON = 1e-5  # scikit-image's, for pixels in [0, 255]


class Spec(StrictSpec):
    """One orientation histogram per square cell, normalised in overlapping square blocks of cells."""

    kind: Literal["hog"] = "hog"
    cell: int = Field(
        default=8, ge=2, description="side of a cell in pixels; leftover pixels at the right and the bottom are ignored"
    )
    orientations: int = Field(default=9, ge=2, le=180, description="bins of the orientation histogram, over 180 degrees")
    block: int = Field(default=2, ge=1, description="side of a block in cells")


def describe(spec: Spec, state: dict[str, NDArray[Any]] | None, images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, D) float32 in [0, 1], D = (H // cell - block + 1)^2 * block^2 * orientations for H = W.

    Raises:
        UserError: the images are smaller than one block.
    """
    height, width = images.shape[1:3]
    if min(height, width) // spec.cell < spec.block:
        raise UserError(
            f"images of {width} x {height} px are too small for a block of {spec.block} x {spec.block} cells of {spec.cell} px",
            "descriptor.cell",
            f"A cell of at most {min(height, width) // spec.block} px.",
        )
    pieces = images.split(max(1, _PIXELS // (height * width)))
    cells = torch.cat([_histograms(spec, piece) for piece in pieces])
    blocks = cells.unfold(2, spec.block, 1).unfold(3, spec.block, 1)  # (B, orientations, rows, columns, block, block)
    blocks = blocks.permute(0, 2, 3, 4, 5, 1).flatten(3)
    clipped = _unit(blocks).clamp_max(0.2)
    return _unit(clipped).flatten(1)


def _unit(blocks: Tensor) -> Tensor:
    return blocks / (blocks.square().sum(dim=-1, keepdim=True) + _EPSILON**2).sqrt()


def _histograms(spec: Spec, images: Tensor) -> Tensor:
    """(B, orientations, rows, columns) float32: the gradient magnitude per orientation, averaged over the pixels of a cell."""
    signed = images.permute(0, 3, 1, 2).to(torch.int32, memory_format=torch.contiguous_format)
    down, right = torch.zeros_like(signed), torch.zeros_like(signed)
    torch.sub(signed[:, :, 2:], signed[:, :, :-2], out=down[:, :, 1:-1])
    torch.sub(signed[..., 2:], signed[..., :-2], out=right[..., 1:-1])
    squared = down * down + right * right
    strongest, gradient_index = squared[:, 0], _gradient_index(down[:, 0], right[:, 0])
    for channel in (1, 2):
        stronger = squared[:, channel] > strongest
        strongest = torch.where(stronger, squared[:, channel], strongest)
        gradient_index = torch.where(stronger, _gradient_index(down[:, channel], right[:, channel]), gradient_index)
    orientation = _bins(spec.orientations, str(images.device))[gradient_index].unsqueeze(1)
    layers = torch.zeros(len(images), spec.orientations, *images.shape[1:3], device=images.device)
    layers.scatter_(1, orientation, strongest.float().sqrt().unsqueeze(1))
    return nn.functional.avg_pool2d(layers, spec.cell)


def _gradient_index(down: Tensor, right: Tensor) -> Tensor:
    return (down + _RANGE) * (2 * _RANGE + 1) + (right + _RANGE)


@lru_cache(maxsize=8)
def _bins(orientations: int, device: str) -> Tensor:
    """The orientation bin (int64) of every gradient between 8-bit pixels, (511 * 511,).

    A lookup table, so that an angle on the border of two bins, such as 45 degrees, falls into the same bin on every device and
    in scikit-image, whose borders are float32.
    """
    down, right = np.meshgrid(np.arange(-_RANGE, _RANGE + 1.0), np.arange(-_RANGE, _RANGE + 1.0), indexing="ij")
    angles = np.rad2deg(np.arctan2(down, right)) % 180
    starts = np.float32(180 / orientations) * np.arange(orientations, dtype=np.float32)
    return torch.from_numpy(np.searchsorted(starts, angles.ravel(), side="right") - 1).to(device)
