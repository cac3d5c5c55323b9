"""Context prediction: predict the position of one patch relative to another, out of eight.

Geometry of the released code: a 3x3 grid of patches of 96 px with gaps of 48 px, each patch jittered by up to 7 px. Here all
sizes are scaled so that the grid fits the image; images below 48 px are first enlarged to 48 px (28 px and 32 px: patches of
12 px, gaps of 5 px, jitter of 1 px). A smaller `gap` leaves room to place the grid at random.

Against chromatic aberration, a patch keeps one colour channel and gets noise in the two others (drop), or loses its
green-magenta axis (project). Each patch is then normalised to mean 0 and standard deviation 1, as in the released code.
Differences from the released code: no pixelated patches, which would be smaller than 10 px here, and a small head.

Source: Doersch, Gupta, Efros, ICCV 2015, arXiv:1505.05192, section 3.1; cdoersch/deepcontext, train.py. Teachers of Noroozi et
al., CVPR 2018: Context-ColorDrop and Context-ColorProjection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.ops import colour, patches
from ktray.ops.colour import PROJECTION
from ktray.ops.random_draws import Draws, constant
from ktray.strict import StrictSpec
from ktray.training import classification
from ktray.training.classification import cross_entropy
from ktray.training.task import Task

REVISION = 1
TOOLS = (classification, colour, patches)

_CENTRE = 4  # of the positions 0 to 8, row by row
_NEIGHBOURS = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])  # class -> position


class Spec(StrictSpec):
    """`pairs`: "all" eight pairs of each image (nine patches), or "one" at random (two patches)."""

    kind: Literal["context"] = "context"
    colours: Literal["drop", "project", "keep"] = "drop"
    pairs: Literal["all", "one"] = "all"
    gap: int = Field(
        default=48,
        ge=0,
        le=48,
        description="between patches of 96 px, scaled with them; against edges that continue across patches",
    )
    jitter: int = Field(default=7, ge=0, le=7, description="largest shift of a patch of 96 px, scaled likewise")
    hidden: int = Field(default=128, ge=8, le=4096, description="width of the head per patch")


@dataclass(frozen=True)
class _Geometry:
    """Sizes in pixels: the square that holds the grid, the patches, the gaps between them, the largest shift of a patch."""

    side: int
    patch: int
    gap: int
    jitter: int


def geometry(size: int, gap: int, jitter: int) -> _Geometry:
    """The released geometry scaled to images of side `size`; `gap` and `jitter` as in Spec."""
    side = max(48, size)
    scale = side / (3 * 96 + 2 * 48 + 2 * 7)
    patch, shift = 2 * round(48 * scale), round(jitter * scale)
    return _Geometry(side, patch, min(round(gap * scale), (side - 3 * patch - 2 * shift) // 2), shift)


def task(spec: Spec, size: int) -> Task:
    """Classification of positions: a shared layer reads each patch, then an MLP reads the centre next to a neighbour.

    Args:
        size: side of the images in pixels.
    """
    sizes = geometry(size, spec.gap, spec.jitter)

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        count = len(indices)
        targets = torch.arange(8).expand(count, 8)
        if spec.pairs == "one":
            targets = torch.randint(8, (count, 1), generator=generator)
        positions = torch.cat([torch.full((count, 1), _CENTRE), _NEIGHBOURS[targets]], dim=1)
        draws: dict[str, Any] = {"targets": targets, "corner": corners(positions, sizes, generator)}
        if spec.colours == "drop":
            draws["dropped"] = draw_dropped(positions.numel(), sizes.patch, generator)
        return draws

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        squares = patches.resize_square(images, sizes.side)
        cut = patches.extract_patches(squares, draws["corner"], sizes.patch).flatten(0, 1)
        if spec.colours == "drop":
            cut = drop_channels(cut, draws["dropped"])
        elif spec.colours == "project":
            cut = torch.einsum("nchw,dc->ndhw", cut, constant(PROJECTION, cut.device))
        return patches.standardise(cut), draws["targets"]

    return Task(
        head=lambda width: _Head(width, spec.hidden, 9 if spec.pairs == "all" else 2),
        draw=draw,
        batch=batch,
        loss=cross_entropy,
        mean_over_images=True,
        capturable=True,
    )


def corners(positions: Tensor, sizes: _Geometry, generator: torch.Generator) -> Tensor:
    """The top-left corner of every patch, as (row, column).

    Args:
        positions: (B, T) int64 in [0, 9), row by row.

    Returns:
        (2, B, T, 1) int64; every patch lies inside the square.
    """
    free = sizes.side - 3 * sizes.patch - 2 * sizes.gap - 2 * sizes.jitter
    first = sizes.jitter + torch.randint(free + 1, (2, len(positions), 1), generator=generator)
    shift = torch.randint(-sizes.jitter, sizes.jitter + 1, (2, *positions.shape), generator=generator)
    corner = first + (sizes.patch + sizes.gap) * torch.stack([positions // 3, positions % 3]) + shift
    return corner[..., None]


def draw_dropped(count: int, side: int, generator: torch.Generator) -> dict[str, Tensor]:
    """What `drop_channels` needs: the channel that each patch keeps, and normal noise (count, 3, side, side) float32."""
    kept = torch.randint(3, (count, 1, 1, 1), generator=generator)
    return {"kept": kept, "noise": torch.randn(count, 3, side, side, generator=generator)}


def drop_channels(cut: Tensor, draws: Draws) -> Tensor:
    """Patches that keep one channel; the others hold noise with a hundredth of its standard deviation.

    Args:
        cut: (M, 3, h, w) float32.
        draws: of `draw_dropped`, on the device of `cut`.
    """
    kept, noise = draws["kept"], draws["noise"] / 100
    channel = cut.take_along_dim(kept, dim=1)
    spread, mean = torch.std_mean(channel, dim=(2, 3), keepdim=True, correction=0)
    own = torch.arange(3, device=cut.device)[:, None, None] == kept
    return torch.where(own, channel - mean, spread * noise)


class _Head(nn.Module):
    """(M, D) features, M = B * patches with the centre first, -> (B * (patches - 1), 8) logits."""

    def __init__(self, width: int, hidden: int, patches: int) -> None:
        super().__init__()
        self.patches = patches
        self.per_patch = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True))
        self.pair = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(inplace=True), nn.Linear(2 * hidden, 8))

    def forward(self, features: Tensor) -> Tensor:
        """(M, D) float32 -> (B * (patches - 1), 8) float32: the logits of each neighbour, image by image."""
        read = self.per_patch(features).unflatten(0, (-1, self.patches))
        centre = read[:, :1].expand(-1, self.patches - 1, -1)
        logits: Tensor = self.pair(torch.cat([centre, read[:, 1:]], dim=2))
        return logits.flatten(0, 1)
