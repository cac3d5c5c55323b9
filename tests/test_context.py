"""Context prediction: patches lie where their class says, and colours do not betray the lens."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
import torch

from ktray import plugins
from ktray.pretext import context
from ktray.spec import Schedule
from ktray.training import loop
from ktray.training.task import make_batch
from tests.toy_images import toy_images

torch.set_num_threads(1)


def places_seen(count=200, size=96, **fields):
    """Where patches were cut: rows and columns (2, B, T) of their corners, and the targets."""
    spec = context.Spec(**fields)
    sizes = context.geometry(size, spec.gap, spec.jitter)
    places = torch.tensor([4, *context._NEIGHBOURS.tolist()]).expand(count, 9)
    return context.corners(places, sizes, torch.Generator().manual_seed(0))[..., 0], sizes


def test_the_geometry_at_398_pixels_is_the_released_one_and_fits_at_every_size():
    assert asdict(context.geometry(398, 48, 7)) == dict(side=398, patch=96, gap=48, jitter=7)
    assert asdict(context.geometry(32, 48, 7)) == dict(side=48, patch=12, gap=5, jitter=1)
    for size in range(8, 400):
        sizes = context.geometry(size, 48, 7)
        assert sizes.gap > 0
        assert 3 * sizes.patch + 2 * sizes.gap + 2 * sizes.jitter <= sizes.side
        assert 0.9 < 3 * sizes.patch / (sizes.side * 288 / 398) < 1.1


@pytest.mark.parametrize("gap", [0, 24, 48])
def test_patches_lie_in_the_image_a_gap_apart_up_to_their_jitter(gap):
    corner, sizes = places_seen(gap=gap)
    assert corner.min() >= 0
    assert corner.max() + sizes.patch <= sizes.side
    for neighbour, place in enumerate(context._NEIGHBOURS.tolist(), start=1):
        step = corner[:, :, neighbour] - corner[:, :, 0]
        pitch = sizes.patch + sizes.gap
        wanted = torch.tensor([place // 3 - 1, place % 3 - 1])[:, None] * pitch
        assert (step - wanted).abs().max() <= 2 * sizes.jitter
        assert (step - wanted).unique().numel() == 4 * sizes.jitter + 1


@pytest.mark.parametrize("pairs", ["all", "one"])
def test_a_neighbour_shows_the_part_of_the_image_that_its_class_says(pairs):
    images = toy_images(40, size=48).read(np.arange(40))
    task = context.task(context.Spec(pairs=pairs, colours="keep", jitter=0), 48)  # patches of 12, gaps of 6: no room to move
    inputs, targets = make_batch(task, torch.from_numpy(images), torch.arange(40), torch.Generator().manual_seed(0))
    shown = inputs.unflatten(0, (40, -1)).permute(0, 1, 3, 4, 2).numpy()
    assert targets.shape == (40, 8 if pairs == "all" else 1)
    assert set(targets.flatten().tolist()) == set(range(8))
    row_major = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1), (2, 2)]
    for image, patches, classes in zip(images, shown, targets.tolist(), strict=True):
        for patch, (row, column) in zip(patches, [(1, 1), *(row_major[each] for each in classes)], strict=True):
            pixels = image[18 * row : 18 * row + 12, 18 * column : 18 * column + 12].astype(np.float64)
            np.testing.assert_allclose(patch, (pixels - pixels.mean()) / (pixels.std() + 1), atol=1e-3)


def test_patches_keep_one_colour_channel_or_lose_the_green_magenta_axis():
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (30, 48, 48, 3), dtype=np.uint8))

    def patches(colours):
        task = context.task(context.Spec(colours=colours), 48)
        return make_batch(task, images, torch.arange(30), torch.Generator().manual_seed(0))[0]

    dropped, projected, kept = patches("drop"), patches("project"), patches("keep")
    spread = dropped.std(dim=(2, 3)).sort(dim=1).values
    assert (spread[:, :2] < 0.02 * spread[:, 2:]).all()
    assert (spread[:, :2] > 0).all(), "noise, so that no channel is empty"
    assert set(dropped.std(dim=(2, 3)).argmax(1).tolist()) == {0, 1, 2}
    axis = torch.tensor([-1.0, 2.0, -1.0])
    along = torch.einsum("nchw,c->nhw", projected, axis)
    assert along.flatten(1).std(dim=1).max() < 1e-4
    assert torch.einsum("nchw,c->nhw", kept, axis).std() > 0.5
    for cut in (dropped, projected, kept):
        torch.testing.assert_close(cut.mean(dim=(1, 2, 3)), torch.zeros(len(cut)), atol=1e-4, rtol=0)
        torch.testing.assert_close(cut.std(dim=(1, 2, 3), correction=0), torch.ones(len(cut)), atol=0.05, rtol=0)


def test_the_head_pairs_each_neighbour_with_the_centre_of_its_own_image():
    head = context.task(context.Spec(hidden=8), 48).head(4)
    features = torch.randn(18, 4)
    changed = features.clone()
    changed[3] += 1  # the third neighbour of the first image
    differs = (head(features) != head(changed)).any(dim=1).nonzero().flatten().tolist()
    assert differs == [2]
    changed = features.clone()
    changed[9] += 1  # the centre of the second image
    differs = (head(features) != head(changed)).any(dim=1).nonzero().flatten().tolist()
    assert differs == list(range(8, 16))


def test_a_network_learns_the_positions_of_neighbours(tmp_path):
    metrics = []
    loop.fit(
        loop.untrained_backbone(plugins.parse("backbone", {"kind": "alexnet", "width": 0.125}), 0),
        context.task(context.Spec(colours="project"), 48),
        toy_images(64, size=48),
        Schedule(epochs=6, lr=0.05, batch_size=16),
        0,
        out=tmp_path,
        until=6,
        on_epoch=lambda epoch, found, write: metrics.append(found),
    )
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    assert metrics[-1]["top1"] > 0.3  # chance is 0.125
