"""Judges of images with several labels and with masks agree with scikit-learn and with the devkit's rules."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC
from torch import nn

from ktray import plugins
from ktray.checkpoints import Attempt
from ktray.errors import UserError
from ktray.evals import dense_knn, voc07_cls
from ktray.images import VOID, Images, WholeImages, fit, fit_mask
from ktray.scoring import per_image
from tests.judging import _network

pytestmark = pytest.mark.usefixtures("one_thread")


def several_labels(count, seed, classes=5, width=20):
    """(features (N, D), presence (N, C)) where each image shows some classes, and some are difficult."""
    random = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(classes, width))
    shown = random.random((count, classes)) < 0.3
    rows = shown @ centres + 1.5 * random.normal(size=(count, width))
    presence = np.where(shown, 1, -1).astype(np.int8)
    presence[random.random((count, classes)) < 0.05] = 0
    return rows.astype(np.float32), presence


def labelled(count, presence):
    def read(_):
        raise AssertionError("an evaluation read pixels")

    return Images(count, 8, read, classes=tuple("abcde"[: presence.shape[1]]), presence=presence)


def judge_voc(out, train, judged, **fields):
    (rows, presence), (queries, truth) = train, judged
    first, second = labelled(len(rows), presence), labelled(len(queries), truth)
    return voc07_cls.evaluate(
        voc07_cls.Spec(**fields),
        features=lambda images: rows if images is first else queries,
        train=first,
        judged=second,
        pseudo_labels=None,
        out=out,
        device="cpu",
    )


def eleven_points(scores, presence):
    """The devkit's VOCevalcls of 2007, image by image."""
    pairs = sorted(((-s, i) for i, s in enumerate(scores) if presence[i] != 0))
    found, curve, total = 0, [], sum(value == 1 for value in presence)
    for rank, (_, index) in enumerate(pairs, start=1):
        found += presence[index] == 1
        curve.append((found / total, found / rank))
    steps = [0, 0.1, 0.2, 0.1 * 3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    return sum(max([p for r, p in curve if r >= step], default=0) for step in steps) / 11


@pytest.mark.parametrize("classifier", ["svm", "logistic"])
def test_mean_ap_of_one_cost_is_that_of_scikit_learn_s_classifiers(classifier, tmp_path):
    (rows, presence), (queries, truth) = train, judged = several_labels(250, 0), several_labels(200, 1)
    metrics = judge_voc(tmp_path, train, judged, costs=[5.0], classifier=classifier)
    unit = [each.astype(np.float64) / np.linalg.norm(each, axis=1, keepdims=True) for each in (rows, queries)]
    aps = []
    for of in range(5):
        used = presence[:, of] != 0
        weight = {1: 2, -1: 1}
        if classifier == "svm":
            oracle = LinearSVC(C=5.0, class_weight=weight, dual=False, tol=1e-8, max_iter=20000)
        else:
            oracle = LogisticRegression(C=5.0, class_weight=weight, solver="liblinear", tol=1e-8, max_iter=20000)
        oracle.fit(unit[0][used], presence[used, of])
        aps.append(eleven_points(oracle.decision_function(unit[1]), truth[:, of]))
    assert metrics["map"] == pytest.approx(np.mean(aps), abs=1e-3)  # 0.1 mAP
    saved = per_image.read(tmp_path / per_image.FILE)
    again = [eleven_points(saved.columns["scores"][:, of], saved.columns["presence"][:, of]) for of in range(5)]
    assert metrics["map"] == pytest.approx(np.mean(again), abs=1e-12)
    assert voc07_cls.recompute(saved.columns, np.arange(200)) == pytest.approx(metrics, abs=1e-12)


def test_each_class_gets_a_cost_of_the_grid_and_one_without_positives_is_left_out_by_name(tmp_path):
    (rows, presence), judged = several_labels(150, 0), several_labels(100, 1)
    presence[:, 2] = np.where(presence[:, 2] == 1, 0, presence[:, 2])
    metrics = judge_voc(tmp_path, (rows, presence), judged, costs=[0.01, 1.0, 100.0])
    found = json.loads((tmp_path / "classes.json").read_text())
    assert found["left_out"] == ["c"]
    assert {each["cost"] for each in found["classes"].values()} <= {0.01, 1.0, 100.0}
    assert metrics["map"] == pytest.approx(np.mean([each["ap"] for each in found["classes"].values()]))


def test_presence_that_says_nothing_is_refused(tmp_path):
    rows, presence = several_labels(20, 0)
    with pytest.raises(ValueError, match="no class has"):
        judge_voc(tmp_path, (rows, np.full_like(presence, -1)), (rows, presence))


def masked(count, seed, size=16, side=24):
    """Images of one bright quarter on black, with its mask: class 1 or 2 by colour, a void frame around all."""
    random = np.random.default_rng(seed)
    pixels, masks = np.zeros((count, side, side, 3), np.uint8), np.zeros((count, side, side), np.uint8)
    for index in range(count):
        of, row, column = random.integers(2), 12 * random.integers(2), 12 * random.integers(2)
        pixels[index, row : row + 12, column : column + 12, of] = 255
        masks[index, row : row + 12, column : column + 12] = 1 + of
    masks[:, 0] = VOID
    squares = np.stack([fit(each, size) for each in pixels])
    whole = WholeImages(lambda index, longest: pixels[index], mask=lambda index: masks[index])
    return Images(count, size, lambda rows: squares[rows], classes=("red", "green"), whole=lambda: whole), masks


def judge_dense(out, train, judged, **fields):
    def features(images, views):
        (_, pool) = views[0]
        pixels = images.read(np.arange(len(images))).astype(np.float32) + 1
        cells = pixels.reshape(len(images), pool.grid, images.size // pool.grid, pool.grid, images.size // pool.grid, 3)
        return [cells.mean((2, 4)).transpose(0, 3, 1, 2).reshape(len(images), -1)]

    return dense_knn.evaluate(
        dense_knn.Spec(**fields),
        features=lambda images: None,
        train=train,
        judged=judged,
        pseudo_labels=None,
        out=out,
        device="cpu",
        network=_network(features, "cpu"),
        attempt=Attempt(None, 0, lambda step, write: None, lambda values: None),
    )


def test_patches_whose_colour_is_their_class_are_segmented_by_it(tmp_path):
    (train, _), (judged, masks) = masked(20, 0), masked(10, 1)
    metrics = judge_dense(tmp_path, train, judged, grid=16, k=1)
    found = per_image.read(tmp_path / per_image.FILE).columns["pixels"].sum(0).reshape(3, 3)
    fitted = np.stack([fit_mask(mask, 16) for mask in masks])
    np.testing.assert_array_equal(found.sum(1), [(fitted == of).sum() for of in range(3)])  # void is in no row
    right = np.diag(found)
    assert metrics["miou"] == pytest.approx((right / (found.sum(0) + found.sum(1) - right)).mean(), abs=1e-12)
    assert metrics["miou"] > 0.9
    assert judge_dense(tmp_path, train, judged, grid=2, k=1)["miou"] < metrics["miou"]


def test_images_without_masks_are_refused_by_dense_neighbours(tmp_path):
    images, _ = masked(4, 0)
    with pytest.raises(ValueError, match="masks"):
        judge_dense(tmp_path, images, replace(images, whole=None))


@pytest.mark.parametrize("shape", [(24, 24), (30, 17), (9, 40)])
def test_a_mask_is_fitted_to_a_square_as_its_image_is(shape):
    colours = np.random.default_rng(0).integers(0, 2, shape).astype(np.uint8)
    size = min(shape)  # then no pixel is interpolated along the shorter side
    image = fit(np.repeat(colours[:, :, None] * 255, 3, 2), size)[:, :, 0]
    if (max(shape) - size) % 2 == 0:
        np.testing.assert_array_equal(fit_mask(colours, size) * 255, image)
    else:
        assert fit_mask(colours, size).shape == image.shape


def test_plan_refuses_data_without_masks_or_several_labels():
    from ktray.pipeline.pair_check import check_pair, data_loader
    from tests.toys import toy_pair

    for kind, what in (("dense_knn", "masks"), ("voc07_cls", "several labels")):
        with pytest.raises(UserError, match=f"needs {what}"):
            check_pair(toy_pair(evals=[{"kind": kind}]), data_loader())
    assert plugins.module("evaluation", "voc07_cls").NEEDS_ANNOTATIONS == ("presence",)


@pytest.mark.parametrize(
    ("fields", "message"), [({"layer": "fc"}, "makes no maps"), ({"layer": "conv", "grid": 15}, "At most 14")]
)
def test_plan_refuses_layers_without_maps_and_grids_that_are_finer_than_the_maps(fields, message):
    class Network(nn.Module):
        layers = ("conv", "fc")

        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 2, 3), nn.Linear(2, 4)

        def forward(self, images):
            return self.fc(self.conv(images).mean((2, 3)))

    with pytest.raises(UserError, match=message):
        dense_knn.check_network(dense_knn.Spec(**fields), Network(), 16)
