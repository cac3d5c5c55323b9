"""Strongly distorted views of images for tasks that compare two views: crop, flip, colour jitter, grey, blur, solarisation.

Source: Chen et al. (SimCLR), ICML 2020, arXiv:2002.05709, appendix A and B.9; solarisation from Grill et al. (BYOL),
NeurIPS 2020, arXiv:2006.07733, appendix B.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ktray.ops import augmentation, colour
from ktray.ops.random_draws import Draws
from ktray.spec import Jitter
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
    draws["crop"] = augmentation.draw_crop(count, distortions.area, generator, distortions.most)
    draws["jitter"] = colour.draw_jitter(count, distortions.jitter, generator)
    draws["grey"] = colour.draw_chosen(count, distortions.grey, generator)
    if distortions.blur:
        draws["sigma"] = augmentation.draw_sigma(count, generator)
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
    views = augmentation.resized_crop(views, draws["crop"])
    views = colour.random_jitter(views, distortions.jitter, draws["jitter"])
    views = colour.turn_grey(views, draws["grey"])
    if distortions.blur:
        views = torch.where(draws["blurred"][:, None, None, None], augmentation.gaussian_blur(views, draws["sigma"]), views)
    if distortions.solarise:
        views = colour.solarise(views, draws["solarised"])
    return (4 * views - 2).contiguous(memory_format=torch.channels_last)
