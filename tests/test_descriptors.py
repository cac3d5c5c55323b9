"""Every handcrafted teacher keeps the contract, and HOG is scikit-image's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from skimage import data
from skimage.feature import hog as oracle

from ktray import plugins, spec
from ktray.descriptors import hog, random_network, raw_pixels
from ktray.errors import UserError
from ktray.features import extraction
from ktray.training import loop
from tests.toy_images import toy_images

BACKBONE = {"kind": "alexnet", "width": 0.125}
FIELDS = {"random_network": {"backbone": BACKBONE, "layer": "conv3"}}  # of kinds that cannot be built from defaults


def describe(kind: str, images: torch.Tensor) -> torch.Tensor:
    module = plugins.module("descriptor", kind)
    described = module.Spec(**FIELDS.get(kind, {}))
    state = module.fit(described, toy_images(64)) if hasattr(module, "fit") else None
    return module.describe(described, state, images)


@pytest.mark.parametrize("kind", plugins.kinds("descriptor"))
def test_a_descriptor_gives_one_finite_row_per_image_whatever_the_batch(kind: str) -> None:
    images = torch.from_numpy(toy_images(12).read(np.arange(12)))
    before = images.clone()
    rows = describe(kind, images)
    assert rows.dtype == torch.float32
    assert rows.ndim == 2
    assert len(rows) == 12
    assert rows.isfinite().all()
    assert (images == before).all()
    torch.testing.assert_close(describe(kind, images[5:9]), rows[5:9], rtol=1e-4, atol=1e-5)
    assert len(rows.unique(dim=0)) == 12


@pytest.mark.parametrize("kind", plugins.kinds("descriptor"))
def test_a_descriptor_is_a_teacher(kind: str) -> None:
    module = plugins.module("descriptor", kind)
    assert module.REVISION >= 1
    teacher = TypeAdapter(spec.TeacherSpec).validate_python({"descriptor": {"kind": kind, **FIELDS.get(kind, {})}})
    if not hasattr(module, "fit"):
        (rows,) = extraction.extract_views([extraction.teacher_view(teacher)], None, None, toy_images(5))
        assert (rows == describe(kind, torch.from_numpy(toy_images(5).read(np.arange(5)))).numpy()).all()


@pytest.mark.parametrize("orientations", [6, 8, 9, 12])
@pytest.mark.parametrize(("cell", "block"), [(4, 2), (8, 2), (5, 3), (7, 1)])
def test_hog_equals_scikit_images(cell: int, block: int, orientations: int) -> None:
    rng = np.random.default_rng(cell)
    astronaut = np.array(data.astronaut())
    crops = [astronaut[y : y + 34, x : x + 34] for y, x in rng.integers(0, 470, (6, 2))]
    grey = np.repeat(crops[0][:, :, :1], 3, axis=2)
    ramp = np.broadcast_to((np.arange(34)[:, None] * 3 + np.arange(34) * 3)[..., None], (34, 34, 3))  # 45 degrees: a border
    images = np.stack([*crops, grey, ramp, np.zeros_like(grey)]).astype(np.uint8)
    ours = hog.describe(hog.Spec(cell=cell, orientations=orientations, block=block), None, torch.from_numpy(images))
    settings = {"orientations": orientations, "pixels_per_cell": (cell, cell), "cells_per_block": (block, block)}
    theirs = [oracle(image, block_norm="L2-Hys", channel_axis=-1, **settings) for image in images]
    np.testing.assert_allclose(ours.numpy(), np.stack(theirs), atol=1e-6)
    of_grey = oracle(grey[:, :, 0], block_norm="L2-Hys", **settings)
    np.testing.assert_allclose(ours.numpy()[6], of_grey, atol=1e-6)


def test_hog_of_a_batch_equals_hog_of_each_image(monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.from_numpy(toy_images(20).read(np.arange(20)))
    whole = hog.describe(hog.Spec(cell=7), None, images)
    monkeypatch.setattr(hog, "_PIXELS", 3 * 28 * 28)
    assert (hog.describe(hog.Spec(cell=7), None, images) == whole).all()


def test_hog_of_an_image_smaller_than_a_block_says_which_cell_fits() -> None:
    with pytest.raises(UserError, match="A cell of at most 14 px"):
        hog.describe(hog.Spec(cell=15), None, torch.zeros(1, 28, 28, 3, dtype=torch.uint8))


def test_raw_pixels_are_the_pixels_and_their_means() -> None:
    images = torch.from_numpy(toy_images(3).read(np.arange(3)))
    whole = raw_pixels.describe(raw_pixels.Spec(), None, images)
    assert (whole.view(3, 3, 28, 28).permute(0, 2, 3, 1) * 255).round().to(torch.uint8).equal(images)
    means = images.float().view(3, 4, 7, 4, 7, 3).mean(dim=(2, 4)).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(raw_pixels.describe(raw_pixels.Spec(side=4), None, images), means.flatten(1))


def test_a_random_network_is_the_untrained_student_of_the_same_seed() -> None:
    images = torch.from_numpy(toy_images(4).read(np.arange(4)))
    drawn = random_network.Spec(backbone=BACKBONE, layer="conv3", seed=7)
    torch.manual_seed(1)
    ours = random_network.describe(drawn, None, images)
    network = loop.untrained_backbone(drawn.backbone, 7)
    assert ours.equal(extraction.layer_extractor(network, "conv3", spec.Pooling())(images))
    other = random_network.describe(random_network.Spec(backbone=BACKBONE, layer="conv3", seed=8), None, images)
    assert not ours.equal(other)
