"""RandAugment: operations drawn for each image from 14, all of one strength, as batched tensor operations on any device.

The operations, their strengths and their rounding are those of torchvision's `RandAugment` on uint8 images, with nearest-pixel
geometry and black beyond the borders. Only additions, products and sums of whole numbers are computed, one operation per
kernel, so CPUs and GPUs give the same pixels.

Source: Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation with a reduced search space", NeurIPS 2020,
arXiv:1909.13719; the strengths are those of torchvision 0.24.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from ktray.ops.random_draws import Draws, constant
from ktray.spec import RandAugment

IDENTITY, REVISION = "randaugment", 1

GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
BLENDED = ("brightness", "colour", "contrast", "sharpness")
OPERATIONS = ("identity", *GEOMETRIC, *BLENDED, "posterise", "solarise", "autocontrast", "equalise")
LARGEST = 30  # magnitude
_LUMA = (0.2989, 0.587, 0.114)  # torchvision's weights of red, green and blue in a grey value

Matrix = tuple[float, float, float, float, float, float]


def draw(count: int, spec: RandAugment, generator: torch.Generator) -> dict[str, Tensor]:
    """What `apply` needs for `count` images: `operation` (operations, count) int64, and `negative` likewise bool, the sign."""
    shape = (spec.operations, count)
    return {
        "operation": torch.randint(len(OPERATIONS), shape, generator=generator),
        "negative": torch.rand(shape, generator=generator) < 0.5,
    }


def apply(images: Tensor, spec: RandAugment, draws: Draws) -> Tensor:
    """Each image after its operations, one after the other.

    Args:
        images: (B, 3, H, W) uint8.
        draws: of `draw`, on the device of `images`.

    Returns:
        (B, 3, H, W) uint8.
    """
    for operation, negative in zip(draws["operation"], draws["negative"], strict=True):
        images = apply_one(images, spec.magnitude, operation, negative)
    return images


def apply_one(images: Tensor, magnitude: int, operation: Tensor, negative: Tensor) -> Tensor:
    """Each image after one operation.

    Args:
        images: (B, 3, H, W) uint8.
        magnitude: from 0 to 30.
        operation: (B,) int64, positions in `OPERATIONS`.
        negative: (B,) bool, whether the operations that have a direction go to the other one.
    """
    strength = magnitude / LARGEST
    changed = _moved(images, magnitude, operation, negative)
    sign = 1 - 2 * negative.float()
    changed = torch.where(_is(operation, *BLENDED), _blended(images, 1 + 0.9 * strength * sign, operation), changed)
    kept = 8 - round(4 * strength)  # bits; Python and torch both round halves to even
    changed = torch.where(_is(operation, "posterise"), images & (((1 << kept) - 1) << (8 - kept)), changed)
    changed = torch.where(
        _is(operation, "solarise"), torch.where(images >= 255 * (1 - strength), 255 - images, images), changed
    )
    changed = torch.where(_is(operation, "autocontrast"), autocontrast(images), changed)
    return torch.where(_is(operation, "equalise"), equalise(images), changed)


def _is(operation: Tensor, *names: str) -> Tensor:
    """(B, 1, 1, 1) bool: whether an image's operation is one of `names`, which follow each other in `OPERATIONS`."""
    first = OPERATIONS.index(names[0])
    return ((operation >= first) & (operation < first + len(names)))[:, None, None, None]


@lru_cache(maxsize=64)
def matrices(magnitude: int, height: int, width: int) -> tuple[Matrix, ...]:
    """For each operation, in the positive and then in the negative direction: where an output pixel comes from.

    A row (a, b, c, d, e, f) means that the pixel at (x, y) from the centre comes from (ax + by + c, dx + ey + f).
    """
    strength, found = magnitude / LARGEST, []
    for name in OPERATIONS:
        for sign in (1, -1):
            a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
            if name == "shear_x":  # about the upper left corner
                b = sign * 0.3 * strength
                c = b * height / 2
            elif name == "shear_y":
                d = sign * 0.3 * strength
                f = d * width / 2
            elif name == "translate_x":
                c = -float(int(sign * 150 / 331 * width * strength))
            elif name == "translate_y":
                f = -float(int(sign * 150 / 331 * height * strength))
            elif name == "rotate":  # counter-clockwise
                angle = math.radians(sign * 30 * strength)
                a, b, d, e = math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
            found.append((a, b, c, d, e, f))
    return tuple(found)


