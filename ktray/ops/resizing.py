"""Resizing of uint8 images on any device, antialiased, as torchvision does it."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktray.images import Images

IDENTITY, REVISION = "resizing", 1

Interpolation = Literal["bilinear", "bicubic"]


def resized(images: Tensor, size: int, interpolation: Interpolation = "bilinear") -> Tensor:
    """Square images of another size; those of the right size are returned as they are.

    Bicubic values are computed in float32, rounded and clipped; bilinear ones on a CPU in fixed-point numbers, so that those
    of a GPU may differ by one.

    Args:
        images: (B, H, H, 3) uint8.
        size: side in pixels.

    Returns:
        (B, size, size, 3) uint8.
    """
    if images.shape[1] == images.shape[2] == size:
        return images
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    mode, exact = InterpolationMode(interpolation), interpolation == "bicubic"
    # Of whole numbers a CPU would clip what bicubic interpolation overshoots after each of the two axes.
    pixels = images.permute(0, 3, 1, 2).to(torch.float32 if exact else torch.uint8)
    found: Tensor = functional.resize(pixels, [size, size], mode, antialias=True).permute(0, 2, 3, 1)
    return found.round().clamp(0, 255).to(torch.uint8) if exact else found


def at_size(images: Images, size: int | None, interpolation: Interpolation = "bilinear") -> Images:
    """The same squares resized to `size`; the images themselves where that is their size, or None.

    `read` resizes on the CPU. A caller with another device reads `Images.stored`, and resizes there.
    """
    if size is None or size == images.size:
        return images
    boxes = images.boxes
    if boxes is not None:
        scale = np.array([size / images.size] * 4 + [1], np.float32)
        boxes = tuple((each * scale).astype(np.float32) for each in boxes)

    def read(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        found = resized(torch.from_numpy(images.read(indices)), size, interpolation)
        return np.ascontiguousarray(found.numpy())

    return replace(images, size=size, read=read, boxes=boxes, stored=images.stored or images)
