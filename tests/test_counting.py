"""Counting: the quarters form the image, the whole is the downsampled image, and the loss equals explicit loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.transform import downscale_local_mean

from ktray import plugins
from ktray.pretext import counting
from ktray.spec import Augment, Schedule
from ktray.training import loop
from ktray.training.task import make_batch
from tests.toy_images import toy_images

torch.set_num_threads(1)

STILL = {"augment": Augment(crop=0), "grey": 0.0}


def inputs_of(images: np.ndarray, **fields: object) -> np.ndarray:
    """(B, 5, h, h, 3) in [0, 255]."""
    task = counting.task(counting.Spec(**{**STILL, **fields}), images.shape[1])
    inputs, _ = make_batch(task, torch.from_numpy(images), torch.arange(len(images)), torch.Generator().manual_seed(0))
    return (inputs.unflatten(0, (-1, 5)).permute(0, 1, 3, 4, 2).numpy() + 2) * 255 / 4


def test_the_quarters_laid_side_by_side_are_the_image():
    images = toy_images(4, size=64).read(np.arange(4))
    _, *quarters = inputs_of(images).swapaxes(0, 1)
    whole = np.concatenate([np.concatenate(quarters[:2], axis=2), np.concatenate(quarters[2:], axis=2)], axis=1)
    np.testing.assert_allclose(whole, images, atol=1e-3)


def test_the_whole_is_the_image_at_half_its_side_by_one_of_three_filters():
    images = np.random.default_rng(0).integers(0, 256, (60, 48, 48, 3), dtype=np.uint8)
    whole = inputs_of(images)[:, 0]
    areas = np.stack([downscale_local_mean(image.astype(float), (2, 2, 1)) for image in images])
    by_area = np.abs(whole - areas).max(axis=(1, 2, 3)) < 0.01
    assert 10 <= by_area.sum() <= 30
    spread = whole[~by_area].std(axis=(1, 2, 3))
    assert 10 <= (spread < spread.mean()).sum() <= 30, "bilinear smooths more than bicubic"
    assert np.abs(whole.mean(axis=(1, 2, 3)) - images.mean(axis=(1, 2, 3))).max() < 1.5


def test_small_images_are_enlarged_and_odd_ones_lose_a_row_and_a_column():
    assert inputs_of(toy_images(2, size=28).read(np.arange(2))).shape == (2, 5, 24, 24, 3)
    assert inputs_of(toy_images(2, size=65).read(np.arange(2))).shape == (2, 5, 32, 32, 3)


def test_the_loss_equals_its_formula():
    counts = np.random.default_rng(1).random((6, 5, 7)) * [[[2.0]]]
    total, hits = 0.0, 0
    for image in range(6):
        own = other = 0.0
        for thing in range(7):
            parts = sum(counts[image, part, thing] for part in (1, 2, 3, 4))
            own += (counts[image, 0, thing] - parts) ** 2
            other += (counts[image - 1, 0, thing] - parts) ** 2
        total += own + max(0.0, 60 - other)
        hits += own < other
    loss, metrics = counting.contrast(torch.from_numpy(counts), 60.0)
    assert float(loss) == pytest.approx(total / 6)
    assert float(metrics["top1"]) == pytest.approx(hits / 6)


def test_all_zero_counts_cost_the_margin_and_score_no_hit():
    loss, metrics = counting.contrast(torch.zeros(4, 5, 3), 10.0)
    assert float(loss) == 10
    assert float(metrics["top1"]) == 0


@pytest.mark.parametrize("scale", [0.01, 1, 100])
@pytest.mark.parametrize("counts", [10, 1000])
def test_a_network_begins_near_the_margin_whatever_its_features(scale, counts):
    torch.manual_seed(0)
    head = counting.task(counting.Spec(counts=counts), 32).head(512)
    loss, _ = counting.contrast(head(scale * torch.rand(160, 512)), 10.0)
    assert 8 < float(loss.detach()) < 20


@pytest.mark.parametrize("backbone", [{"kind": "alexnet", "width": 0.125}, {"kind": "resnet", "width": 0.125}])
def test_a_network_learns_to_count(backbone, tmp_path):
    metrics = []
    loop.fit(
        loop.untrained_backbone(plugins.parse("backbone", backbone), 0),
        counting.task(counting.Spec(), 28),
        toy_images(96),
        Schedule(epochs=8, lr=0.001, batch_size=16),
        0,
        out=tmp_path,
        until=8,
        on_epoch=lambda epoch, found, write: metrics.append(found),
    )
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert metrics[-1]["top1"] > 0.7
