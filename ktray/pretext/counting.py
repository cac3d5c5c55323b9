"""Counting: what is counted in the four quarters of an image must sum up to what is counted in the whole.

The image becomes an even square, at least 48 px large; its quarters and the whole at half the side are inputs of one size. So
that not everything is counted as nothing, the quarters' sum has to differ from the count of another image. How the whole is
made smaller is drawn per image (by area, bilinear or bicubic), or its blur would tell it from a quarter.

Different from the source: a small head with batch norm in the place of three fully connected layers, and no Lanczos filter.

Source: Noroozi, Pirsiavash, Favaro, ICCV 2017, arXiv:1708.06734, sections 3 and 4 (equation 5, margin 10, 1,000 counts).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.ops import augmentation, colour, patches
from ktray.spec import Augment
from ktray.strict import StrictSpec
from ktray.training.task import Task

REVISION = 1
TOOLS = (augmentation, colour, patches)

_PARTS = 5  # the whole, then its quarters row by row


class Spec(StrictSpec):
    """Five inputs per image: the whole and its quarters. Needs a low learning rate, such as 0.001 for SGD."""

    kind: Literal["counting"] = "counting"
    counts: int = Field(default=1000, ge=2, le=16384, description="how many things are counted")
    margin: float = Field(default=10.0, gt=0, description="squared distance from another image's counts that is far enough")
    grey: float = Field(default=0.5, ge=0, le=1, description="share of grey images; against lens colours")
    hidden: int = Field(default=128, ge=8, le=4096, description="width of the head")
    augment: Augment = Augment(crop=2, flip=True)


def task(spec: Spec, size: int) -> Task:
    """Metric "top1": how often the quarters' sum is nearer to the own whole than to another image's.

    Args:
        size: side of the images in pixels.
    """
    side = max(48, size - size % 2)

    def batch(images: Tensor, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        squares = patches.square(augmentation.views(images, spec.augment, generator), side).permute(0, 3, 1, 2)
        squares = colour.grey(squares, spec.grey, generator)
        quarters = squares.unfold(2, side // 2, side // 2).unfold(3, side // 2, side // 2)  # (B, 3, 2, 2, h, h)
        quarters = quarters.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        inputs = torch.cat([halved(squares, generator)[:, None], quarters], dim=1)
        return inputs.flatten(0, 1), torch.arange(len(images), device=images.device)

    def head(width: int) -> nn.Module:
        last = nn.Linear(spec.hidden, spec.counts)
        # counts as small as the margin asks: larger ones are pushed below zero within a few steps, and never come back
        nn.init.normal_(last.weight, std=math.sqrt(spec.margin / (spec.counts * spec.hidden)))
        nn.init.zeros_(last.bias)
        return nn.Sequential(
            nn.Linear(width, spec.hidden),
            nn.BatchNorm1d(spec.hidden),
            nn.ReLU(inplace=True),
            last,
            nn.ReLU(),
            nn.Unflatten(0, (-1, _PARTS)),
        )

    return Task(head=head, batch=batch, loss=lambda counts, targets: contrast(counts, spec.margin))


def halved(squares: Tensor, generator: torch.Generator) -> Tensor:
    """Each image at half its side by a method of its own: (B, 3, S, S) float32 -> (B, 3, S // 2, S // 2)."""
    ways = torch.stack(
        [
            nn.functional.avg_pool2d(squares, 2),
            *(
                nn.functional.interpolate(squares, scale_factor=0.5, mode=mode, antialias=True)
                for mode in ("bilinear", "bicubic")
            ),
        ]
    )
    way = torch.randint(len(ways), (len(squares),), generator=generator).to(squares.device)
    return ways[way, torch.arange(len(squares), device=squares.device)]


def contrast(counts: Tensor, margin: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared distance of the quarters' sum from the whole, and what it lacks of `margin` from the whole of the image before.

    Args:
        counts: (B, 5, C) float >= 0, the whole first. The batch is shuffled, so the image before is a random one.

    Source: Noroozi, Pirsiavash, Favaro, equation 5.
    """
    whole, parts = counts[:, 0], counts[:, 1:].sum(dim=1)
    own = (whole - parts).square().sum(dim=1)
    other = (whole.roll(1, dims=0) - parts).square().sum(dim=1)
    return (own + (margin - other).clamp_min(0)).mean(), {"top1": (own < other).float().mean()}
