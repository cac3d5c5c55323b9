"""Random views of uint8 images as batched tensor operations on any device, from draws that were made on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ktray.ops.random_draws import Draws, constant
from ktray.spec import Augment, ChannelStatistics, Normalization

IDENTITY, REVISION = "augmentation", 1

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


def draw_views(count: int, augment: Augment, generator: torch.Generator) -> dict[str, Tensor]:
    """What `random_views` needs for `count` images: first the corners of crops, then which images are mirrored, if enabled."""
    draws = {}
    if augment.crop:
        draws["corner"] = draw_corners(count, augment.crop, generator)
    if augment.flip:
        draws["mirrored"] = draw_mirrored(count, generator)
    return draws


def random_views(images: Tensor, augment: Augment, draws: Draws) -> Tensor:
    """One random view of each image: cropped, then flipped, each if `augment` enables it.

    Args:
        images: (B, H, W, 3) uint8.
        draws: of `draw_views`, on the device of `images`.

    Returns:
        (B, H, W, 3) uint8.
    """
    cropped = crop_at(images, augment.crop, draws["corner"]) if augment.crop else images
    return mirror(cropped, draws["mirrored"]) if augment.flip else cropped


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
