"""Jigsaw (ECCV 2016): permutations as far apart as the paper's, tiles in the right positions, each defence by itself."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from ktray.ops.permutations import farthest_permutations, hashed_permutations
from ktray.pretext import jigsaw
from ktray.training.task import make_batch
from tests.toy_images import toy_images

torch.set_num_threads(1)

BARE = {"gap": 0, "shift": 0, "grey": 0.0, "normalise": False}


def distances(rows):
    return (rows[:, None] != rows[None]).sum(-1)[np.triu_indices(len(rows), 1)]


def puzzles(images, seed=0, **fields):
    """Tiles (B, 9, 3, t, t) and the permutation (B, 9) of each image."""
    spec = jigsaw.Spec(permutations=6, **{**BARE, **fields})
    pixels = torch.as_tensor(images)
    tiles, targets = make_batch(
        jigsaw.task(spec, pixels.shape[1]), pixels, torch.arange(len(pixels)), torch.Generator().manual_seed(seed)
    )
    return tiles.unflatten(0, (-1, 9)), torch.tensor(farthest_permutations(6, 2))[targets]


# (size, smallest distance, the paper's mean and smallest distance), ECCV 2016, tables 4 and 5
@pytest.mark.parametrize(
    ("count", "least", "mean"),
    [
        *((1000, 2, 8.00), (100, 2, 8.08), (95, 3, 8.08), (85, 4, 8.07), (71, 5, 8.07)),
        *((35, 6, 8.13), (10, 7, 8.57), (7, 8, 8.95), (6, 9, 9)),
    ],
)
def test_permutations_are_as_far_apart_as_those_of_the_paper(count, least, mean):
    rows = farthest_permutations(count, least)
    assert np.array_equal(np.sort(rows, axis=1), np.tile(np.arange(9), (count, 1)))
    assert distances(rows).min() >= least
    assert distances(rows).mean() >= mean - 0.005


def test_each_permutation_is_the_farthest_from_those_before_it():
    rows = farthest_permutations(40, 2)
    others = np.concatenate([hashed_permutations(3000, 1), rows])
    for size in (1, 5, 9, 17, 39):
        mean = (others[:, None] != rows[None, :size]).sum(-1).mean(1)
        assert mean[3000 + size] == mean[mean > 0].max()
    assert np.array_equal(farthest_permutations(20, 2), rows[:20])


def test_more_permutations_than_there_are_are_refused():
    with pytest.raises(ValueError, match="found only 9 of 10 permutations at Hamming distances of 9"):
        farthest_permutations(10, 9)


def test_the_geometry_at_225_pixels_is_the_papers_and_fits_at_every_size():
    assert asdict(jigsaw.geometry(225, 11, 2)) == dict(side=225, cell=75, tile=64, shift=2)
    for size in range(8, 400):
        sizes = jigsaw.geometry(size, 11, 2)
        assert sizes.side == 3 * sizes.cell <= max(size, 48)
        assert 0.8 <= sizes.tile / sizes.cell <= 0.9


def test_without_defences_the_tiles_are_the_cells_in_the_order_of_the_permutation():
    images = toy_images(5, size=48).read(np.arange(5))
    tiles, permutations = puzzles(images)
    for image, shown, order in zip(images, tiles, permutations, strict=True):
        for tile, cell in zip(shown, order.tolist(), strict=True):
            row, column = divmod(cell, 3)
            pixels = image[16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            torch.testing.assert_close((tile.permute(1, 2, 0) + 2) * 255 / 4, torch.from_numpy(pixels).float())


def ramp(count):
    """Images in which each pixel tells its row (red and green) and column (blue)."""
    images = np.zeros((count, 96, 96, 3), np.uint8)
    images[..., 0] = images[..., 1] = np.arange(96)[:, None]
    images[..., 2] = np.arange(96)
    return images


def corners_seen(tiles):
    return ((tiles[..., 0, 0] + 2) * 255 / 4).round().int()  # (B, 9, 3)


def test_a_gap_moves_each_tile_within_its_cell_and_never_out_of_it():
    tiles, permutations = puzzles(ramp(300), gap=11)
    assert tiles.shape[-1] == 27
    seen = corners_seen(tiles)
    offset = torch.stack([seen[..., 0] - permutations // 3 * 32, seen[..., 2] - permutations % 3 * 32])
    assert set(offset.flatten().tolist()) == set(range(6))
    assert (seen[..., 0] == seen[..., 1]).all(), "channels move together"


def test_a_shift_moves_the_channels_of_a_tile_against_each_other_and_stays_in_the_square():
    tiles, permutations = puzzles(ramp(300), shift=2)
    seen = corners_seen(tiles)
    assert set((seen[..., 0] - seen[..., 1]).flatten().tolist()) == {-2, -1, 0, 1, 2}
    row = seen[..., 0] - permutations // 3 * 32
    assert set(row[permutations // 3 == 1].tolist()) == {-1, 0, 1}
    assert set(row[permutations // 3 == 0].tolist()) == {0, 1}, "nothing above the image"


def test_the_share_of_grey_puzzles_is_right_and_all_tiles_of_a_puzzle_are_treated_alike():
    tiles, _ = puzzles(toy_images(1000, size=48).read(np.arange(1000)), grey=0.3)
    grey = (tiles.std(dim=2) < 1e-4).flatten(2).all(dim=2)
    assert (grey.all(dim=1) == grey.any(dim=1)).all()
    assert float(grey.all(dim=1).float().mean()) == pytest.approx(0.3, abs=0.05)


def test_normalised_tiles_have_mean_zero_and_deviation_one():
    tiles, _ = puzzles(toy_images(8, size=48).read(np.arange(8)), normalise=True)
    torch.testing.assert_close(tiles.mean(dim=(2, 3, 4)), torch.zeros(8, 9), atol=1e-4, rtol=0)
    torch.testing.assert_close(tiles.std(dim=(2, 3, 4)), torch.ones(8, 9), atol=0.2, rtol=0)
