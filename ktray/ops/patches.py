"""Patches of images as separate inputs: the tiles of a puzzle, pairs of neighbours."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ktray.ops import augmentation

IDENTITY, REVISION = "patches", 1
TOOLS = (augmentation,)


def resize_square(images: Tensor, side: int) -> Tensor:
    """Square images brought to a given side: smaller ones are enlarged (bilinear), larger ones cropped at the centre.

    Args:
        images: (B, H, W, 3) uint8 with H = W.

    Returns:
        (B, side, side, 3) float32 as from `augmentation.to_float`.
    """
    pixels = augmentation.to_float(images)
    if images.shape[1] < side:
        pixels = nn.functional.interpolate(pixels, size=side, mode="bilinear", align_corners=False)
    edge = (pixels.shape[2] - side) // 2
    return pixels.permute(0, 2, 3, 1)[:, edge : edge + side, edge : edge + side]


def extract_patches(squares: Tensor, corner: Tensor, side: int) -> Tensor:
    """Patches cut from each image at given positions, which may differ between colour channels.

    Args:
        squares: (B, S, S, 3) float32.
        corner: (2, B, T, 3) or (2, B, T, 1) int64 on the device of `squares`: first row and first column of each patch, within
            [0, S - side].

    Returns:
        (B, T, 3, side, side) float32.
    """
    along = torch.arange(side, device=squares.device)[:, None]
    rows, columns = corner[:, :, :, None] + along  # (B, T, side, 3) each
    which = torch.arange(len(squares), device=squares.device)[:, None, None, None, None]
    channels = torch.arange(3, device=squares.device)
    return squares[which, rows[:, :, :, None], columns[:, :, None], channels].permute(0, 1, 4, 2, 3)


def standardise(patches: Tensor) -> Tensor:
    """Each patch with mean 0 and, unless it is constant, standard deviation 1 over its pixels and channels.

    Args:
        patches: (..., 3, h, w) float32 as from `augmentation.to_float`.
    """
    spread, mean = torch.std_mean(patches, dim=(-3, -2, -1), keepdim=True, correction=0)
    grey_level = 4 / 255  # limits the amplification of noise in a constant patch
    return (patches - mean) / (spread + grey_level)
