"""Random views of uint8 images as batched tensor operations on any device, from draws that were made on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ktray.ops import colour, mixing, randaugment
from ktray.ops.random_draws import Draws, constant
from ktray.spec import Augment, ChannelStatistics, Normalization

IDENTITY, REVISION = "augmentation", 1
TOOLS_OF_SOME = (colour, mixing, randaugment)  # only in the keys of results that use them, see `tools_of`

_MEAN_AND_STD = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


def to_float(images: Tensor) -> Tensor:
    """The input format of ktray's networks: ``(x / 255 - 0.5) / 0.25``, in [-2, 2], the same for every data set.

    The result keeps the (B, H, W, 3) memory layout: PyTorch's channels-last, which is fast for convolutions.

    Args:
        images: (B, H, W, 3) uint8.

    Returns:
        (B, 3, H, W) float32.
    """
    return images.permute(0, 3, 1, 2).to(torch.float32).mul_(4 / 255).sub_(2)


def mean_and_std(by: Normalization | ChannelStatistics) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation by which the channels of images in [0, 1] are normalised."""
    if by == "ktray":
        return (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
    return _MEAN_AND_STD[by] if isinstance(by, str) else (tuple(by["mean"]), tuple(by["std"]))


def normalize(images: Tensor, by: Normalization | ChannelStatistics) -> Tensor:
    """Images normalised as pretrained networks expect them: ``(x / 255 - mean) / std`` per channel; "ktray" is `to_float`.

    Args:
        images: (B, H, W, 3) uint8.
        by: "imagenet" for torchvision's weights and most of timm's, "half" (mean and std 0.5) for many transformers, or mean
            and standard deviation themselves.

    Returns:
        (B, 3, H, W) float32.

    Source: torchvision.transforms._presets.ImageClassification; timm.data.constants.
    """
    if by == "ktray":
        return to_float(images)
    mean, std = (constant(values, images.device)[:, None, None] for values in mean_and_std(by))
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255).sub_(mean).div_(std)


def tools_of(augment: Augment) -> tuple[ModuleType, ...]:
    """The modules whose REVISION counts for results of `augment`, beside this one; none for crops and flips of old."""
    strong = augment.area is not None or augment.jitter is not None or augment.grey or augment.blur or augment.solarise
    return (
        *((colour,) if strong else ()),
        *((randaugment,) if augment.randaugment else ()),
        *((mixing,) if augment.mixes else ()),
    )


def draw_views(count: int, augment: Augment, generator: torch.Generator) -> dict[str, Any]:
    """What `random_views` needs for `count` images, in the order in which it is applied; nothing for what is disabled."""
    draws: dict[str, Any] = {}
    if augment.crop:
        draws["corner"] = draw_corners(count, augment.crop, generator)
    if augment.flip:
        draws["mirrored"] = draw_mirrored(count, generator)
    if augment.area is not None:
        draws["crop"] = draw_crop(count, augment.area, generator)
    if augment.randaugment:
        draws["randaugment"] = randaugment.draw(count, augment.randaugment, generator)
    if augment.jitter:
        draws["jitter"] = colour.draw_jitter(count, augment.jitter, generator)
    if augment.grey:
        draws["grey"] = colour.draw_chosen(count, augment.grey, generator)
    if augment.blur:
        draws["sigma"] = draw_sigma(count, generator)
        draws["blurred"] = colour.draw_chosen(count, augment.blur, generator)
    if augment.solarise:
        draws["solarised"] = colour.draw_chosen(count, augment.solarise, generator)
    return draws


def random_views(images: Tensor, augment: Augment, draws: Draws) -> Tensor:
    """One random view of each image, changed by what `augment` enables, in the order of its fields; images are not mixed.

    Args:
        images: (B, H, W, 3) uint8.
        draws: of `draw_views`, on the device of `images`.

    Returns:
        (B, H, W, 3) uint8; colours are rounded to whole numbers once before and once after the changes of RandAugment.
    """
    views = crop_at(images, augment.crop, draws["corner"]) if augment.crop else images
    if augment.flip:
        views = mirror(views, draws["mirrored"])
    if augment.area is not None:
        views = _in_unit_range(views, lambda floats: resized_crop(floats, draws["crop"]))
    if augment.randaugment:
        views = randaugment.apply(views.permute(0, 3, 1, 2), augment.randaugment, draws["randaugment"]).permute(0, 2, 3, 1)
    if augment.jitter or augment.grey or augment.blur or augment.solarise:
        views = _in_unit_range(views, lambda floats: _recoloured(floats, augment, draws))
    return views


