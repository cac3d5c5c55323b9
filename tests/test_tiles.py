"""The tiles of both puzzles, looked for in the images that they were cut from by scikit-image.

`python tests/test_tiles.py FILE.png` draws them: each image with its cells and tiles outlined per colour channel, and beside it
the nine tiles as the network sees them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from skimage.feature import match_template
from skimage.filters import gaussian

from ktray.ops.permutations import farthest_permutations, hashed_permutations
from ktray.pretext import jigsaw, jigsaw_pp
from ktray.training.task import make_batch

torch.set_num_threads(1)

CELL = {"jigsaw": 75, "jigsaw_pp": 85}
TILE = 64
PLACES = [(row, column) for row in range(3) for column in range(3)]


def patterns(side: int, count: int = 2) -> np.ndarray:
    """Grey images (count, side, side, 3) without two equal places; no change of colours changes them."""
    noise = gaussian(np.random.default_rng(3).random((count, side, side)), 2, channel_axis=0)
    grey = 255 * (noise - noise.min()) / np.ptp(noise)
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)


def puzzles(kind: str, images: np.ndarray, **fields: object) -> tuple[np.ndarray, np.ndarray]:
    """Tiles (B, 9, 3, 64, 64) of the images, and the permutation (B, 9) that the target names."""
    module, rows = (jigsaw, farthest_permutations(100, 2)) if kind == "jigsaw" else (jigsaw_pp, hashed_permutations(701, 3))
    task = module.task(module.Spec(**fields), images.shape[1])
    pixels = torch.from_numpy(images)
    inputs, targets = make_batch(task, pixels, torch.arange(len(images)), torch.Generator().manual_seed(1))
    return inputs.unflatten(0, (-1, 9)).numpy(), rows[targets.numpy()]


def located(tile: np.ndarray, images: np.ndarray) -> tuple[int, np.ndarray]:
    """The image that a tile (3, h, w) comes from, and the first row and column (3, 2) of each channel there."""
    scores = [match_template(image[..., 0].astype(float), tile[0]) for image in images]
    whose = int(np.argmax([score.max() for score in scores]))
    corners = []
    for channel in tile:
        score = match_template(images[whose][..., 0].astype(float), channel)
        assert score.max() > 0.999, "a tile is a part of an image, neither turned nor mirrored nor scaled"
        corners.append(np.unravel_index(score.argmax(), score.shape))
    return whose, np.array(corners)


def test_the_tiles_of_jigsaw_lie_in_the_cells_given_by_the_permutation():
    images = patterns(225)
    tiles, permutations = puzzles("jigsaw", images)
    offsets = []
    for image in range(2):
        for place, cell in enumerate(permutations[image]):
            whose, corners = located(tiles[image, place], images)
            assert whose == image
            offsets.append(corners - 75 * np.array(PLACES[cell]))
    offsets = np.array(offsets)
    assert offsets.min() >= -2
    assert offsets.max() <= 11 + 2
    assert 0 < np.ptp(offsets, axis=1).max() <= 4, "channels move against each other, by 2 px at most"
    assert np.ptp(offsets.mean(axis=1), axis=0).min() > 6, "tiles lie anywhere in their cells"


def test_the_tiles_of_jigsaw_pp_lie_in_their_cells_and_occluding_ones_in_another_image():
    images = patterns(255)
    tiles, permutations = puzzles("jigsaw_pp", images)
    offsets, occluded = [], []
    for image in range(2):
        for place, cell in enumerate(permutations[image]):
            whose, corners = located(tiles[image, place], images)
            if whose != image:
                occluded.append(image)
                cell = 3 * (corners[0, 0] // 85) + corners[0, 1] // 85
            offsets.append(corners - 85 * np.array(PLACES[cell]))
    offsets = np.array(offsets)
    assert offsets.min() >= 0
    assert 12 < offsets.max() <= 18 + 2
    assert 0 < np.ptp(offsets, axis=1).max() <= 2
    assert occluded == [0, 1], "with this seed one place of each"


def outlined(image: np.ndarray, kind: str, corners: list[np.ndarray]) -> Image.Image:
    """An image with its cells (white) and the tiles of each colour channel (in its colour)."""
    drawn = Image.fromarray(image)
    pen = ImageDraw.Draw(drawn)
    for row, column in PLACES:
        cell = CELL[kind]
        pen.rectangle([column * cell, row * cell, (column + 1) * cell - 1, (row + 1) * cell - 1], outline=(255, 255, 255))
    for of_tile in corners:
        for (row, column), colour in zip(of_tile, [(255, 0, 0), (0, 255, 0), (60, 90, 255)], strict=True):
            pen.rectangle([column, row, column + TILE - 1, row + TILE - 1], outline=colour)
    return drawn


def sheet(kind: str) -> Image.Image:
    """Outlines found by template matching on patterns, and tiles of a photograph with the same draws."""
    from skimage import data

    side = 3 * CELL[kind]
    flat = patterns(side, 3)
    photographs = np.stack([data.astronaut()[:side, 100 : 100 + side], data.chelsea()[20 : 20 + side, 60 : 60 + side],
                            data.coffee()[40 : 40 + side, 200 : 200 + side]])  # fmt: skip
    found = puzzles(kind, flat)[0]
    tiles = puzzles(kind, photographs)[0]
    page = Image.new("RGB", (2 * side + 60, 3 * (side + 20)), (90, 90, 90))
    for image in range(3):
        places = [located(found[image, place], flat) for place in range(9)]
        corners = [corner for whose, corner in places if whose == image]
        page.paste(outlined(photographs[image], kind, corners), (10, image * (side + 20) + 10))
        for place, (row, column) in enumerate(PLACES):
            shown = (tiles[image, place].transpose(1, 2, 0) * 55 + 128).clip(0, 255).astype(np.uint8)
            left, top = side + 30 + column * (TILE + 8), image * (side + 20) + 10 + row * (TILE + 8)
            page.paste(Image.fromarray(shown), (left, top))
            if places[place][0] != image:
                frame = [left - 2, top - 2, left + TILE + 1, top + TILE + 1]
                ImageDraw.Draw(page).rectangle(frame, outline=(255, 0, 255), width=2)
    return page


if __name__ == "__main__":
    target = Path(sys.argv[1])
    sheets = [sheet(kind) for kind in CELL]
    page = Image.new("RGB", (sum(each.width for each in sheets), max(each.height for each in sheets)))
    for index, each in enumerate(sheets):
        page.paste(each, (sum(other.width for other in sheets[:index]), 0))
    page.save(target)
