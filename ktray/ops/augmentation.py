"""Random views of uint8 images as batched tensor operations: on any device, with draws from a CPU generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ktray.spec import Augment, Normalization

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


def normalize(images: Tensor, by: Normalization) -> Tensor:
    """Images normalised as pretrained networks expect them: ``(x / 255 - mean) / std`` per channel; "ktray" is `to_float`.

    Args:
        images: (B, H, W, 3) uint8.
        by: "imagenet" for torchvision's weights and most of timm's, "half" (mean and std 0.5) for many transformers.

    Returns:
        (B, 3, H, W) float32.

    Source: torchvision.transforms._presets.ImageClassification; timm.data.constants.
    """
    if by == "ktray":
        return to_float(images)
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in _MEAN_AND_STD[by])
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255).sub_(mean).div_(std)


def random_crop(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Each image padded with black on all sides, then cropped to its original size at a random position.

    Args:
        images: (B, H, W, 3) uint8.
        pixels: width of the padding, and so the largest shift in either direction; 0 makes no draw.
        generator: on the CPU.

    Returns:
        (B, H, W, 3) uint8 on the device of `images`.
    """
    if pixels == 0:
        return images
    count, height, width, _ = images.shape
    corner = torch.randint(2 * pixels + 1, (2, count, 1), generator=generator).to(images.device)
    rows = corner[0] + torch.arange(height, device=images.device)
    columns = corner[1] + torch.arange(width, device=images.device)
    padded = nn.functional.pad(images, (0, 0, pixels, pixels, pixels, pixels))
    which = torch.arange(count, device=images.device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]]


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right with probability 0.5.

    Args:
        images: (B, H, W, 3) uint8.
        generator: on the CPU.
    """
    mirrored = torch.rand(len(images), generator=generator).to(images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(2), images)


def random_views(images: Tensor, augment: Augment, generator: torch.Generator) -> Tensor:
    """One random view of each image: cropped, then flipped, each if `augment` enables it.

    Args:
        images: (B, H, W, 3) uint8.
        generator: on the CPU.

    Returns:
        (B, H, W, 3) uint8.
    """
    cropped = random_crop(images, augment.crop, generator)
    return random_flip(cropped, generator) if augment.flip else cropped
