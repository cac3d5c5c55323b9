"""Strongly changed views of an image for tasks that compare two of them: crop, mirror, colours, blur.

Source: Chen et al. (SimCLR), ICML 2020, arXiv:2002.05709, appendix A and B.9; solarisation from Grill et al. (BYOL),
NeurIPS 2020, arXiv:2006.07733, appendix B.
"""

from __future__ import annotations

import math

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ktray.ops import augmentation, colour
from ktray.ops.colour import Jitter
from ktray.strict import StrictSpec

IDENTITY, REVISION = "distortions", 1
TOOLS = (augmentation, colour)


class Distortions(StrictSpec):
    """In this order; the defaults are SimCLR's for CIFAR-10, but for crops of at least 0.2 of the area instead of 0.08."""

    area: float = Field(default=0.2, gt=0, le=1, description="smallest share of the image's area that a crop keeps")
    most: float = Field(default=1.0, gt=0, le=1, description="largest share that a crop keeps")
    flip: bool = True
    jitter: Jitter = Jitter()
    grey: float = Field(default=0.2, ge=0, le=1, description="probability of a grey image")
    blur: float = Field(default=0.0, ge=0, le=1, description="probability of a Gaussian blur of 0.1 to 2 px; 0.5 at 224 px")
    solarise: float = Field(default=0.0, ge=0, le=1, description="probability that what is lighter than half is inverted")

    @model_validator(mode="after")
    def _shares_in_order(self) -> Distortions:
        if self.area > self.most:
            raise ValueError(f"a crop of at least area={self.area} cannot keep most={self.most} of the image")
        return self


def random_view(images: Tensor, distortions: Distortions, generator: torch.Generator) -> Tensor:
    """One view of each image, with draws of its own.

    Args:
        images: (B, H, W, 3) uint8.
        generator: on the CPU.

    Returns:
        (B, 3, H, W) float32 as from `augmentation.to_float`.
    """
    seen = augmentation.random_flip(images, generator) if distortions.flip else images
    seen = seen.permute(0, 3, 1, 2).to(torch.float32) / 255
    seen = random_resized_crop(seen, distortions.area, generator, distortions.most)
    seen = colour.random_jitter(seen, distortions.jitter, generator)
    seen = colour.random_grey(seen, distortions.grey, generator)
    if distortions.blur:
        seen = _sometimes(gaussian_blur(seen, _between(0.1, 2.0, len(seen), generator)), seen, distortions.blur, generator)
    if distortions.solarise:
        seen = _sometimes(torch.where(seen < 0.5, seen, 1 - seen), seen, distortions.solarise, generator)
    return (4 * seen - 2).contiguous(memory_format=torch.channels_last)


def random_resized_crop(images: Tensor, area: float, generator: torch.Generator, most: float = 1.0) -> Tensor:
    """A random part of each image, enlarged to the image's size (bilinear).

    Args:
        images: (B, 3, H, W) float32.
        area, most: smallest and largest share of the area. Width to height lies in [3/4, 4/3], as far as the image has room.
        generator: on the CPU.

    Source: Szegedy et al., CVPR 2015, section 6.
    """
    count = len(images)
    share = _between(area, most, count, generator)
    ratio = _between(-math.log(4 / 3), math.log(4 / 3), count, generator).exp()
    sides = torch.stack([(share * ratio).sqrt(), (share / ratio).sqrt()], dim=1).clamp_max(1)  # width, height
    centre = (2 * torch.rand(count, 2, generator=generator) - 1) * (1 - sides)
    where = torch.cat([torch.diag_embed(sides), centre[:, :, None]], dim=2).to(images.device)
    places = nn.functional.affine_grid(where, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, places, padding_mode="border", align_corners=False)


def gaussian_blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Each image smoothed by a Gaussian of its own width, with a window of a tenth of the side and mirrored borders.

    Args:
        images: (B, 3, H, W) float32.
        sigma: (B,) float32 in pixels.
    """
    reach = max(1, round(images.shape[-1] / 20))
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    window = torch.exp(-offsets.square() / (2 * sigma.to(images.device)[:, None].square()))
    window = (window / window.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)[:, None, None, :]  # (3B, 1, 1, n)
    flat = nn.functional.pad(images, (reach, reach, reach, reach), mode="reflect").flatten(0, 1)[None]
    flat = nn.functional.conv2d(flat, window, groups=len(window))
    flat = nn.functional.conv2d(flat, window.transpose(2, 3), groups=len(window))
    return flat.view(images.shape)


def _between(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(count, generator=generator)


def _sometimes(changed: Tensor, images: Tensor, share: float, generator: torch.Generator) -> Tensor:
    chosen = torch.rand(len(images), generator=generator).to(images.device) < share
    return torch.where(chosen[:, None, None, None], changed, images)
