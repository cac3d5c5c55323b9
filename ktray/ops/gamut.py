"""Colours as classes: the bins of the ab plane inside the sRGB gamut, and the mean colours of an image's cells.

Source: Zhang, Isola, Efros, ECCV 2016, arXiv:1603.08511, section 2.1.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from ktray.ops import colour

IDENTITY, REVISION = "gamut", 1
TOOLS = (colour,)


@lru_cache(maxsize=8)
def gamut_bins(bin: int) -> Tensor:
    """Centres (Q, 2) float32 of the squares of the ab plane that contain an sRGB colour; multiples of `bin`, the side."""
    levels = torch.cat([torch.arange(0, 255, 4), torch.tensor([255])]).to(torch.uint8)
    cube = torch.cartesian_prod(levels, levels, levels).view(1, len(levels), -1, 3)
    bins = (colour.rgb_to_lab(cube)[..., 1:] / bin).round().long().view(-1, 2)
    colours: Tensor = bin * bins.unique(dim=0).float()
    return colours


def cell_means(maps: Tensor, grid: int) -> Tensor:
    """Mean of each cell of images (B, C, H, W), row by row: (B, grid * grid, C)."""
    return nn.functional.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)


def nearest_bin(ab: Tensor, colours: Tensor) -> Tensor:
    """The bin (...,) int64 in [0, Q) nearest to each colour (..., 2).

    Args:
        colours: centres of the bins, (Q, 2) as from `gamut_bins`.
    """
    return (ab[..., None, :] - colours).square().sum(-1).argmin(-1)
