"""Corruptions do what their names say, whatever the batch; cost counts operations as torchvision publishes them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from ktray.evals import cost, robustness
from ktray.images import Images
from ktray.ops import corruptions
from ktray.scoring import per_image
from tests.judging import judge

pytestmark = pytest.mark.usefixtures("one_thread")


def pictures(count, size, seed=0):
    """Smooth coloured images, (B, size, size, 3) uint8."""
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic").clamp(0.1, 0.9)
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("kind", corruptions.KINDS)
@pytest.mark.parametrize("size", [28, 72])
def test_a_higher_severity_changes_an_image_more_and_a_batch_changes_nothing(kind, size):
    images = pictures(4, size)
    changes = []
    for severity in (1, 5):
        together = corruptions.corrupt(images, kind, severity, [0, 1, 2, 3])
        alone = corruptions.corrupt(images[2:3], kind, severity, [2])
        assert together.shape == images.shape
        assert together.dtype == torch.uint8
        assert torch.equal(together[2:3], alone)
        changes.append(float((together.float() - images.float()).square().mean()))
    if kind != "saturate":  # its severities first take colour out, and later add it
        assert 0 < changes[0] < changes[1]


def test_noise_has_the_published_deviation_and_brightness_keeps_the_hue():
    grey = torch.full((1, 64, 64, 3), 128, dtype=torch.uint8)
    noisy = corruptions.corrupt(grey, "gaussian_noise", 3, [0]).double() / 255
    assert float(noisy.std()) == pytest.approx(0.08, rel=0.03)
    shot = corruptions.corrupt(grey, "shot_noise", 1, [0]).double() / 255
    assert float(shot.var()) == pytest.approx(128 / 255 / 500, rel=0.05)  # of a Poisson variable over its rate
    dark = torch.tensor([60, 30, 90], dtype=torch.uint8).expand(1, 8, 8, 3).contiguous()
    bright = corruptions.corrupt(dark, "brightness", 5, [0])[0, 0, 0].double()
    assert bright.max() == pytest.approx(90 + 0.3 * 255, abs=1)
    assert (bright / bright.max()).tolist() == pytest.approx([60 / 90, 30 / 90, 1], abs=0.01)


def test_a_blur_keeps_the_mean_and_a_pixelated_image_has_fewer_values():
    images = pictures(1, 48)
    for kind in ("gaussian_blur", "defocus_blur", "motion_blur"):
        blurred = corruptions.corrupt(images, kind, 5, [0]).double()
        assert float(blurred.mean()) == pytest.approx(float(images.double().mean()), rel=0.03), kind
    columns = corruptions.corrupt(images, "pixelate", 5, [0])[0, 0].unique(dim=0)
    assert len(columns) <= int(48 * 0.65)


@pytest.mark.parametrize("classifier", ["knn", "linear"])
def test_accuracy_falls_where_features_are_the_pixels_themselves(classifier, tmp_path):
    random = np.random.default_rng(0)
    labels = np.arange(60) % 3
    pixels = np.clip(pictures(3, 16).numpy()[labels] + random.integers(-30, 30, (60, 16, 16, 3)), 0, 255).astype(np.uint8)
    images = Images(60, 16, lambda rows: pixels[rows], labels.astype(np.int64), ("a", "b", "c"))

    def features(given):
        return given.read(np.arange(len(given))).reshape(len(given), -1).astype(np.float32)

    spec = robustness.Spec(corruptions=("gaussian_noise", "contrast"), severities=(1, 5), images=30, classifier=classifier)
    metrics = robustness.evaluate(
        spec, features=features, train=images, judged=images, pseudo_labels=None, out=tmp_path, device="cpu"
    )
    assert set(metrics) >= set(robustness.directions(spec))
    assert metrics["clean_top1"] == 1
    assert metrics["top1"] == pytest.approx((metrics["top1_gaussian_noise"] + metrics["top1_contrast"]) / 2)
    assert metrics["relative"] == pytest.approx(metrics["top1"] / metrics["clean_top1"])
    saved = per_image.read(tmp_path / per_image.FILE)
    assert len(saved.names) == 30
    assert robustness.recompute(saved.columns, np.arange(30)) == metrics


def test_an_unknown_corruption_is_refused():
    with pytest.raises(ValueError, match="there is no corruption 'rain'"):
        robustness.Spec(corruptions=("rain",))


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "mobilenet_v3_small", "vgg11", "convnext_tiny"])
def test_operations_are_those_that_torchvision_publishes(name):
    import torchvision

    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    with torch.device("meta"):
        model = torchvision.models.get_model(name).eval()
    crop = {"convnext_tiny": 224}.get(name, 224)
    assert cost.gflops(model, crop) == pytest.approx(published["_ops"], abs=6e-4)


def test_cost_has_counts_times_and_spreads_and_says_that_it_depends_on_the_machine(tmp_path):
    metrics = judge("cost", tmp_path, np.zeros((2, 1), np.float32), np.zeros((2, 1), np.float32), repetitions=3)
    assert set(metrics) <= set(cost.directions(cost.Spec()))
    assert metrics["latency_ms"] == metrics["cpu_latency_ms"] > 0
    assert metrics["images_per_s"] == metrics["cpu_images_per_s"] > 0
    assert metrics["onnx_cpu_latency_ms"] > 0
    assert metrics["parameters"] * 4 / 1e6 == pytest.approx(metrics["file_mb"], rel=0.05)
    assert json.loads((tmp_path / "cost.json").read_text())["depends_on_machine"] is True
