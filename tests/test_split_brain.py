"""Split-brain: neither input reveals what must be predicted from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage import data
from skimage.color import lab2rgb, rgb2lab

from ktray import plugins
from ktray.ops import colour, gamut
from ktray.pretext import split_brain
from ktray.spec import Augment, Schedule
from ktray.training import loop
from ktray.training.task import make_batch
from tests.toy_images import toy_images

torch.set_num_threads(1)

STILL = Augment(crop=0)


def photographs(count: int = 6, side: int = 24) -> np.ndarray:
    corners = np.random.default_rng(0).integers(0, 512 - side, (count, 2))
    return np.stack([np.array(data.astronaut())[y : y + side, x : x + side] for y, x in corners])


def batch_of(pixels: np.ndarray, **fields: object):
    task = split_brain.task(split_brain.Spec(augment=STILL, **fields), pixels.shape[1], toy_images(4))
    return task, *make_batch(task, torch.from_numpy(pixels), torch.arange(len(pixels)), torch.Generator().manual_seed(0))


def test_rgb_equals_scikit_images_and_inverts_lab():
    pixels = photographs()
    lab = rgb2lab(pixels).astype(np.float32)
    lab[3:, ..., 0] = 50  # which takes some colours out of sRGB
    found = colour.lab_to_rgb(torch.from_numpy(lab).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found[:3], pixels[:3] / 255, atol=2e-3)
    with np.testing.suppress_warnings() as warnings:
        warnings.filter(UserWarning)
        np.testing.assert_allclose(found, lab2rgb(lab), atol=2e-3)


def test_the_first_input_is_the_lightness_and_the_second_the_colours_without_it():
    pixels = photographs()
    _, inputs, _ = batch_of(pixels)
    lightness, colours = inputs.unflatten(0, (6, 2)).unbind(1)
    lab = rgb2lab(pixels)
    for channel in range(3):
        np.testing.assert_allclose(lightness[:, channel].numpy(), lab[..., 0] / 25 - 2, atol=1e-3)
    other = lab.copy()
    other[..., 0] = 50
    np.testing.assert_allclose((colours.permute(0, 2, 3, 1).numpy() + 2) / 4, lab2rgb(other), atol=2e-3)


def test_inputs_of_the_same_hue_are_alike_whatever_their_lightness():
    lab = torch.tensor([[[20.0, 12.0, -9.0], [80.0, 12.0, -9.0]]]).permute(0, 2, 1)[..., None]
    _, colours = split_brain.split_inputs(lab)
    assert torch.equal(colours[:, 0], colours[:, 1])


def test_targets_are_the_class_and_the_level_of_each_cell():
    pixels = photographs(8, 24)
    _, _, targets = batch_of(pixels, grid=4, levels=20)
    mean = rgb2lab(pixels).reshape(8, 4, 6, 4, 6, 3).mean(axis=(2, 4)).reshape(8, 16, 3)
    classes = ((mean[:, :, None, 1:] - gamut.gamut_bins(10).numpy()) ** 2).sum(-1).argmin(-1)
    assert targets.shape == (8, 2, 16)
    assert (targets[:, 0].numpy() == classes).mean() > 0.98
    assert (targets[:, 1].numpy() == np.minimum(mean[..., 0] // 5, 19)).mean() > 0.98


def test_the_head_reads_colours_from_lightness_and_lightness_from_colours():
    task, _, _ = batch_of(photographs(1), grid=2, bin=40, levels=3)
    head, colours = task.head(5).eval(), len(gamut.gamut_bins(40))
    features = torch.randn(6, 5)
    before = head(features)
    assert before.shape == (3, colours + 3, 4)
    changed = features.clone()
    changed[2] += 1  # the lightness of the second image
    differs = (head(changed) != before).any(dim=2)
    assert differs[1, :colours].any()
    assert not differs[1, colours:].any()
    assert not differs[[0, 2]].any()


def test_the_loss_is_the_sum_of_two_cross_entropies():
    task, inputs, targets = batch_of(photographs(4), grid=2, bin=40, levels=5)
    logits = task.head(3)(torch.randn(len(inputs), 3)).detach().double()
    classes = len(gamut.gamut_bins(40))
    total = 0.0
    for image in range(4):
        for cell in range(4):
            for place, part in enumerate((logits[image, :classes, cell], logits[image, classes:, cell])):
                total -= float(part.softmax(0).log()[targets[image, place, cell]])
    loss, metrics = task.loss(logits, targets)
    assert float(loss) == pytest.approx(total / 16)
    assert float(metrics["top1"]) == pytest.approx((float(metrics["colour"]) + float(metrics["lightness"])) / 2)


def test_a_network_learns_both(tmp_path):
    images, metrics = toy_images(48), []
    loop.fit(
        loop.untrained_backbone(plugins.parse("backbone", {"kind": "alexnet", "width": 0.125}), 0),
        split_brain.task(split_brain.Spec(grid=4, levels=10), 28, images),
        images,
        Schedule(epochs=12, lr=0.05, batch_size=16),
        0,
        out=tmp_path,
        until=12,
        on_epoch=lambda epoch, found, write: metrics.append(found),
    )
    assert metrics[-1]["loss"] < 0.7 * metrics[0]["loss"]
    assert metrics[-1]["colour"] > 0.3
    assert metrics[-1]["lightness"] > 0.3
