"""Strong augmentation of a student's images: every operation equals torchvision's, and mixed images have mixed targets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as oracle

from ktray.ops import augmentation, colour, mixing, randaugment
from ktray.ops.random_draws import map_draws
from ktray.spec import Augment, RandAugment
from ktray.training import classification
from ktray.training.task import Labels, make_batch

torch.set_num_threads(1)


def images(count=6, height=20, width=20, seed=0):
    """(B, 3, H, W) uint8: smooth shapes with noise, so that geometry and histograms both matter."""
    draws = np.random.default_rng(seed)
    ramp = np.linspace(20, 220, height)[:, None] + 30 * np.sin(np.arange(width) / 3)
    noise = draws.normal(0, 15, (count, 3, height, width))
    return torch.from_numpy(np.clip(ramp + noise, 0, 255).astype(np.uint8))


def drawn(seed=0):
    return torch.Generator().manual_seed(seed)


def one(pixels, name, magnitude, negative=False):
    """All images after one operation of RandAugment."""
    operation = torch.full((len(pixels),), randaugment.OPERATIONS.index(name))
    return randaugment.apply_one(pixels, magnitude, operation, torch.full((len(pixels),), negative))


def torchvisions(pixels, name, magnitude, negative=False):
    """What torchvision's RandAugment does with one operation of this magnitude."""
    height, width = pixels.shape[2:]
    theirs = {"translate_x": "TranslateX", "translate_y": "TranslateY", "shear_x": "ShearX", "shear_y": "ShearY"}
    theirs |= {"colour": "Color", "posterise": "Posterize", "solarise": "Solarize", "autocontrast": "AutoContrast"}
    theirs |= {"equalise": "Equalize"}
    name = theirs.get(name, name.capitalize())
    make = v2.RandAugment(magnitude=magnitude)
    values, signed = make._AUGMENTATION_SPACE[name]
    levels = values(31, height, width)
    level = 0.0 if levels is None else float(levels[magnitude])
    return make._apply_image_or_video_transform(pixels, name, -level if signed and negative else level, "nearest", {})


@pytest.mark.parametrize("shape", [(20, 20), (32, 24)])
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("name", randaugment.OPERATIONS)
def test_every_operation_of_randaugment_is_torchvisions_at_every_strength(name, negative, shape):
    pixels = images(3, *shape)
    for magnitude in (0, 3, 9, 16, 30):
        ours, theirs = one(pixels, name, magnitude, negative), torchvisions(pixels, name, magnitude, negative)
        off = (ours.int() - theirs.int()).abs()
        if name in randaugment.GEOMETRIC:  # a source exactly between two pixels may be rounded to either
            assert float((off > 0).float().mean()) < 0.02, magnitude
        elif name in randaugment.BLENDED:  # sums of products are cut off after the point, so the last digit counts
            assert int(off.max()) <= 1, magnitude
            assert float((off > 0).float().mean()) < 0.1, magnitude
        else:
            threshold = 255 * (1 - magnitude / 30)
            assert int((off * ((pixels - threshold).abs() > 1e-3)).max()) == 0, magnitude


def test_images_of_a_batch_get_operations_of_their_own_one_after_the_other():
    pixels = images(200)
    spec = RandAugment(operations=2, magnitude=12)
    draws = randaugment.draw(200, spec, drawn())
    found = randaugment.apply(pixels, spec, draws)
    for index in (0, 17, 99):
        alone = pixels[index : index + 1]
        for operation, negative in zip(draws["operation"][:, index], draws["negative"][:, index], strict=True):
            alone = one(alone, randaugment.OPERATIONS[operation], 12, bool(negative))
        assert torch.equal(found[index], alone[0])
    counts = draws["operation"].flatten().bincount(minlength=14)
    assert counts.min() > 10
    assert 150 < int(draws["negative"].sum()) < 250


def test_a_resized_crop_is_torchvisions_away_from_the_border_of_the_crop():
    pixels = images(1, 40, 40).float() / 255
    top, left, height, width = 8, 4, 20, 30
    transform = torch.tensor([[[width / 40, 0, (2 * left + width) / 40 - 1], [0, height / 40, (2 * top + height) / 40 - 1]]])
    ours = augmentation.resized_crop(pixels, transform)
    theirs = oracle.resized_crop(pixels, top, left, height, width, [40, 40], antialias=True)
    torch.testing.assert_close(ours[..., 2:-2, 2:-2], theirs[..., 2:-2, 2:-2], atol=1e-5, rtol=0)


