"""Colour operations on batches of images: greyscale, random jitter, CIE Lab.

Random operations run on any device. Their draws, separate for each image, are made on the CPU (see `random_draws.py`).
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ktray.ops.random_draws import Draws, constant
from ktray.spec import Jitter

IDENTITY, REVISION = "colour", 1

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601: weights of red, green and blue
# Each row: the weights of the old red, green, blue in a new channel. Removes the green-magenta axis [-1, 2, -1] only.
PROJECTION = ((5 / 6, 1 / 3, -1 / 6), (1 / 3, 1 / 3, 1 / 3), (-1 / 6, 1 / 3, 5 / 6))
# Linear sRGB (IEC 61966-2-1) to CIE XYZ for D65 and 2 degrees, as in scikit-image; rows are divided by _WHITE before use
_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.95047, 1.0, 1.08883)


def luma(images: Tensor) -> Tensor:
    """Luma of each pixel: (B, 3, H, W) float32 -> (B, 1, H, W)."""
    weights = constant(LUMA, images.device).view(3, 1, 1)
    return (images * weights).sum(dim=1, keepdim=True)


def draw_chosen(count: int, share: float, generator: torch.Generator) -> Tensor:
    """Which images are chosen, each with probability `share`: (count,) bool."""
    return torch.rand(count, generator=generator) < share


def turn_grey(images: Tensor, chosen: Tensor) -> Tensor:
    """Images (B, 3, H, W) float32 with three equal channels where `chosen` (B,) bool says so."""
    return torch.where(chosen[:, None, None, None], luma(images), images)


def solarise(images: Tensor, chosen: Tensor) -> Tensor:
    """Images (B, 3, H, W) float32 in [0, 1] with values above one half inverted where `chosen` (B,) bool says so."""
    return torch.where(chosen[:, None, None, None], torch.where(images < 0.5, images, 1 - images), images)


def draw_jitter(count: int, changes: Jitter, generator: torch.Generator) -> dict[str, Tensor]:
    """What `random_jitter` needs: which images are changed (count,) bool, and their four changes (count, 4) float32."""
    chosen = draw_chosen(count, changes.share, generator)
    limits = torch.tensor([changes.brightness, changes.contrast, changes.saturation, changes.hue])
    return {"chosen": chosen, "changes": (2 * torch.rand(count, 4, generator=generator) - 1) * limits}


def random_jitter(images: Tensor, changes: Jitter, draws: Draws) -> Tensor:
    """Each image with random changes of brightness, contrast, saturation and hue, in this order, clipped after each.

    torchvision's `ColorJitter` also draws the order.

    Args:
        images: (B, 3, H, W) float32 in [0, 1].
        draws: of `draw_jitter`, on the device of `images`.

    Source: A. Howard, arXiv:1312.5402; strengths 0.4, 0.4, 0.4, 0.1 and share 0.8, Chen et al., ICML 2020, appendix B.9.
    """
    brightness, contrast, saturation, hue = draws["changes"][:, :, None, None, None].unbind(1)
    jittered = (images * (1 + brightness)).clamp(0, 1)
    mean = luma(jittered).mean(dim=(2, 3), keepdim=True)
    jittered = (mean + (jittered - mean) * (1 + contrast)).clamp(0, 1)
    grey = luma(jittered)
    jittered = (grey + (jittered - grey) * (1 + saturation)).clamp(0, 1)
    if changes.hue:
        jittered = shift_hue(jittered, hue[:, :, 0])
    return torch.where(draws["chosen"][:, None, None, None], jittered, images)


def shift_hue(images: Tensor, hue: Tensor) -> Tensor:
    """Images with their hue rotated; value and saturation (of HSV) do not change.

    Args:
        images: (B, 3, H, W) float32 in [0, 1].
        hue: (B, 1, 1) float32, in full turns.
    """
    value, low = images.amax(dim=1), images.amin(dim=1)
    chroma = value - low
    red, green, blue = images.unbind(1)
    scale = chroma.clamp_min(1e-8)
    sixth = torch.where(value == green, 2 + (blue - red) / scale, 4 + (red - green) / scale)
    sixth = torch.where(value == red, (green - blue) / scale, sixth) + 6 * hue
    channels = []
    for start in (5, 3, 1):
        position = (sixth + start) % 6
        channels.append(value - chroma * torch.minimum(position, 4 - position).clamp(0, 1))
    return torch.stack(channels, dim=1)


def rgb_to_lab(images: Tensor) -> Tensor:
    """sRGB images converted to CIE L*a*b* for white D65 (2 degrees): L in [0, 100], a in [-87, 99], b in [-108, 95].

    Args:
        images: (B, H, W, 3) uint8.

    Returns:
        (B, H, W, 3) float32.

    Source: CIE 15; sRGB by IEC 61966-2-1. Tested against `skimage.color.rgb2lab`.
    """
    encoded = images.to(torch.float32) / 255
    linear = torch.where(encoded > 0.04045, ((encoded + 0.055) / 1.055) ** 2.4, encoded / 12.92)
    matrix = constant(_TO_XYZ, images.device) / constant(_WHITE, images.device)[:, None]
    xyz = (linear[..., None, :] * matrix).sum(-1)  # not a matrix product, which may run at reduced precision on a GPU
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp_min(1e-6) ** (1 / 3), 7.787 * xyz + 16 / 116).unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def lab_to_rgb(lab: Tensor) -> Tensor:
    """CIE L*a*b* converted to sRGB, the inverse of `rgb_to_lab`; colours outside sRGB are clipped per channel.

    Args:
        lab: (B, 3, H, W) float32.

    Returns:
        (B, 3, H, W) float32 in [0, 1].

    Source: as `rgb_to_lab`. Tested against `skimage.color.lab2rgb`.
    """
    lightness, a, b = lab.unbind(1)
    y = (lightness + 16) / 116
    root = torch.stack([y + a / 500, y, (y - b / 200).clamp_min(0)], dim=1)
    xyz = torch.where(root > 6 / 29, root**3, (root - 16 / 116) / 7.787)
    linear = (constant(_from_xyz(), xyz.device).to(xyz.dtype)[:, :, None, None] * xyz[:, None]).sum(2)
    return torch.where(linear > 0.0031308, 1.055 * linear.clamp_min(1e-6) ** (1 / 2.4) - 0.055, 12.92 * linear).clamp(0, 1)


@functools.cache
def _from_xyz() -> tuple[tuple[float, ...], ...]:
    """CIE XYZ, as a share of white, to linear sRGB: the inverse of `_TO_XYZ` with its rows divided by `_WHITE`."""
    matrix = torch.tensor(_TO_XYZ, dtype=torch.float64) / torch.tensor(_WHITE, dtype=torch.float64)[:, None]
    return tuple(map(tuple, matrix.inverse().tolist()))
