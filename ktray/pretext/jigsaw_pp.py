"""Jigsaw++: predict which of 701 permutations shuffled the nine tiles of an image, up to two of them from another image.

Geometry of the released code: cells of 85 px, tiles of 64 px, each at an offset of 0 to 18 px in its cell, and each colour
channel shifted by another 0 to 2 px. Here the image becomes a square of 3x3 cells: the centre crop to the largest multiple of
3, or, below 48 px, the image enlarged to 48 px (28 px and 32 px: cells of 16 px, tiles of 12 px). In a cell of c px the tile
has 2 * round(32 c / 85) px, its offset is at most round(`gap` c / 85) px and the shift of a channel at most ceil(2 c / 85) px,
as far as they fit into the cell.

Differences from the released code: the occluding tiles come from an image of the same batch, normalised tiles are not
multiplied by 50, and the head is small and has no dropout.

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
from ktray.ops.permutations import TILES, hashed_permutations
from ktray.ops.random_draws import Draws
from ktray.strict import StrictSpec
from ktray.training import classification
from ktray.training.classification import cross_entropy
from ktray.training.task import Task

REVISION = 1
TOOLS = (classification, colour, patches, permutations)

DISTANCE = 3  # between permutations, so that the answer is still unique with two occluded positions

_GREY = torch.tensor(colour.LUMA).expand(3, 3)  # row: weights of the old red, green and blue in a new channel
_COLOURS = torch.stack([_GREY, torch.tensor(colour.PROJECTION), torch.eye(3)])
_SHARES = {"paper": (0.7, 0.0, 0.3), "released": (0.5, 0.25, 0.25)}


class Spec(StrictSpec):
    """A puzzle of 3x3 tiles; `variant` selects the colours of the "paper" text or of the "released" code."""

    kind: Literal["jigsaw_pp"] = "jigsaw_pp"
    variant: Literal["paper", "released"] = Field(
        default="paper", description="paper: 70 % grey; released: 50 % grey, 25 % projected colours, 25 % unchanged"
    )
    permutations: int = Field(default=701, ge=2, le=5000, description="number of classes")
    occlusions: int = Field(
        default=2,
        ge=0,
        le=2,
        description="most tiles from another image; permutations differ in 3 positions, so the answer stays unique",
    )
    gap: int = Field(default=18, ge=0, le=18, description="largest offset of a tile in its cell, in pixels of a cell of 85")
    hidden: int = Field(default=128, ge=8, le=4096, description="width of the head's layer for each tile")


@dataclass(frozen=True)
class _Geometry:
    """Sizes in pixels: the square, its cells and tiles, the largest offset of a tile and the largest shift of a channel."""

    side: int
    cell: int
    tile: int
    gap: int
    channel: int


def geometry(size: int, gap: int) -> _Geometry:
    """The released geometry scaled to images of side `size`; `gap` as in Spec."""
    side = max(48, size - size % 3)
    cell = side // 3
    tile = 2 * round(32 * cell / 85)
    channel = math.ceil(2 * cell / 85)
    return _Geometry(side, cell, tile, min(round(gap * cell / 85), cell - tile - channel), channel)


def task(spec: Spec, size: int) -> Task:
    """Classification of permutations: a shared layer reads each tile, then an MLP reads the nine results side by side.

    Args:
        size: side of the images in pixels.
    """
    sizes = geometry(size, spec.gap)
    permutations = torch.tensor(hashed_permutations(spec.permutations, DISTANCE))
    shares = torch.tensor(_SHARES[spec.variant])

    def draw(indices: Tensor, generator: torch.Generator) -> Draws:
        targets = torch.randint(len(permutations), (len(indices),), generator=generator)
        sources, cells = arrange(permutations[targets], spec.occlusions, generator)
        colours = _COLOURS[torch.multinomial(shares, len(indices), replacement=True, generator=generator)]
        return {"targets": targets, "sources": sources, "colours": colours, "corner": corners(cells, sizes, generator)}

    def batch(images: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        squares = mix_channels(patches.resize_square(images, sizes.side), draws["colours"])
        return tiles(squares, draws["sources"], draws["corner"], sizes.tile), draws["targets"]

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


def quick(spec: Spec) -> Spec:
    """The same task with two classes; only the last layer differs."""
    return spec.model_copy(update={"permutations": 2})


def arrange(permutations: Tensor, occlusions: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The image and the cell shown at each position of each puzzle.

    After the permutation, 0 to `occlusions` positions (each number equally likely) are overwritten with distinct cells of one
    other image of the batch.

    Args:
        permutations: (B, 9) int64, the cell at each position.

    Returns:
        Images (B, 9) int64 in [0, B), and cells (B, 9) int64 in [0, 9).
    """
    count = len(permutations)
    own = torch.arange(count)
    other = (own + torch.randint(1, max(count, 2), (count,), generator=generator)) % count
    number = torch.randint(occlusions + 1, (count, 1), generator=generator)
    occluded = torch.rand(count, TILES, generator=generator).argsort(1) < number  # a random subset of this size
    foreign = torch.rand(count, TILES, generator=generator).argsort(1)
    sources = torch.where(occluded, other[:, None], own[:, None])
    return sources, torch.where(occluded, foreign, permutations)


def mix_channels(squares: Tensor, colours: Tensor) -> Tensor:
    """Images with their channels mixed by one matrix per image: (B, S, S, 3) float32 and (B, 3, 3) -> (B, S, S, 3)."""
    flat = torch.bmm(squares.reshape(len(squares), -1, 3), colours.transpose(1, 2))
    return flat.view(squares.shape)


def corners(cells: Tensor, sizes: _Geometry, generator: torch.Generator) -> Tensor:
    """The top-left corner of every tile in every colour channel, as (row, column), at random offsets in its cell.

    Args:
        cells: (B, 9) int64, as from `arrange`.

    Returns:
        (2, B, 9, 3) int64.
    """
    offset = torch.randint(sizes.gap + 1, (2, *cells.shape, 1), generator=generator)
    offset = offset + torch.randint(sizes.channel + 1, (2, *cells.shape, 3), generator=generator)
    return offset + sizes.cell * torch.stack([cells // 3, cells % 3])[..., None]


def tiles(squares: Tensor, sources: Tensor, corner: Tensor, side: int) -> Tensor:
    """The tiles of all puzzles, cut out and normalised to mean 0 and standard deviation 1.

    Args:
        squares: (B, S, S, 3) float32.
        sources: (B, 9) int64, the image of each tile, as from `arrange`; on the device of `squares`.
        corner: (2, B, 9, 3) int64 there, as from `corners`.
        side: of a tile.

    Returns:
        (9B, 3, side, side) float32, puzzle by puzzle, the nine positions row by row.
    """
    rows, columns = corner[:, :, :, None] + torch.arange(side, device=squares.device)[:, None]  # (B, 9, side, 3) each
    channels = torch.arange(3, device=squares.device)
    cut = squares[sources[:, :, None, None, None], rows[:, :, :, None], columns[:, :, None], channels]
    return patches.standardise(cut.flatten(0, 1).permute(0, 3, 1, 2))