def test_grey_and_solarised_images_are_torchvisions():
    pixels, all_of_them = images(4).float() / 255, torch.ones(4, dtype=torch.bool)
    grey = oracle.rgb_to_grayscale(pixels, num_output_channels=3)
    torch.testing.assert_close(colour.turn_grey(pixels, all_of_them), grey, atol=2e-4, rtol=0)
    torch.testing.assert_close(colour.solarise(pixels, all_of_them), oracle.solarize(pixels, 0.5))
    assert torch.equal(colour.solarise(pixels, ~all_of_them), pixels)


EVERYTHING = Augment(
    flip=True,
    area=0.3,
    randaugment=RandAugment(),
    jitter={},
    grey=0.3,
    blur=0.5,
    solarise=0.2,  # type: ignore[arg-type]
)


@pytest.mark.parametrize("field", ["area", "randaugment", "jitter", "grey", "blur", "solarise"])
def test_every_field_changes_the_views_and_draws_nothing_if_it_is_off(field):
    pixels = images(64).permute(0, 2, 3, 1)
    plain = Augment(crop=0)
    only = Augment(crop=0, **{field: getattr(EVERYTHING, field)})
    found = augmentation.random_views(pixels, only, augmentation.draw_views(64, only, drawn()))
    assert found.dtype == torch.uint8
    assert found.shape == pixels.shape
    changed = (found != pixels).flatten(1).any(1)
    assert int(changed.sum()) > 5
    assert augmentation.draw_views(64, plain, drawn()) == {}
    whole = augmentation.draw_views(64, EVERYTHING, drawn())
    assert torch.equal(
        augmentation.random_views(pixels, EVERYTHING, whole), augmentation.random_views(pixels, EVERYTHING, whole)
    )


def test_an_area_takes_the_place_of_the_padded_crop_and_both_are_refused():
    assert Augment(area=0.2).crop == 0
    assert Augment.model_validate(Augment(area=0.2).model_dump()) == Augment(area=0.2)
    with pytest.raises(ValueError, match="leave 'crop' out"):
        Augment(area=0.2, crop=2)


def test_mixup_is_torchvisions_with_the_same_partner_and_share():
    inputs, share = torch.randn(6, 3, 8, 8), 0.3
    draws = {
        "partner": torch.arange(6).roll(1),
        "share": torch.full((6,), share),
        "cut": torch.zeros(6, dtype=torch.bool),
        "centre": torch.rand(2, 6),
    }
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    theirs = v2.MixUp(num_classes=4)
    told = {"labels": labels, "batch_size": 6, "lam": share}
    mixed, kept = mixing.mix(inputs, draws)
    torch.testing.assert_close(mixed, theirs.transform(inputs, told))
    soft = theirs.transform(labels, told)
    logits = torch.randn(6, 4)
    loss, _ = classification.mixed_cross_entropy(
        logits, classification.mixed_targets(labels[:, None], draws["partner"], kept), [4]
    )
    torch.testing.assert_close(loss.float(), nn.functional.cross_entropy(logits, soft), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("share", "centre"), [(0.7, (0.5, 0.5)), (0.2, (0.1, 0.9)), (0.95, (0.0, 0.0))])
def test_cutmix_is_torchvisions_with_the_same_box(share, centre):
    inputs, side = torch.randn(4, 3, 16, 16), 16
    draws = {
        "partner": torch.arange(4).roll(1),
        "share": torch.full((4,), share),
        "cut": torch.ones(4, dtype=torch.bool),
        "centre": torch.tensor(centre)[:, None].expand(2, 4),
    }
    half = int(0.5 * math.sqrt(1 - share) * side)
    y, x = (int(each * side) for each in centre)
    box = (max(0, x - half), max(0, y - half), min(side, x + half), min(side, y + half))
    area = (box[2] - box[0]) * (box[3] - box[1])
    theirs = v2.CutMix(num_classes=4).transform(inputs, {"labels": torch.arange(4), "batch_size": 4, "box": box})
    mixed, kept = mixing.mix(inputs, draws)
    assert torch.equal(mixed, theirs)
    assert kept.tolist() == pytest.approx([1 - area / side**2] * 4)


