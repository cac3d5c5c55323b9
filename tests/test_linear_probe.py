"""The linear probe is the optimum that scikit-learn finds, whatever the blocks, the scales and the labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ktray.evals import linear_probe
from tests.judging import blobs, images, judge

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 2e-4), ("float32", 5e-3)])
def test_the_linear_probe_reaches_the_optimum_of_scikit_learn(precision, tolerance):
    rows, labels = blobs(400)
    l2 = 1e-2
    scaled = StandardScaler().fit_transform(rows.astype(np.float64))
    oracle = LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-10, max_iter=5000).fit(scaled, labels)
    given = linear_probe.standardise(rows, *linear_probe.moments(rows), getattr(torch, precision))
    weight, bias = linear_probe.fit(given, labels, 4, l2=l2, iterations=500)
    np.testing.assert_allclose(weight.double().numpy().T, oracle.coef_, atol=tolerance)
    np.testing.assert_allclose(bias.double().numpy() - bias.double().mean().item(), oracle.intercept_, atol=tolerance)


def test_the_linear_probe_scores_as_scikit_learn_does(tmp_path):
    (rows, labels), (others, truth) = blobs(400), blobs(300, seed=1)
    metrics = judge("linear_probe", tmp_path, rows, others, labels, truth, l2=1e-2, precision="float64")
    scaler = StandardScaler().fit(rows.astype(np.float64))
    oracle = LogisticRegression(C=1 / (1e-2 * len(rows)), tol=1e-10, max_iter=5000).fit(scaler.transform(rows), labels)
    shares = oracle.predict_log_proba(scaler.transform(others.astype(np.float64)))
    assert metrics["top1"] == pytest.approx(oracle.score(scaler.transform(others), truth), abs=1e-9)
    assert metrics["loss"] == pytest.approx(-shares[np.arange(len(truth)), truth].mean(), abs=1e-4)


def test_the_penalty_of_the_linear_probe_is_per_sample():
    rows, labels = blobs(100)
    once = linear_probe.standardise(rows, *linear_probe.moments(rows), torch.float64)
    weight, _ = linear_probe.fit(once, labels, 4, l2=1e-2, iterations=500)
    doubled, _ = linear_probe.fit(torch.cat([once, once]), np.tile(labels, 2), 4, l2=1e-2, iterations=500)
    np.testing.assert_allclose(weight.numpy(), doubled.numpy(), atol=1e-4)


def test_the_gradient_of_the_linear_probe_does_not_depend_on_the_blocks(monkeypatch):
    rows, labels = blobs(50)
    given = linear_probe.standardise(rows, *linear_probe.moments(rows), torch.float64)
    flat = np.random.default_rng(0).normal(size=13 * 4)
    loss, gradient = linear_probe._loss_and_gradient(flat, given, torch.from_numpy(labels), 4, 0.1)
    monkeypatch.setattr(linear_probe, "BLOCK", 7)
    in_blocks, gradient_in_blocks = linear_probe._loss_and_gradient(flat, given, torch.from_numpy(labels), 4, 0.1)
    assert in_blocks == pytest.approx(loss, rel=1e-12)
    np.testing.assert_allclose(gradient_in_blocks, gradient, rtol=1e-10, atol=1e-14)


def test_the_linear_probe_is_deterministic(tmp_path):
    (rows, labels), (others, truth) = blobs(200), blobs(100, seed=1)
    first = judge("linear_probe", tmp_path, rows, others, labels, truth)
    plot = (tmp_path / "confusion.png").read_bytes()
    assert judge("linear_probe", tmp_path, rows, others, labels, truth) == first
    assert (tmp_path / "confusion.png").read_bytes() == plot


def test_a_constant_feature_does_not_disturb_the_linear_probe(tmp_path):
    (rows, labels), (others, truth) = blobs(200), blobs(100, seed=1)
    before = judge("linear_probe", tmp_path, rows, others, labels, truth, precision="float64")
    constant = np.full((200, 1), 0.1, np.float32)
    other = np.full((100, 1), 0.1, np.float32)
    after = judge(
        "linear_probe", tmp_path, np.hstack([rows, constant]), np.hstack([others, other]), labels, truth, precision="float64"
    )
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)


def test_a_class_without_training_images_costs_accuracy_but_does_not_crash(tmp_path):
    (rows, labels), (others, truth) = blobs(200, classes=3), blobs(100, seed=1)
    metrics = judge("linear_probe", tmp_path, rows, others, labels, truth)
    assert 0 < metrics["top1"] <= (truth < 3).mean()
    assert math.isfinite(metrics["loss"])


def test_a_probe_with_few_labels_uses_that_many_of_each_class_and_more_are_better(tmp_path):
    (rows, labels), (others, truth) = blobs(400, spread=2.5), blobs(400, seed=1, spread=2.5)
    found = {n: linear_probe.subset_per_class(labels, n, seed=0) for n in (1, 10, 1000)}
    assert np.bincount(labels[found[10]]).tolist() == [10] * len(np.unique(labels))
    assert set(found[1]) < set(found[10]) < set(found[1000]) == set(range(400))
    tops = [judge("linear_probe", tmp_path, rows, others, labels, truth, per_class=n)["top1"] for n in (1, 10, None)]
    assert tops[0] < tops[1] < tops[2]
    assert linear_probe.subset_per_class(labels, 1, seed=1).tolist() != found[1].tolist()


def test_the_confusion_plot_names_the_classes(tmp_path):
    (rows, labels), (others, truth) = blobs(100), blobs(50, seed=1)
    names = ("cat", "dog", "eel", "fox")
    linear_probe.evaluate(
        linear_probe.Spec(),
        features=lambda given: rows if given.count == 100 else others,
        train=images(100, labels, names),
        judged=images(50, truth, names),
        pseudo_labels=None,
        out=tmp_path,
        device="cpu",
    )
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG")
