"""Strongly distorted views of images for tasks that compare two views: crop, flip, colour jitter, grey, blur, solarisation.

Source: Chen et al. (SimCLR), ICML 2020, arXiv:2002.05709, appendix A and B.9; solarisation from Grill et al. (BYOL),
NeurIPS 2020, arXiv:2006.07733, appendix B.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ktray.ops import augmentation, colour
from ktray.ops.colour import Jitter
from ktray.ops.random_draws import Draws
from ktray.strict import StrictSpec

IDENTITY, REVISION = "distortions", 1
TOOLS = (augmentation, colour)


class Distortions(StrictSpec):
    """Applied in this order; the defaults are SimCLR's for CIFAR-10, but crops keep at least 0.2 of the area, not 0.08."""

    area: float = Field(default=0.2, gt=0, le=1, description="smallest share of the image's area that a crop keeps")
    most: float = Field(default=1.0, gt=0, le=1, description="largest share that a crop keeps")
    flip: bool = True
    jitter: Jitter = Jitter()
    grey: float = Field(default=0.2, ge=0, le=1, description="probability of a grey image")
    blur: float = Field(default=0.0, ge=0, le=1, description="probability of a Gaussian blur of 0.1 to 2 px; 0.5 at 224 px")
    solarise: float = Field(default=0.0, ge=0, le=1, description="probability that values above one half are inverted")

    @model_validator(mode="after")
    def _check_area_range(self) -> Distortions:
        if self.area > self.most:
            raise ValueError(f"area={self.area} is larger than most={self.most}: no crop can satisfy both")
        return self


def draw_view(count: int, distortions: Distortions, generator: torch.Generator) -> dict[str, Any]:
    """What `random_view` needs for `count` images, drawn in the order of the fields of `distortions`."""
    draws: dict[str, Any] = {}
    if distortions.flip:
        draws["mirrored"] = augmentation.draw_mirrored(count, generator)
    draws["crop"] = draw_crop(count, distortions.area, generator, distortions.most)
    draws["jitter"] = colour.draw_jitter(count, distortions.jitter, generator)
    draws["grey"] = colour.draw_chosen(count, distortions.grey, generator)
    if distortions.blur:
        draws["sigma"] = _uniform(0.1, 2.0, count, generator)
        draws["blurred"] = colour.draw_chosen(count, distortions.blur, generator)
    if distortions.solarise:
        draws["solarised"] = colour.draw_chosen(count, distortions.solarise, generator)
    return draws


def random_view(images: Tensor, distortions: Distortions, draws: Draws) -> Tensor:
    """One random view of each image.

    Args:
        images: (B, H, W, 3) uint8.
        draws: of `draw_view`, on the device of `images`.

    Returns:
        (B, 3, H, W) float32 as from `augmentation.to_float`.
    """
    views = augmentation.mirror(images, draws["mirrored"]) if distortions.flip else images
    views = views.permute(0, 3, 1, 2).to(torch.float32) / 255
    views = resized_crop(views, draws["crop"])
    views = colour.random_jitter(views, distortions.jitter, draws["jitter"])
    views = colour.turn_grey(views, draws["grey"])
    if distortions.blur:
        views = torch.where(draws["blurred"][:, None, None, None], gaussian_blur(views, draws["sigma"]), views)
    if distortions.solarise:
        solarised = torch.where(views < 0.5, views, 1 - views)
        views = torch.where(draws["solarised"][:, None, None, None], solarised, views)
    return (4 * views - 2).contiguous(memory_format=torch.channels_last)


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


def _uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)