def test_mixing_draws_shares_from_the_beta_distribution_and_both_ways_with_equal_chances():
    draws = mixing.draw_mixing(4000, Augment(mixup=0.4, cutmix=1.0), drawn())
    cut, share = draws["cut"], draws["share"]
    assert 1800 < int(cut.sum()) < 2200
    assert float(share[cut].var()) == pytest.approx(1 / 12, rel=0.1)  # Beta(1, 1)
    assert float(share[~cut].var()) == pytest.approx(0.25 / (2 * 0.4 + 1), rel=0.1)  # Beta(0.4, 0.4)
    assert torch.equal(draws["partner"].sort().values, torch.arange(4000))
    assert mixing.draw_mixing(5, Augment(), drawn()) == {}


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_targets_of_several_heads_weigh_as_soft_labels_and_missing_ones_nothing(smoothing):
    heads = [Labels(np.array([0, 1, 2, 1]), 3), Labels(np.array([1, -1, 0, 1]), 2)]
    task = classification.joint_task(heads, Augment(crop=0, mixup=1.0), smoothing)
    pixels = images(4).permute(0, 2, 3, 1).contiguous()
    generator = drawn(3)
    draws = task.draw(torch.arange(4), generator)
    _, targets = task.batch(pixels, torch.arange(4), draws)
    logits = torch.randn(4, 5)
    loss, _ = task.loss(logits, targets)
    share, partner = draws["mixture"]["share"], draws["mixture"]["partner"]
    expected = []
    for head, part in zip(heads, logits.split([3, 2], dim=1), strict=True):
        total = weight = 0.0
        for index in range(4):
            for which, own in ((index, share[index]), (int(partner[index]), 1 - share[index])):
                if head.of_image[which] >= 0:
                    wanted = torch.tensor([head.of_image[which]])
                    each = nn.functional.cross_entropy(part[index : index + 1], wanted, label_smoothing=smoothing)
                    total, weight = total + float(own * each), weight + float(own)
        expected.append(total / weight)
    assert float(loss) == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_label_smoothing_is_torchs_for_one_head_and_for_several():
    logits, wanted = torch.randn(8, 7), torch.randint(0, 3, (8, 2), generator=drawn())
    wanted[3, 1] = -1
    one_head, _ = classification.cross_entropy(logits, wanted[:, 0], 0.2)
    torch.testing.assert_close(one_head, nn.functional.cross_entropy(logits, wanted[:, 0], label_smoothing=0.2))
    both, _ = classification.joint_cross_entropy(logits, wanted, [3, 4], 0.2)
    each = [
        nn.functional.cross_entropy(part, target, label_smoothing=0.2, ignore_index=-1)
        for part, target in zip(logits.split([3, 4], dim=1), wanted.unbind(1), strict=True)
    ]
    torch.testing.assert_close(both, torch.stack(each).mean())


def test_batches_of_strong_views_are_a_function_of_the_generator():
    strong = EVERYTHING.model_copy(update={"mixup": 0.2, "cutmix": 1.0})
    task = classification.joint_task([Labels(np.arange(8) % 3, 3)], strong)
    pixels = images(8).permute(0, 2, 3, 1).contiguous()
    (first, wanted), (again, same), (other, _) = (make_batch(task, pixels, torch.arange(8), drawn(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert torch.equal(wanted, same)
    assert not torch.equal(first, other)


@pytest.mark.gpu
def test_a_gpu_makes_the_views_of_a_cpu_and_replays_them_in_a_graph():
    pixels, strong = images(64, 32, 32).permute(0, 2, 3, 1).contiguous(), EVERYTHING
    draws = augmentation.draw_views(64, strong, drawn())
    on_gpu = map_draws(lambda tensor: tensor.cuda(), draws)
    expected = augmentation.random_views(pixels, strong, draws)
    found = augmentation.random_views(pixels.cuda(), strong, on_gpu)
    off = (found.cpu().int() - expected.int()).abs()
    assert float((off > 1).float().mean()) < 0.01  # bilinear sampling rounds differently, and an edge may flip
    only = Augment(crop=0, randaugment=RandAugment(magnitude=20))
    few = augmentation.draw_views(64, only, drawn())
    expected = augmentation.random_views(pixels, only, few)
    assert torch.equal(
        augmentation.random_views(pixels.cuda(), only, map_draws(lambda tensor: tensor.cuda(), few)).cpu(), expected
    )