def _moved(images: Tensor, magnitude: int, operation: Tensor, negative: Tensor) -> Tensor:
    """The images after their geometric operations; those with another one as they are."""
    _, channels, height, width = images.shape
    table = constant(matrices(magnitude, height, width), images.device)
    a, b, c, d, e, f = table[2 * operation + negative][:, :, None, None].unbind(1)  # (B, 1, 1) each
    x = torch.arange(width, device=images.device) - (width - 1) / 2
    y = (torch.arange(height, device=images.device) - (height - 1) / 2)[:, None]
    column = (a * x + b * y + c + (width - 1) / 2).round().long()
    row = (d * x + e * y + f + (height - 1) / 2).round().long()
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    place = (row.clamp(0, height - 1) * width + column.clamp(0, width - 1)).flatten(1)
    taken = images.flatten(2).gather(2, place[:, None].expand(-1, channels, -1)).view(images.shape)
    return torch.where(inside[:, None], taken, 0)


def _blended(images: Tensor, factor: Tensor, operation: Tensor) -> Tensor:
    """The images moved away from a plain form of theirs by a factor (B,): black, grey, their mean grey, or a smooth one."""
    pixels = images.float()
    weights = constant(_LUMA, images.device).view(3, 1, 1)
    red, green, blue = (pixels * weights).unbind(1)
    grey = (red + green + blue).floor()[:, None]
    mean = grey.long().sum(dim=(2, 3), keepdim=True) / (images.shape[2] * images.shape[3])
    plain = torch.where(_is(operation, "colour"), grey, torch.zeros_like(pixels))
    plain = torch.where(_is(operation, "contrast"), mean.expand_as(pixels), plain)
    plain = torch.where(_is(operation, "sharpness"), smoothed(images), plain)
    factor = factor[:, None, None, None]
    return (pixels * factor + plain * (1 - factor)).clamp(0, 255).to(torch.uint8)


def smoothed(images: Tensor) -> Tensor:
    """The mean of the 3x3 pixels around each one, of which the middle one counts five times; border pixels as they are.

    (B, 3, H, W) uint8 -> float32 with whole numbers.
    """
    pixels = images.long()
    height, width = images.shape[2:]
    if min(height, width) < 3:
        return images.float()
    total = 4 * pixels[:, :, 1:-1, 1:-1]
    for row in range(3):
        for column in range(3):
            total = total + pixels[:, :, row : height - 2 + row, column : width - 2 + column]
    inner = (2 * total + 13) // 26  # rounded; thirteenths are never halves
    return torch.cat([pixels[:, :, :1], _between(pixels, inner), pixels[:, :, -1:]], dim=2).float()


def _between(pixels: Tensor, inner: Tensor) -> Tensor:
    middle = pixels[:, :, 1:-1]
    return torch.cat([middle[..., :1], inner, middle[..., -1:]], dim=3)


def autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched to [0, 255]; one of a single value stays as it is. (B, 3, H, W) uint8 -> uint8."""
    low, high = (bound.float() for bound in (images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)))
    flat = low == high
    scale = torch.where(flat, 1.0, (high - low) * (1 / 255))
    return ((images.float() - torch.where(flat, 0.0, low)) / scale).clamp(0, 255).to(torch.uint8)


def equalise(images: Tensor) -> Tensor:
    """Each channel with its histogram equalised, by Pillow's rule. (B, 3, H, W) uint8 -> uint8.

    Value v becomes (n_below + step // 2) // step, where n_below counts the pixels below v, and step is a 255th of the pixels
    that do not have the largest value. A channel whose step is 0 stays as it is.
    """
    values = images.flatten(2).long()  # (B, 3, P)
    counts = torch.zeros(*values.shape[:2], 256, dtype=torch.long, device=images.device)
    counts.scatter_add_(2, values, torch.ones_like(values))
    largest = counts.gather(2, values.amax(dim=2, keepdim=True))
    step = (values.shape[2] - largest) // 255  # (B, 3, 1)
    below = nn.functional.pad(counts.cumsum(dim=2)[:, :, :-1], (1, 0))
    table = ((below + step // 2) // step.clamp_min(1)).clamp_max(255)
    found = table.gather(2, values).to(torch.uint8).view(images.shape)
    return torch.where((step == 0)[..., None], images, found)
