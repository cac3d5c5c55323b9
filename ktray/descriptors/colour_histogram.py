"""Colour histograms of the image or of each cell of a grid: colour without shape.

Source: Swain & Ballard, Color indexing, IJCV 7(1), 1991.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from ktray.ops import colour
from ktray.strict import StrictSpec

REVISION = 1
TOOLS = (colour,)

# Lowest and highest value of each channel; ab of sRGB lie in [-87, 99] and [-108, 95].
_RANGES = {"rgb": ((0.0, 255.0),) * 3, "lab": ((0.0, 100.0), (-110.0, 110.0), (-110.0, 110.0))}


class Spec(StrictSpec):
    """A joint histogram over three channels, with bins of equal width."""

    kind: Literal["colour_histogram"] = "colour_histogram"
    space: Literal["rgb", "lab"] = "lab"
    bins: int = Field(default=8, ge=2, le=32, description="bins per channel; the histogram has bins^3")
    grid: int = Field(default=1, ge=1, le=16, description="cells per side, each with its own histogram")


def describe(spec: Spec, state: dict[str, NDArray[Any]] | None, images: Tensor) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, grid^2 * bins^3) float32: the normalised histogram of each cell, row by row; H, W >= grid."""
    seen = colour.rgb_to_lab(images) if spec.space == "lab" else images.to(torch.float32)
    low, high = torch.tensor(_RANGES[spec.space], device=images.device).unbind(1)
    place = ((seen - low) / (high - low) * spec.bins).long().clamp(0, spec.bins - 1)
    colours = (place[..., 0] * spec.bins + place[..., 1]) * spec.bins + place[..., 2]  # (B, H, W)
    row, column = (torch.arange(side, device=images.device) * spec.grid // side for side in images.shape[1:3])
    cell = row[:, None] * spec.grid + column
    counts = torch.zeros(len(images), spec.grid**2 * spec.bins**3, device=images.device)
    bin_index = (cell * spec.bins**3 + colours).flatten(1)
    counts.scatter_add_(1, bin_index, torch.ones_like(bin_index, dtype=torch.float32))
    counts = counts.view(len(images), spec.grid**2, spec.bins**3)
    return (counts / counts.sum(dim=2, keepdim=True)).flatten(1)
