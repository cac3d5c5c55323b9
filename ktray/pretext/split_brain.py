"""Split-brain autoencoder: predict the colours of an image from its lightness, and its lightness from its colours.

Each image yields two inputs: its lightness alone, and its colours at one medium lightness, clipped to sRGB. For each input a
grid of cells is classified: into quantised ab colours (261 classes for `bin: 10`; the authors' list has 313), or into levels of
lightness.

Differences from the source: it splits the network into two halves without shared weights, one per half of the channels. Here
one backbone learns both directions on three-channel images, so that any backbone can be trained. A small decoder predicts the
cells from the backbone's feature vector.

Source: Zhang, Isola, Efros, CVPR 2017, arXiv:1611.09842, section 3; quantised ab from Zhang, Isola, Efros, ECCV 2016,
arXiv:1603.08511, section 2.1.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.images import Images
from ktray.ops import augmentation, colour, gamut
from ktray.ops.random_draws import Draws, copies
from ktray.spec import Augment, UnmixedAugment
from ktray.strict import StrictSpec
from ktray.training.task import Task

REVISION = 1
TOOLS = (augmentation, colour, gamut)

NEEDS = ("colours",)
_MIDDLE = 50.0  # of lightness in [0, 100]


class Spec(StrictSpec):
    """A colour and a lightness for each of `grid` x `grid` cells."""

    kind: Literal["split_brain"] = "split_brain"
    grid: int = Field(default=8, ge=1, le=64, description="cells per side")
    bin: int = Field(default=10, ge=5, le=40, description="side of a colour class in the ab plane")
    levels: int = Field(default=100, ge=2, le=256, description="classes of lightness")
    hidden: int = Field(default=64, ge=8, le=1024, description="channels of the decoders")
    augment: UnmixedAugment = Augment(crop=2, flip=True)


class _Head(nn.Module):
    """Two decoders: (2B, D) features, lightness and colours alternating -> (B, Q + levels, cells) logits."""

    def __init__(self, width: int, hidden: int, grid: int, colours: int, levels: int) -> None:
        super().__init__()
        self.colours = _decoder(width, hidden, grid, colours)
        self.lightness = _decoder(width, hidden, grid, levels)

    def forward(self, features: Tensor) -> Tensor:
        """The logits of the colours (from the lightness), then of the lightness (from the colours)."""
        return torch.cat([self.colours(features[0::2]), self.lightness(features[1::2])], dim=1)


def task(spec: Spec, size: int, images: Images) -> Task:
    """Two classifications per cell. Metrics "colour" and "lightness": the accuracy of each; "top1": their mean.

    Args:
        size: side of the images in pixels; any.
    """
    colours = gamut.gamut_bins(spec.bin)
    colours_on = copies(colours)

    def batch(pixels: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen = colour.rgb_to_lab(augmentation.random_views(pixels, spec.augment, draws)).permute(0, 3, 1, 2)
        means = gamut.cell_means(seen, spec.grid)
        level = (means[..., 0] / 100 * spec.levels).long().clamp(0, spec.levels - 1)
        targets = torch.stack([gamut.nearest_bin(means[..., 1:], colours_on(pixels.device)), level], dim=1)
        return split_inputs(seen), targets

    def loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        colour_logits, lightness_logits = logits.split([len(colours), spec.levels], dim=1)
        colour_top1 = (colour_logits.detach().max(1).indices == targets[:, 0]).float().mean()
        lightness_top1 = (lightness_logits.detach().max(1).indices == targets[:, 1]).float().mean()
        total = nn.functional.cross_entropy(colour_logits, targets[:, 0]) + nn.functional.cross_entropy(
            lightness_logits, targets[:, 1]
        )
        return total, {"top1": (colour_top1 + lightness_top1) / 2, "colour": colour_top1, "lightness": lightness_top1}

    return Task(
        head=lambda width: _Head(width, spec.hidden, spec.grid, len(colours), spec.levels),
        draw=lambda indices, generator: augmentation.draw_views(len(indices), spec.augment, generator),
        batch=batch,
        loss=loss,
        mean_over_images=True,
        capturable=True,
    )


def split_inputs(lab: Tensor) -> Tensor:
    """Two inputs per image: its lightness in all three channels, then its colours at one medium lightness.

    Args:
        lab: (B, 3, H, W) float32 as from `colour.rgb_to_lab`.

    Returns:
        (2B, 3, H, W) float32 in the range of `augmentation.to_float`.
    """
    lightness = (lab[:, :1] / 25 - 2).expand(-1, 3, -1, -1)
    flat = torch.cat([torch.full_like(lab[:, :1], _MIDDLE), lab[:, 1:]], dim=1)
    return torch.stack([lightness, 4 * colour.lab_to_rgb(flat) - 2], dim=1).flatten(0, 1)


def _decoder(width: int, hidden: int, grid: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden * grid**2),
        nn.Unflatten(1, (hidden, grid**2)),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv1d(hidden, classes, 1),
    )
