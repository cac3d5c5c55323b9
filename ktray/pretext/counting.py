"""Counting: the feature counts of an image's four quarters must sum to those of the whole image.

The image is made square with an even side of at least 48 px. Its four quarters and the whole image at half the side are inputs
of the same size. A contrastive term rules out the trivial solution of all zeros: the sum over the quarters must differ from the
counts of another image. The filter that shrinks the whole image is drawn per image (area, bilinear or bicubic), so that its
blur does not give it away.

Differences from the source: a small head with batch norm instead of three fully connected layers, and no Lanczos filter.

Source: Noroozi, Pirsiavash, Favaro, ICCV 2017, arXiv:1708.06734, sections 3 and 4 (equation 5, margin 10, 1,000 counts).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.ops import augmentation, colour, patches
from ktray.ops.random_draws import Draws
from ktray.spec import Augment, UnmixedAugment
from ktray.strict import StrictSpec
from ktray.training.task import Task

REVISION = 1
TOOLS = (augmentation, colour, patches)

_PARTS = 5  # the whole, then its quarters row by row
_FILTERS = 3  # of `downsample`


class Spec(StrictSpec):
    """Five inputs per image: the whole and its quarters. Needs a low learning rate, such as 0.001 with SGD."""

    kind: Literal["counting"] = "counting"
    counts: int = Field(default=1000, ge=2, le=16384, description="length of the count vector")
    margin: float = Field(
        default=10.0, gt=0, description="squared distance from another image's counts beyond which that term is 0"
    )
    grey: float = Field(default=0.5, ge=0, le=1, description="share of grey images; against chromatic aberration")
    hidden: int = Field(default=128, ge=8, le=4096, description="width of the head")
    augment: UnmixedAugment = Augment(crop=2, flip=True)


def task(spec: Spec, size: int) -> Task:
    """Metric "top1": the share of images whose quarters sum to counts nearer to their own image than to another.

    Args:
        size: side of the images in pixels.
    """
    side = max(48, size - size % 2)

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        count = len(indices)
        return {
            "views": augmentation.draw_views(count, spec.augment, generator),
            "grey": colour.draw_chosen(count, spec.grey, generator),
            "filter": torch.randint(_FILTERS, (count,), generator=generator),
        }

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        squares = patches.resize_square(augmentation.random_views(images, spec.augment, draws["views"]), side).permute(
            0, 3, 1, 2
        )
        squares = colour.turn_grey(squares, draws["grey"])
        quarters = squares.unfold(2, side // 2, side // 2).unfold(3, side // 2, side // 2)  # (B, 3, 2, 2, h, h)
        quarters = quarters.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        inputs = torch.cat([downsample(squares, draws["filter"])[:, None], quarters], dim=1)
        return inputs.flatten(0, 1), torch.arange(len(images), device=images.device)

    def head(width: int) -> nn.Module:
        last = nn.Linear(spec.hidden, spec.counts)
        # Counts start on the scale of the margin. Larger ones would be pushed below zero within a few steps, where ReLU has no
        # gradient to bring them back.
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

    return Task(
        head=head,
        draw=draw,
        batch=batch,
        loss=lambda counts, targets: contrast(counts, spec.margin),
        capturable=True,
    )


def downsample(squares: Tensor, choice: Tensor) -> Tensor:
    """Images at half the side: (B, 3, S, S) float32 and a filter for each, (B,) int64 -> (B, 3, S // 2, S // 2)."""
    resized = torch.stack(
        [
            nn.functional.avg_pool2d(squares, 2),
            *(
                nn.functional.interpolate(squares, scale_factor=0.5, mode=mode, antialias=True)
                for mode in ("bilinear", "bicubic")
            ),
        ]
    )
    return resized[choice, torch.arange(len(squares), device=squares.device)]


def contrast(counts: Tensor, margin: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Squared distance of the quarters' sum to the whole, plus a hinge on its distance to another image; and {"top1"}.

    The other image is the previous one in the batch, which is a random one because batches are shuffled.

    Args:
        counts: (B, 5, C) float >= 0, the whole image first.

    Source: Noroozi, Pirsiavash, Favaro, equation 5.
    """
    whole, parts = counts[:, 0], counts[:, 1:].sum(dim=1)
    own = (whole - parts).square().sum(dim=1)
    other = (whole.roll(1, dims=0) - parts).square().sum(dim=1)
    return (own + (margin - other).clamp_min(0)).mean(), {"top1": (own < other).float().mean()}
