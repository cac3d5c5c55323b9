"""Jigsaw++: which of 701 permutations shuffled the nine tiles of an image, of which up to two are another image's.

Geometry of the released code: cells of 85 px, tiles of 64 px, each at an offset of 0 to 18 px in its cell, each colour
channel 0 to 2 px further. Here the image becomes a square of three cells by three: a centre crop to the largest multiple
of 3, or, below 48 px, the image enlarged to 48 px (28 px and 32 px: cells of 16, tiles of 12). In a cell of c px the tile
has 2 * round(32 c / 85) px, the channels move by up to ceil(2 c / 85) px, and the tile by up to round(`gap` c / 85) px, as
far as the cell has room.

Different from the released code: the occluding tiles come from an image of the same batch, normalised tiles are not multiplied
by 50, and the head is small, without dropout.

Source: Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385; MehdiNoroozi/JigsawPuzzleSolver (geometry, colours,
occlusion in data_transformer.cpp and merge_data_layer.cpp); per-tile normalisation from Noroozi & Favaro, ECCV 2016.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.ops import colour, patches, permutations
from ktray.ops.permutations import TILES, far_apart
from ktray.strict import StrictSpec
from ktray.training import classification
from ktray.training.classification import cross_entropy
from ktray.training.task import Task

REVISION = 1
TOOLS = (classification, colour, patches, permutations)

DISTANCE = 3  # of two permutations, so that two occluded places leave one answer

_GREY = torch.tensor(colour.LUMA).expand(3, 3)  # rows: what the new red, green, blue take from the old
_COLOURS = torch.stack([_GREY, torch.tensor(colour.PROJECTION), torch.eye(3)])
_SHARES = {"paper": (0.7, 0.0, 0.3), "released": (0.5, 0.25, 0.25)}


class Spec(StrictSpec):
    """A puzzle of 3x3 tiles; `variant` says whose colours: the "paper" text's or the "released" code's."""

    kind: Literal["jigsaw_pp"] = "jigsaw_pp"
    variant: Literal["paper", "released"] = Field(
        default="paper", description="paper: 70 % grey; released: 50 % grey, 25 % projected colours, 25 % as they are"
    )
    permutations: int = Field(default=701, ge=2, le=5000, description="number of classes")
    occlusions: int = Field(
        default=2, ge=0, le=2, description="most tiles of another image; permutations differ at 3 places, so 2 leave one answer"
    )
    gap: int = Field(default=18, ge=0, le=18, description="largest offset of a tile in its cell, in pixels of a cell of 85")
    hidden: int = Field(default=128, ge=8, le=4096, description="width of the head per tile")


@dataclass(frozen=True)
class Geometry:
    """Sizes in pixels: the square of the puzzle, its cells, its tiles, their largest offset and that of a colour channel."""

    side: int
    cell: int
    tile: int
    gap: int
    channel: int


def geometry(size: int, gap: int) -> Geometry:
    """The released geometry, scaled to images of side `size`; `gap` as in Spec."""
    side = max(48, size - size % 3)
    cell = side // 3
    tile = 2 * round(32 * cell / 85)
    channel = math.ceil(2 * cell / 85)
    return Geometry(side, cell, tile, min(round(gap * cell / 85), cell - tile - channel), channel)


def task(spec: Spec, size: int) -> Task:
    """The head reads each tile's features by one shared layer, lays the nine side by side, and names the permutation.

    Args:
        size: side of the images in pixels.
    """
    sizes = geometry(size, spec.gap)
    permutations = torch.tensor(far_apart(spec.permutations, DISTANCE))
    shares = torch.tensor(_SHARES[spec.variant])

    def batch(images: Tensor, indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        targets = torch.randint(len(permutations), (len(images),), generator=generator)
        whose, cells = arrange(permutations[targets], spec.occlusions, generator)
        colours = _COLOURS[torch.multinomial(shares, len(images), replacement=True, generator=generator)]
        squares = coloured(patches.square(images, sizes.side), colours.to(images.device))
        return tiles(squares, whose, cells, sizes, generator), targets.to(images.device)

    def head(width: int) -> nn.Module:
        return nn.Sequential(
            nn.Linear(width, spec.hidden),
            nn.ReLU(inplace=True),
            nn.Unflatten(0, (-1, TILES)),
            nn.Flatten(1),
            nn.Linear(TILES * spec.hidden, 4 * spec.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(4 * spec.hidden, spec.permutations),
        )

    return Task(head=head, batch=batch, loss=cross_entropy, mean_over_images=True)


def quick(spec: Spec) -> Spec:
    """Two classes: the shapes before the last layer are the same."""
    return spec.model_copy(update={"permutations": 2})


def arrange(permutations: Tensor, occlusions: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which image and which of its cells stands at each place.

    0 to `occlusions` places (each number equally likely) show cells of one other image of the batch: distinct places, distinct
    cells, put there after permuting.

    Args:
        permutations: (B, 9) int64, the cell at each place.

    Returns:
        Images (B, 9) int64 in [0, B), and cells (B, 9) int64 in [0, 9).
    """
    count = len(permutations)
    own = torch.arange(count)
    other = (own + torch.randint(1, max(count, 2), (count,), generator=generator)) % count
    number = torch.randint(occlusions + 1, (count, 1), generator=generator)
    occluded = torch.rand(count, TILES, generator=generator).argsort(1) < number  # ranks: the first `number` of a random order
    foreign = torch.rand(count, TILES, generator=generator).argsort(1)
    whose = torch.where(occluded, other[:, None], own[:, None])
    return whose, torch.where(occluded, foreign, permutations)


def coloured(squares: Tensor, colours: Tensor) -> Tensor:
    """Each image's channels mixed by its own matrix: (B, S, S, 3) float32 and (B, 3, 3) -> (B, S, S, 3)."""
    flat = torch.bmm(squares.reshape(len(squares), -1, 3), colours.transpose(1, 2))
    return flat.view(squares.shape)


def tiles(squares: Tensor, whose: Tensor, cells: Tensor, sizes: Geometry, generator: torch.Generator) -> Tensor:
    """The tiles of all puzzles, cut with random offsets, each with a mean of 0 and a standard deviation of 1.

    Args:
        squares: (B, side, side, 3) float32.
        whose, cells: (B, 9) int64 on the CPU, as from `arrange`.

    Returns:
        (9B, 3, tile, tile) float32, the nine places of a puzzle one after the other, row by row.
    """
    count, device = len(squares), squares.device
    offset = torch.randint(sizes.gap + 1, (2, count, TILES, 1), generator=generator)
    offset = offset + torch.randint(sizes.channel + 1, (2, count, TILES, 3), generator=generator)
    corner = offset + sizes.cell * torch.stack([cells // 3, cells % 3])[..., None]
    rows, columns = corner.to(device)[:, :, :, None] + torch.arange(sizes.tile, device=device)[:, None]  # (B, 9, tile, 3) each
    channels = torch.arange(3, device=device)
    cut = squares[whose.to(device)[:, :, None, None, None], rows[:, :, :, None], columns[:, :, None], channels]
    return patches.normalised(cut.flatten(0, 1).permute(0, 3, 1, 2))
