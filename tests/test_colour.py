"""Colour operations agree with scikit-image and torchvision, image by image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data
from skimage.color import rgb2lab
from torchvision.transforms import functional as oracle

from ktray.ops import augmentation, colour, distortions
from ktray.ops.colour import Jitter
from ktray.ops.distortions import Distortions
from tests.toy_images import toy_images

torch.set_num_threads(1)

STILL = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}


def photographs(count: int = 6, side: int = 24) -> torch.Tensor:
    """Crops of a photograph, (B, 3, side, side) float32 in [0, 1]."""
    corners = np.random.default_rng(0).integers(0, 512 - side, (count, 2))
    crops = [np.array(data.astronaut())[y : y + side, x : x + side] for y, x in corners]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_lab_agrees_with_scikit_image_for_all_kinds_of_colours():
    levels = np.array([0, 1, 5, 11, 12, 40, 90, 128, 200, 254, 255], np.uint8)
    cube = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(1, 11, 121, 3)
    np.testing.assert_allclose(colour.rgb_to_lab(torch.from_numpy(cube)).numpy(), rgb2lab(cube), atol=2e-3)


@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("brightness", oracle.adjust_brightness),
        ("contrast", oracle.adjust_contrast),
        ("saturation", oracle.adjust_saturation),
    ],
)
def test_a_factor_changes_an_image_as_in_torchvision(field, changed):
    images = photographs()
    changes = Jitter(**{**STILL, field: 0.8}, share=1)
    found = colour.random_jitter(images, changes, colour.draw_jitter(6, changes, drawn()))
    generator = drawn()
    torch.rand(6, generator=generator)
    place = list(STILL).index(field)
    factors = 1 + 0.8 * (2 * torch.rand(6, 4, generator=generator)[:, place] - 1)
    theirs = torch.stack([changed(image, float(factor)) for image, factor in zip(images, factors, strict=True)])
    torch.testing.assert_close(found, theirs, atol=1e-3, rtol=0)


def test_hue_rotation_agrees_with_torchvision_and_keeps_greys():
    images = torch.cat([photographs(), torch.full((1, 3, 24, 24), 0.3)])
    shifts = torch.tensor([-0.5, -0.2, 0.0, 0.1, 0.3, 0.5, 0.4])
    theirs = torch.stack([oracle.adjust_hue(image, float(shift)) for image, shift in zip(images, shifts, strict=True)])
    torch.testing.assert_close(colour.shift_hue(images, shifts[:, None, None]), theirs, atol=1e-4, rtol=0)


def test_images_change_with_the_given_probability_and_independently():
    images = photographs(1).expand(1000, 3, 24, 24)[:, :, :4, :4]
    found = colour.random_jitter(images, Jitter(share=0.7), colour.draw_jitter(1000, Jitter(share=0.7), drawn()))
    assert found.min() >= 0
    assert found.max() <= 1
    still = (found == images).all(dim=(1, 2, 3))
    assert float(still.float().mean()) == pytest.approx(0.3, abs=0.05)
    assert len(found[~still].flatten(1).unique(dim=0)) == int((~still).sum())
    grey = (colour.turn_grey(images, colour.draw_chosen(1000, 0.2, drawn())).std(dim=1) < 1e-6).all(dim=(1, 2))
    assert float(grey.float().mean()) == pytest.approx(0.2, abs=0.05)


def test_the_projection_removes_only_the_green_magenta_axis():
    projection, axis = np.array(colour.PROJECTION), np.array([-1.0, 2.0, -1.0])
    np.testing.assert_allclose(projection, np.eye(3) - np.outer(axis, axis) / (axis @ axis), atol=1e-12)


def test_a_crop_is_an_axis_aligned_part_of_the_image_within_the_bounds_of_area_and_ratio():
    place = (torch.arange(64.0) + 0.5) / 64
    ramps = torch.stack([place.expand(64, 64), place[:, None].expand(64, 64), torch.zeros(64, 64)])
    seen = augmentation.resized_crop(ramps.expand(500, 3, 64, 64), augmentation.draw_crop(500, 0.2, drawn()))
    torch.testing.assert_close(seen[:, 0], seen[:, 0, :1].expand(500, 64, 64), atol=1e-4, rtol=0)
    torch.testing.assert_close(seen[:, 1], seen[:, 1, :, :1].expand(500, 64, 64), atol=1e-4, rtol=0)
    across, down = seen[:, 0, 32], seen[:, 1, :, 32]
    width, height = (64 / 32 * (line[:, 48] - line[:, 16]) for line in (across, down))  # the inner half: no borders
    assert min(width.min(), height.min()) >= (0.2 * 3 / 4) ** 0.5 - 1e-3
    assert max(width.max(), height.max()) <= 1 + 1e-3
    inside = (width < 0.999) & (height < 0.999)  # else the image had no room for that shape
    ratio, area = (width / height)[inside], (width * height)[inside]
    assert 3 / 4 - 1e-2 < ratio.min() < 0.78
    assert 1.28 < ratio.max() < 4 / 3 + 1e-2
    assert 0.199 < area.min() < 0.22
    assert float((width * height).mean()) == pytest.approx(0.6, abs=0.05)
    for line, side in ((across, width), (down, height)):
        first = line[:, 16] - side / 4
        assert first.min() > -0.01
        assert (first + side).max() < 1.01
        assert first[inside].unique().numel() == int(inside.sum())


def test_blur_agrees_with_torchvision():
    images, sigma = photographs(3, 60), torch.tensor([0.3, 1.0, 2.0])
    theirs = torch.stack([oracle.gaussian_blur(i, [7, 7], [float(s)] * 2) for i, s in zip(images, sigma, strict=True)])
    torch.testing.assert_close(augmentation.gaussian_blur(images, sigma), theirs, atol=1e-5, rtol=0)


def view(images: torch.Tensor, changes: Distortions) -> torch.Tensor:
    return distortions.random_view(images, changes, distortions.draw_view(len(images), changes, drawn()))


def test_a_view_with_all_distortions_has_the_input_format_and_without_any_it_is_a_crop():
    images = torch.from_numpy(toy_images(8).read(np.arange(8)))
    seen = view(images, Distortions(solarise=1, blur=1))
    assert seen.shape == (8, 3, 28, 28)
    assert seen.min() >= -2.001
    assert seen.max() <= 2.001
    plain = view(images, Distortions(area=0.5, flip=False, jitter=Jitter(share=0), grey=0))
    cropped = augmentation.resized_crop(images.permute(0, 3, 1, 2) / 255, augmentation.draw_crop(8, 0.5, drawn()))
    torch.testing.assert_close(plain, 4 * cropped - 2)


def test_solarisation_agrees_with_torchvision():
    images = torch.from_numpy(toy_images(8).read(np.arange(8)))
    plain = {"area": 0.3, "flip": False, "jitter": Jitter(share=0), "grey": 0}
    before = (view(images, Distortions(**plain)) + 2) / 4
    after = (view(images, Distortions(**plain, solarise=1)) + 2) / 4
    torch.testing.assert_close(after, oracle.solarize(before.clamp(0, 1), 0.5), atol=1e-5, rtol=0)