def _recoloured(views: Tensor, augment: Augment, draws: Draws) -> Tensor:
    if augment.jitter:
        views = colour.random_jitter(views, augment.jitter, draws["jitter"])
    if augment.grey:
        views = colour.turn_grey(views, draws["grey"])
    if augment.blur:
        views = torch.where(draws["blurred"][:, None, None, None], gaussian_blur(views, draws["sigma"]), views)
    return colour.solarise(views, draws["solarised"]) if augment.solarise else views


def _in_unit_range(images: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """`change`, which maps (B, 3, H, W) float32 in [0, 1], applied to images (B, H, W, 3) uint8, and rounded to such."""
    changed = change(images.permute(0, 3, 1, 2).to(torch.float32) / 255)
    return (changed * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def draw_corners(count: int, pixels: int, generator: torch.Generator) -> Tensor:
    """The first row and column of each crop in an image padded by `pixels`: (2, count, 1) int64 in [0, 2 * pixels]."""
    return torch.randint(2 * pixels + 1, (2, count, 1), generator=generator)


def crop_at(images: Tensor, pixels: int, corner: Tensor) -> Tensor:
    """Each image padded with black on all sides, then cropped to its original size.

    Args:
        images: (B, H, W, 3) uint8.
        pixels: width of the padding, and so the largest shift in either direction.
        corner: of `draw_corners`, on the device of `images`.

    Returns:
        (B, H, W, 3) uint8.
    """
    count, height, width, _ = images.shape
    rows = corner[0] + torch.arange(height, device=images.device)
    columns = corner[1] + torch.arange(width, device=images.device)
    padded = nn.functional.pad(images, (0, 0, pixels, pixels, pixels, pixels))
    which = torch.arange(count, device=images.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]]


def draw_mirrored(count: int, generator: torch.Generator) -> Tensor:
    """Which images are mirrored, each with probability 0.5: (count,) bool."""
    return torch.rand(count, generator=generator) < 0.5


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Images (B, H, W, 3) flipped left to right where `mirrored` (B,) bool says so."""
    return torch.where(mirrored[:, None, None, None], images.flip(2), images)


def draw_crop(count: int, area: float, generator: torch.Generator, most: float = 1.0) -> Tensor:
    """Random crops as affine transforms (count, 2, 3) float32 of the square [-1, 1] x [-1, 1], for `resized_crop`.

    Args:
        area, most: smallest and largest share of the area. The ratio of width to height is in [3/4, 4/3], unless
            the image is too small for it.

    Source: Szegedy et al., CVPR 2015, section 6.
    """
    share = _uniform(area, most, count, generator)
    ratio = _uniform(-math.log(4 / 3), math.log(4 / 3), count, generator).exp()
    sides = torch.stack([(share * ratio).sqrt(), (share / ratio).sqrt()], dim=1).clamp_max(1)  # width, height
    centre = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - sides)
    return torch.cat([torch.diag_embed(sides), centre[:, :, None]], dim=2)


def resized_crop(images: Tensor, transforms: Tensor) -> Tensor:
    """A crop of each image, resized to the size of the image (bilinear).

    Args:
        images: (B, 3, H, W) float32.
        transforms: of `draw_crop`, on the device of `images`.
    """
    grid = nn.functional.affine_grid(transforms, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image blurred by a Gaussian of its own width; the window spans a tenth of the side, borders are reflected.

    Args:
        images: (B, 3, H, W) float32.
        sigma: (B,) float32 in pixels, on the device of `images`.
    """
    radius = max(1, round(images.shape[-1] / 20))
    offsets = torch.arange(-radius, radius + 1, device=images.device)
    window = torch.exp(-offsets.square() / (2 * sigma[:, None].square()))
    window = (window / window.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)[:, None, None, :]  # (3B, 1, 1, n)
    flat = nn.functional.pad(images, (radius, radius, radius, radius), mode="reflect").flatten(0, 1)[None]
    flat = nn.functional.conv2d(flat, window, groups=len(window))
    flat = nn.functional.conv2d(flat, window.transpose(2, 3), groups=len(window))
    return flat.view(images.shape)


def draw_sigma(count: int, generator: torch.Generator) -> Tensor:
    """Widths of Gaussian blurs in pixels, (count,) float32 in [0.1, 2]."""
    return _uniform(0.1, 2.0, count, generator)


def _uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)
