"""Jigsaw puzzles: predict which of P permutations shuffled the nine tiles of an image.

The permutations are chosen to be far apart in Hamming distance. Geometry of the paper: a square of 225 px, cells of 75 px, a
tile of 64 px at a random position in each cell, and each colour channel shifted by up to 2 px. Here the square is the image,
enlarged to 48 px if it is smaller (28 px and 32 px: cells of 16 px, tiles of 14 px), and all sizes scale with the cell. With
`gap: 0` a tile fills its cell. A shifted channel may show up to 2 px of the neighbouring cell, but nothing outside the square.

Each defence against shortcuts is a field. In the paper, VOC detection drops from 52.6 with all of them to 47.7 without the gap,
43.5 without the normalisation and 51.1 without the channel shift. Differences from the paper: permutations are drawn anew per
image and epoch instead of from 69 per image, and the head is small and has no dropout.

Source: Noroozi & Favaro, ECCV 2016, arXiv:1603.09246 (algorithm 1, section 4.2, tables 4 and 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ktray.errors import UserError
from ktray.ops import colour, patches, permutations
from ktray.ops.permutations import TILES, farthest_permutations
from ktray.ops.random_draws import Draws
from ktray.strict import StrictSpec
from ktray.training import classification
from ktray.training.classification import cross_entropy
from ktray.training.task import Task

REVISION = 1
TOOLS = (classification, colour, patches, permutations)


class Spec(StrictSpec):
    """A puzzle of 3x3 tiles: the number of permutations, and the defences against shortcuts."""

    kind: Literal["jigsaw"] = "jigsaw"
    permutations: int = Field(default=100, ge=2, le=5000, description="number of classes; the paper's best is 1000")
    distance: int = Field(default=2, ge=2, le=9, description="smallest Hamming distance between two permutations")
    gap: int = Field(
        default=11,
        ge=0,
        le=30,
        description="cell minus tile, in pixels of a cell of 75; against edges that continue across tiles",
    )
    shift: int = Field(
        default=2, ge=0, le=4, description="largest shift of a colour channel, likewise; against chromatic aberration"
    )
    grey: float = Field(default=0.3, ge=0, le=1, description="share of grey puzzles; against chromatic aberration")
    normalise: bool = Field(default=True, description="each tile to mean 0 and standard deviation 1; against shading")
    hidden: int = Field(default=128, ge=8, le=4096, description="width of the head's layer for each tile")


@dataclass(frozen=True)
class _Geometry:
    """Sizes in pixels: the square of the puzzle, its cells, its tiles, and the largest shift of a colour channel."""

    side: int
    cell: int
    tile: int
    shift: int


def geometry(size: int, gap: int, shift: int) -> _Geometry:
    """The paper's geometry scaled to images of side `size`; `gap` and `shift` as in Spec."""
    side = max(48, size - size % 3)
    cell = side // 3
    return _Geometry(side, cell, cell - round(gap * cell / 75), math.ceil(shift * cell / 75))


def task(spec: Spec, size: int) -> Task:
    """Classification of permutations: a shared layer reads each tile, then an MLP reads the nine results side by side.

    Args:
        size: side of the images in pixels.

    Raises:
        ValueError: there are fewer permutations at this distance.
    """
    sizes = geometry(size, spec.gap, spec.shift)
    permutations = torch.tensor(farthest_permutations(spec.permutations, spec.distance))

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        targets = torch.randint(len(permutations), (len(indices),), generator=generator)
        grey = colour.draw_chosen(len(indices), spec.grey, generator)
        return {"targets": targets, "grey": grey, "corner": corners(permutations[targets], sizes, generator)}

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        squares = patches.resize_square(images, sizes.side).permute(0, 3, 1, 2)
        squares = colour.turn_grey(squares, draws["grey"]).permute(0, 2, 3, 1)
        tiles = patches.extract_patches(squares, draws["corner"], sizes.tile).flatten(0, 1)
        return patches.standardise(tiles) if spec.normalise else tiles, draws["targets"]

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

    return Task(head=head, draw=draw, batch=batch, loss=cross_entropy, mean_over_images=True, capturable=True)


def check(spec: Spec) -> None:
    """Refuse a spec that asks for more permutations than exist at its distance.

    Raises:
        UserError: there are fewer permutations at this distance.
    """
    try:
        permutations.require_permutations(spec.permutations, spec.distance)
    except ValueError as error:
        raise UserError(str(error), "permutations", "Use fewer, or a smaller distance.") from error


def quick(spec: Spec) -> Spec:
    """The same task with two classes: a thousand permutations take seconds to choose, and only the last layer differs."""
    return spec.model_copy(update={"permutations": 2})


def corners(cells: Tensor, sizes: _Geometry, generator: torch.Generator) -> Tensor:
    """The top-left corner of every tile in every colour channel, as (row, column).

    Args:
        cells: (B, 9) int64, the cell shown at each of the nine positions.

    Returns:
        (2, B, 9, 3) int64; every tile lies inside the square.
    """
    offset = torch.randint(sizes.cell - sizes.tile + 1, (2, *cells.shape, 1), generator=generator)
    shift = torch.randint(-sizes.shift, sizes.shift + 1, (2, *cells.shape, 3), generator=generator)
    corner = sizes.cell * torch.stack([cells // 3, cells % 3])[..., None] + offset + shift
    return corner.clamp(0, sizes.side - sizes.tile)
