"""Inpainting: holes of half the side, targets are the cells beneath them, and the loss counts nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from skimage.measure import block_reduce
from sklearn.metrics import mean_squared_error, r2_score

from ktray import plugins
from ktray.pretext import inpainting
from ktray.spec import Augment, Schedule
from ktray.training import loop
from ktray.training.task import make_batch
from tests.toy_images import toy_images

torch.set_num_threads(1)


def batch_of(images: np.ndarray, **fields: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs (B, H, W, 3) in [0, 255], cells (B, g, g, 3) likewise, holes (B, g, g) bool."""
    task = inpainting.task(inpainting.Spec(**{"augment": Augment(crop=0), **fields}), images.shape[1])
    inputs, targets = make_batch(task, torch.from_numpy(images), torch.arange(len(images)), torch.Generator().manual_seed(0))
    shown, cells = ((each.permute(0, 2, 3, 1).numpy() + 2) * 255 / 4 for each in (inputs, targets[:, :3]))
    return shown, cells, targets[:, 3].numpy() == 1


@pytest.mark.parametrize(("place", "size"), [("centre", 32), ("random", 32), ("random", 64), ("centre", 28)])
def test_half_of_each_side_is_missing_and_the_rest_is_the_image(place, size):
    images = np.maximum(toy_images(40, size=size).read(np.arange(40)), 1)
    images[images == 127] = 126
    shown, cells, holes = batch_of(images, place=place)
    side = size - size % 8
    edge = (size - side) // 2
    images = images[:, edge : edge + side, edge : edge + side]
    missing = np.isclose(shown, 127.5, atol=1e-3).all(axis=-1)
    assert (missing.sum(axis=(1, 2)) == (side // 2) ** 2).all()
    np.testing.assert_allclose(shown[~missing], images[~missing], atol=1e-3)
    np.testing.assert_allclose(cells, block_reduce(images.astype(float), (1, side // 8, side // 8, 1), np.mean), atol=1e-2)
    assert np.array_equal(block_reduce(missing, (1, side // 8, side // 8), np.min), holes)
    corners = {tuple(np.argwhere(hole)[0]) for hole in holes}
    assert corners == {(2, 2)} if place == "centre" else len(corners) > 15


def test_only_missing_cells_count():
    rng = np.random.default_rng(0)
    cells, predicted = rng.normal(size=(2, 5, 3, 4, 4))
    corner = torch.randint(3, (2, 5, 1), generator=torch.Generator().manual_seed(1))
    holes = inpainting.holes(corner, 4).numpy()
    targets = torch.from_numpy(np.concatenate([cells, holes[:, None]], axis=1))
    loss, metrics = inpainting.reconstruction(torch.from_numpy(predicted), targets)
    told, wanted = (each.transpose(0, 2, 3, 1)[holes] for each in (predicted, cells))
    assert float(loss) == pytest.approx(mean_squared_error(wanted, told))
    explained = r2_score(wanted, told, multioutput="variance_weighted")
    assert float(metrics["explained"]) == pytest.approx(explained)
    elsewhere = torch.from_numpy(predicted) + 7 * ~torch.from_numpy(holes)[:, None]
    assert torch.equal(inpainting.reconstruction(elsewhere, targets)[0], loss)


def test_an_odd_grid_is_refused():
    with pytest.raises(ValidationError, match="use an even number"):
        inpainting.Spec(grid=7)


def test_a_network_learns_what_is_missing(tmp_path):
    metrics = []
    loop.fit(
        loop.untrained_backbone(plugins.parse("backbone", {"kind": "alexnet", "width": 0.125}), 0),
        inpainting.task(inpainting.Spec(place="random"), 32),
        toy_images(96, size=32),
        Schedule(epochs=10, lr=0.05, batch_size=16),
        0,
        out=tmp_path,
        until=10,
        on_epoch=lambda epoch, found, write: metrics.append(found),
    )
    assert metrics[-1]["loss"] < 0.6 * metrics[0]["loss"]
    assert metrics[-1]["explained"] > 0.3
