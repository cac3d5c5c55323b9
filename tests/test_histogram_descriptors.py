"""Histogram descriptors: visual words compared with scikit-learn, colours with NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from skimage.color import rgb2lab
from sklearn.metrics import pairwise_distances_argmin

from ktray.descriptors import bag_of_hog, colour_histogram, hog
from ktray.errors import UserError
from tests.toy_images import toy_images

torch.set_num_threads(1)

IMAGES = toy_images(40)
PIXELS = torch.from_numpy(IMAGES.read(np.arange(40)))
SMALL = {"words": 12, "iterations": 5}


def test_an_image_is_the_histogram_of_the_words_nearest_to_its_hog_blocks():
    spec = bag_of_hog.Spec(**SMALL, grid=2)
    state = bag_of_hog.fit(spec, IMAGES)
    assert state["words"].shape == (12, 36)
    patterns = hog.describe(hog.Spec(cell=4), None, PIXELS).view(40, 6, 6, 36).numpy()
    found = bag_of_hog.describe(spec, state, PIXELS).view(40, 2, 2, 12)
    for row in range(2):
        for column in range(2):
            part = patterns[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3].reshape(-1, 36)
            words = pairwise_distances_argmin(part, state["words"]).reshape(40, 9)
            counts = np.stack([np.bincount(each, minlength=12) for each in words]) / 9
            np.testing.assert_allclose(found[:, row, column].numpy(), counts, atol=1e-6)


def test_the_words_are_a_function_of_data_and_seed_and_made_from_no_more_patterns_than_asked(monkeypatch):
    spec = bag_of_hog.Spec(**SMALL, patterns=100)
    seen = []
    fitted = bag_of_hog.kmeans.fit
    monkeypatch.setattr(
        bag_of_hog.kmeans,
        "fit",
        lambda shards, *rest, **named: seen.append(np.load(shards[0])) or fitted(shards, *rest, **named),
    )
    words = bag_of_hog.fit(spec, IMAGES)["words"]
    assert (bag_of_hog.fit(spec, IMAGES)["words"] == words).all()
    assert (bag_of_hog.fit(bag_of_hog.Spec(**SMALL, patterns=100, seed=1), IMAGES)["words"] != words).any()
    assert all(50 < len(rows) <= 100 for rows in seen)
    everything = hog.describe(hog.Spec(cell=4), None, PIXELS).view(-1, 36).numpy()
    assert {row.tobytes() for row in seen[0]} <= {row.tobytes() for row in everything}


def test_bags_say_what_is_wrong_with_their_settings():
    with pytest.raises(ValidationError, match="blocks of the descriptor hog, not of 'raw_pixels'"):
        bag_of_hog.Spec(hog={"kind": "raw_pixels"})
    with pytest.raises(ValueError, match="fit it to images first"):
        bag_of_hog.describe(bag_of_hog.Spec(), None, PIXELS)
    with pytest.raises(UserError, match="A cell of at most 14 px"):
        bag_of_hog.fit(bag_of_hog.Spec(hog={"kind": "hog", "cell": 20}), IMAGES)
    spec = bag_of_hog.Spec(**SMALL, grid=8)
    with pytest.raises(UserError, match="a grid of 8 is finer than the 6 x 6 HOG blocks"):
        bag_of_hog.describe(spec, bag_of_hog.fit(spec, IMAGES), PIXELS)


@pytest.mark.parametrize("grid", [1, 3])
@pytest.mark.parametrize("space", ["rgb", "lab"])
def test_a_colour_histogram_is_that_of_numpy(space, grid):
    spec = colour_histogram.Spec(space=space, bins=5, grid=grid)
    found = colour_histogram.describe(spec, None, PIXELS[:6]).view(6, grid, grid, 125).numpy()
    values = rgb2lab(PIXELS[:6].numpy()) if space == "lab" else PIXELS[:6].numpy().astype(float)
    ranges = [(0, 255)] * 3 if space == "rgb" else [(0, 100), (-110, 110), (-110, 110)]
    edge = [next(i for i in range(29) if i * grid >= 28 * cell) for cell in range(grid + 1)]
    for image in range(6):
        for row in range(grid):
            for column in range(grid):
                part = values[image, edge[row] : edge[row + 1], edge[column] : edge[column + 1]].reshape(-1, 3)
                counts, _ = np.histogramdd(part, bins=5, range=ranges)
                assert np.abs(found[image, row, column] - counts.ravel() / len(part)).sum() < 0.02


def test_images_without_colour_have_histograms_too():
    grey = torch.zeros(2, 8, 8, 3, dtype=torch.uint8)
    grey[1] = 255
    rows = colour_histogram.describe(colour_histogram.Spec(), None, grey)
    assert rows.sum(1).tolist() == [1, 1]
    assert (rows > 0).sum(1).tolist() == [1, 1]
