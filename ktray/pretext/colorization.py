"""Colorization: predict the colours of an image from its lightness, as a classification of quantised ab values.

The ab plane of CIE Lab is divided into squares with sides of `bin`. Those that contain an sRGB colour are the classes (261 for
`bin: 10`; the authors' list of 313 reaches beyond the gamut). Targets are soft over the 5 nearest classes. Rare colours weigh
more; their frequencies are estimated from up to 1,024 training images.

Differences from the source: it predicts a colour at every position of a feature map. Here a small decoder predicts a grid of
colours from the backbone's feature vector, so that any backbone can be trained, and the loss is the mean over the cells instead
of the sum. Training images have three equal channels; the features for clustering are still extracted from colour images.

Source: Zhang, Isola, Efros, ECCV 2016, arXiv:1603.08511, sections 2.1 and 2.2.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
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
_SAMPLE = 1024  # images from which colour frequencies are estimated
_NEAREST = 5


class Spec(StrictSpec):
    """A distribution over quantised colours for each of `grid` x `grid` cells."""

    kind: Literal["colorization"] = "colorization"
    grid: int = Field(default=8, ge=1, le=64, description="cells per side; the source has 56 for 224 px")
    bin: int = Field(default=10, ge=5, le=40, description="side of a colour class in the ab plane")
    uniform: float = Field(
        default=0.5, gt=0, le=1, description="lambda of the class rebalancing; 1: all colours have the same weight"
    )
    hidden: int = Field(default=64, ge=8, le=1024, description="channels of the decoder")
    augment: UnmixedAugment = Augment(crop=2, flip=True)


def task(spec: Spec, size: int, images: Images) -> Task:
    """A small decoder and a rebalanced cross entropy. Metric "top1": the share of cells whose nearest colour is predicted.

    Args:
        size: side of the images in pixels; any.
        images: the training images, from which colour frequencies are estimated.

    Raises:
        ValueError: the images are grey.
    """
    colours = gamut.gamut_bins(spec.bin)
    colours_on = copies(colours)
    weights_on = copies(rebalancing(frequencies(images, spec.grid, spec.bin), spec.uniform))

    def batch(pixels: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        seen = colour.rgb_to_lab(augmentation.random_views(pixels, spec.augment, draws)).permute(0, 3, 1, 2)
        lightness = (seen[:, :1] / 100 - 0.5) / 0.25  # the range of `augmentation.to_float`
        return lightness.repeat(1, 3, 1, 1), soft_targets(
            gamut.cell_means(seen[:, 1:], spec.grid), colours_on(pixels.device), spec.bin / 2
        )

    def head(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, spec.hidden * spec.grid**2),
            nn.Unflatten(1, (spec.hidden, spec.grid**2)),
            nn.BatchNorm1d(spec.hidden),
            nn.ReLU(inplace=True),
            nn.Conv1d(spec.hidden, len(colours), 1),
        )

    def loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        likeliest = targets.max(1).indices
        per_cell = nn.functional.cross_entropy(logits, targets, reduction="none") * weights_on(logits.device)[likeliest]
        return per_cell.mean(), {"top1": (logits.detach().max(1).indices == likeliest).float().mean()}

    return Task(
        head=head,
        draw=lambda indices, generator: augmentation.draw_views(len(indices), spec.augment, generator),
        batch=batch,
        loss=loss,
        mean_over_images=True,
        capturable=True,
    )


def soft_targets(ab: Tensor, colours: Tensor, sigma: float) -> Tensor:
    """Soft targets: distributions over the 5 nearest colours, weighted by a Gaussian of the distance.

    Args:
        ab: (B, cells, 2) float32.
        colours: (Q, 2) float32.

    Returns:
        (B, Q, cells) float32 that sums to 1 over Q.
    """
    squared = (ab[:, :, None] - colours).square().sum(-1)
    near = squared.topk(min(_NEAREST, len(colours)), dim=2, largest=False)
    weights = torch.softmax(-near.values / (2 * sigma**2), dim=2)
    return torch.zeros_like(squared).scatter_(2, near.indices, weights).transpose(1, 2)


def frequencies(images: Images, grid: int, bin: int) -> Tensor:
    """Frequencies (Q,) float32 of the colours over cells, smoothed by a Gaussian of half a bin; they sum to 1.

    Raises:
        ValueError: all sampled images are grey.
    """
    colours = gamut.gamut_bins(bin)
    counts = torch.zeros(len(colours))
    chosen = np.unique(np.linspace(0, len(images) - 1, min(_SAMPLE, len(images))).astype(np.int64))
    grey = True
    for part in np.array_split(chosen, -(-len(chosen) // 128)):
        pixels = torch.from_numpy(images.read(part))
        grey = grey and bool((pixels.amax(-1) == pixels.amin(-1)).all())
        ab = gamut.cell_means(colour.rgb_to_lab(pixels).permute(0, 3, 1, 2)[:, 1:], grid).flatten(0, 1)
        counts += torch.bincount(gamut.nearest_bin(ab, colours), minlength=len(colours))
    if grey:
        raise ValueError("the pretext task 'colorization' needs colours, and the images of this data are grey")
    spread = (colours[:, None] - colours).square().sum(-1).div(-2 * (bin / 2) ** 2).exp()
    return (spread / spread.sum(0)) @ (counts / counts.sum())


def rebalancing(frequency: Tensor, uniform: float) -> Tensor:
    """Class weights (Q,): the inverse of the frequencies mixed with a share `uniform` of the uniform distribution.

    Normalised so that their mean over the data is 1.
    """
    weights = 1 / ((1 - uniform) * frequency + uniform / len(frequency))
    return weights / (frequency * weights).sum()
