import numpy as np
import pytest
import torch

from ktray.ops import augmentation
from ktray.spec import Augment


def pixels(count=6, size=9, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(1, 256, (count, size, size, 3), dtype=np.uint8))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_pixels_become_floats_in_minus_two_to_two_by_the_stated_formula():
    images = pixels()
    images[0, 0, 0] = torch.tensor([0, 128, 255])
    floats = augmentation.to_float(images)
    oracle = (images.numpy().astype(np.float64) / 255 - 0.5) / 0.25
    assert floats.dtype == torch.float32
    assert np.allclose(floats.numpy(), oracle.transpose(0, 3, 1, 2), atol=1e-6)
    assert floats[0, :, 0, 0].tolist() == pytest.approx([-2.0, 0.00784, 2.0], abs=1e-5)
    assert floats.is_contiguous(memory_format=torch.channels_last)


def test_each_crop_is_a_window_of_its_own_image_padded_by_black():
    images = pixels(count=200)
    cropped = augmentation.crop_at(images, 2, augmentation.draw_corners(200, 2, generator()))
    padded = np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)))
    corners = set()
    for image, source in zip(cropped.numpy(), padded, strict=True):
        fits = [(y, x) for y in range(5) for x in range(5) if np.array_equal(source[y : y + 9, x : x + 9], image)]
        assert len(fits) == 1
        corners.update(fits)
    assert len(corners) == 25


def test_views_that_are_not_enabled_make_no_draws():
    images, used, spec = pixels(), generator(), Augment(crop=0, flip=False)
    assert augmentation.random_views(images, spec, augmentation.draw_views(6, spec, used)) is images
    assert torch.equal(torch.rand(3, generator=used), torch.rand(3, generator=generator()))


def test_about_half_of_the_images_are_mirrored_and_the_others_untouched():
    images = pixels(count=400)
    flipped = augmentation.mirror(images, augmentation.draw_mirrored(400, generator()))
    mirrored = (flipped == images.flip(2)).flatten(1).all(1)
    untouched = (flipped == images).flatten(1).all(1)
    assert torch.equal(mirrored, ~untouched)
    assert 160 < int(mirrored.sum()) < 240


@pytest.mark.parametrize("spec", [Augment(), Augment(crop=3, flip=True), Augment(crop=0)])
def test_views_depend_on_the_generator_alone(spec):
    images = pixels()
    before = images.clone()
    first, again, other = (
        augmentation.random_views(images, spec, augmentation.draw_views(6, spec, generator(seed))) for seed in (1, 1, 2)
    )
    assert first.shape == images.shape
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (spec.crop == 0)
    assert torch.equal(images, before)
