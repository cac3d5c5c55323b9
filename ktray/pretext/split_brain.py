"""Split-brain: the colours of an image told from its lightness, and the lightness from the colours.

Each image gives two inputs: its lightness alone, and its colours at one lightness in the middle, as far as sRGB has them. Of
each, a grid of cells is predicted by classification: the nearest of the quantised ab colours (261 at 10; the authors' list has
313), and one of the levels of lightness.

Different from the source: there the network is cut into halves that share nothing, one for each half of the channels. Here one
backbone learns both, on images of three channels, so that every backbone can be a teacher and reads both halves of one image.
A small decoder makes the cells from the backbone's features, a vector.

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
from ktray.spec import Augment
from ktray.strict import StrictSpec
from ktray.training.task import Task

REVISION = 1
TOOLS = (augmentation, colour, gamut)

NEEDS = ("colours",)
_MIDDLE = 50.0  # of lightness in [0, 100]


class Spec(StrictSpec):
    """`grid` x `grid` cells, each with a colour and a lightness."""

    kind: Literal["split_brain"] = "split_brain"
    grid: int = Field(default=8, ge=1, le=64, description="cells along each side")
    bin: int = Field(default=10, ge=5, le=40, description="side of a class in the ab plane")
    levels: int = Field(default=100, ge=2, le=256, description="classes of lightness")
    hidden: int = Field(default=64, ge=8, le=1024, description="channels of the decoders")
    augment: Augment = Augment(crop=2, flip=True)


class Head(nn.Module):
    """(2B, D) features, lightness and colours in turns -> (B, Q + levels, cells) logits of colours, then of lightness."""

    def __init__(self, width: int, hidden: int, grid: int, colours: int, levels: int) -> None:
        super().__init__()
        self.colours = _decoder(width, hidden, grid, colours)
        self.lightness = _decoder(width, hidden, grid, levels)

    def forward(self, features: Tensor) -> Tensor:
        """What each half says of the other."""
        return torch.cat([self.colours(features[0::2]), self.lightness(features[1::2])], dim=1)


def task(spec: Spec, size: int, images: Images) -> Task:
    """Metrics "colour" and "lightness": how often the likeliest class of a cell is the right one; "top1": their mean.

    Args:
        size: side of the images in pixels; any.
    """
    colours = gamut.gamut(spec.bin)

    def batch(pixels: Tensor, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seen = colour.lab(augmentation.views(pixels, spec.augment, generator)).permute(0, 3, 1, 2)
        means = gamut.cells(seen, spec.grid)
        level = (means[..., 0] / 100 * spec.levels).long().clamp(0, spec.levels - 1)
        targets = torch.stack([gamut.nearest(means[..., 1:], colours.to(pixels.device)), level], dim=1)
        return halves(seen), targets

    def loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        of_colour, of_lightness = logits.split([len(colours), spec.levels], dim=1)
        hits = [(each.detach().max(1).indices == targets[:, place]).float().mean()
                for place, each in enumerate((of_colour, of_lightness))]  # fmt: skip
        total = nn.functional.cross_entropy(of_colour, targets[:, 0]) + nn.functional.cross_entropy(of_lightness, targets[:, 1])
        return total, {"top1": (hits[0] + hits[1]) / 2, "colour": hits[0], "lightness": hits[1]}

    return Task(
        head=lambda width: Head(width, spec.hidden, spec.grid, len(colours), spec.levels),
        batch=batch,
        loss=loss,
        mean_over_images=True,
    )


def halves(lab: Tensor) -> Tensor:
    """The lightness of each image in all three channels, then its colours as an image of one lightness.

    Args:
        lab: (B, 3, H, W) float32 as from `colour.lab`.

    Returns:
        (2B, 3, H, W) float32 in the range of `augment.to_float`.
    """
    lightness = (lab[:, :1] / 25 - 2).expand(-1, 3, -1, -1)
    flat = torch.cat([torch.full_like(lab[:, :1], _MIDDLE), lab[:, 1:]], dim=1)
    return torch.stack([lightness, 4 * colour.rgb(flat) - 2], dim=1).flatten(0, 1)


def _decoder(width: int, hidden: int, grid: int, classes: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden * grid**2),
        nn.Unflatten(1, (hidden, grid**2)),
        nn.BatchNorm1d(hidden),
        nn.ReLU(inplace=True),
        nn.Conv1d(hidden, classes, 1),
    )
