"""Colorization: colour classes, soft targets and weights equal independently written formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.color import rgb2lab
from sklearn.neighbors import NearestNeighbors

from ktray import plugins
from ktray.ops import colour, gamut
from ktray.pretext import colorization
from ktray.spec import Augment, Schedule
from ktray.training import loop
from ktray.training.task import make_batch
from tests.toy_images import toy_images

torch.set_num_threads(1)

STILL = Augment(crop=0)


def test_the_colours_are_the_squares_of_the_ab_plane_that_srgb_reaches():
    colours = gamut.gamut_bins(10)
    levels = np.append(np.arange(0, 255, 6), 255).astype(np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(1, -1, 3)
    reached = np.unique(np.round(rgb2lab(cube)[0, :, 1:] / 10), axis=0) * 10
    ours = {tuple(each) for each in colours.tolist()}
    assert len(colours) == len(ours) == 261
    assert {tuple(each) for each in reached.tolist()} - ours == set()
    assert len(ours) - len(reached) < 5, "a coarser cube misses a few"


def test_a_target_is_a_gaussian_over_the_five_nearest_colours():
    colours = gamut.gamut_bins(10)
    ab = torch.from_numpy(np.random.default_rng(0).uniform(-60, 60, (3, 4, 2))).float()
    found = colorization.soft_targets(ab, colours, 5.0)
    assert found.shape == (3, 261, 4)
    far, which = NearestNeighbors(n_neighbors=5).fit(colours.numpy()).kneighbors(ab.view(-1, 2).numpy())
    weights = np.exp(-(far**2) / (2 * 5**2))
    wanted = np.zeros((12, 261))
    np.put_along_axis(wanted, which, weights / weights.sum(1, keepdims=True), axis=1)
    np.testing.assert_allclose(found.transpose(1, 2).reshape(12, 261).numpy(), wanted, atol=1e-5)


def test_cells_are_read_row_by_row_and_the_network_sees_only_lightness():
    images = toy_images(6, size=32)
    pixels = torch.from_numpy(images.read(np.arange(6)))
    task = colorization.task(colorization.Spec(grid=4, augment=STILL), 32, images)
    inputs, targets = make_batch(task, pixels, torch.arange(6), torch.Generator().manual_seed(0))
    lab = rgb2lab(pixels.numpy())
    for channel in range(3):
        np.testing.assert_allclose(inputs[:, channel].numpy(), (lab[..., 0] / 100 - 0.5) * 4, atol=1e-3)
    mean = lab[..., 1:].reshape(6, 4, 8, 4, 8, 2).mean(axis=(2, 4)).reshape(6, 16, 2)
    colours = gamut.gamut_bins(10).numpy()
    nearest = ((mean[:, :, None] - colours) ** 2).sum(-1).argmin(-1)
    assert (targets.argmax(1).numpy() == nearest).mean() > 0.98, "but for ties of rounding"


def test_frequencies_sum_to_one_and_rare_colours_weigh_more():
    images = toy_images(40, size=32)
    frequency = colorization.frequencies(images, 4, 10)
    assert float(frequency.sum()) == pytest.approx(1, abs=1e-5)
    lab = colour.rgb_to_lab(torch.from_numpy(images.read(np.arange(40)))).numpy()[..., 1:]
    centre = lab.mean(axis=(0, 1, 2))
    near = np.linalg.norm(gamut.gamut_bins(10).numpy() - centre, axis=1) < 60
    assert float(frequency[torch.from_numpy(near)].sum()) > 0.8
    weights = colorization.rebalancing(frequency, 0.5).double()
    q = len(frequency)
    wanted = np.array([1 / (0.5 * p + 0.5 / q) for p in frequency.double().tolist()])
    wanted /= sum(p * w for p, w in zip(frequency.double().tolist(), wanted, strict=True))
    np.testing.assert_allclose(weights.numpy(), wanted, rtol=1e-4)
    assert weights[frequency.argmin()] > weights[frequency.argmax()]
    torch.testing.assert_close(colorization.rebalancing(frequency, 1.0), torch.ones(q))


def test_the_loss_is_a_weighted_cross_entropy_per_cell():
    images = toy_images(8, size=32)
    spec = colorization.Spec(grid=2, bin=40)
    task = colorization.task(spec, 32, images)
    pixels = torch.from_numpy(images.read(np.arange(8)))
    _, targets = make_batch(task, pixels, torch.arange(8), torch.Generator().manual_seed(0))
    logits = torch.randn(targets.shape)
    weights = colorization.rebalancing(colorization.frequencies(images, 2, 40), 0.5)
    total = 0.0
    for image in range(8):
        for cell in range(4):
            z, p = targets[image, :, cell], torch.softmax(logits[image, :, cell], 0)
            total -= float(weights[z.argmax()] * (z * p.log()).sum())
    assert float(task.loss(logits, targets)[0]) == pytest.approx(total / 32, rel=1e-4)


def test_a_network_learns_colours(tmp_path):
    images, metrics = toy_images(48), []
    loop.fit(
        loop.untrained_backbone(plugins.parse("backbone", {"kind": "alexnet", "width": 0.125}), 0),
        colorization.task(colorization.Spec(grid=4), 28, images),
        images,
        Schedule(epochs=12, lr=0.05, batch_size=16),
        0,
        out=tmp_path,
        until=12,
        on_epoch=lambda epoch, found, write: metrics.append(found),
    )
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    assert metrics[-1]["top1"] > 0.3
