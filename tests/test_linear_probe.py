"""The linear probe is the optimum that scikit-learn finds, whatever the blocks, the scales and the labels."""

from __future__ import annotations

import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ktray.classifiers import linear_classifiers
from ktray.evals import linear_probe
from tests.judging import blobs, images, judge

pytestmark = pytest.mark.usefixtures("one_thread")


def standardised(rows, dtype=torch.float64):
    given = linear_classifiers.on_device(rows, "cpu")
    return linear_classifiers.scaling_of(given).apply(given, dtype)


@pytest.mark.parametrize(("precision", "tolerance"), [("float64", 1e-3), ("float32", 5e-3)])
def test_logistic_regressions_reach_the_optima_of_scikit_learn_under_all_penalties_at_once(precision, tolerance):
    rows, labels = blobs(400)
    penalties = (1e-1, 1e-3, 1e-2)
    given = standardised(rows, getattr(torch, precision))
    found = linear_classifiers.logistic_regressions(
        given, torch.from_numpy(labels), 4, penalties, iterations=500, tolerance=1e-8
    )
    assert found.converged == (True, True, True)
    for index, l2 in enumerate(penalties):
        oracle = LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-10, max_iter=5000)
        oracle.fit(StandardScaler().fit_transform(rows.astype(np.float64)), labels)
        biases = found.biases[index] - found.biases[index].mean()
        np.testing.assert_allclose(found.weights[index].numpy().T, oracle.coef_, atol=tolerance)
        np.testing.assert_allclose(biases.numpy(), oracle.intercept_, atol=tolerance)


@pytest.mark.parametrize("how", ["one penalty at a time", "small blocks", "no preconditioning"])
def test_how_a_fit_is_cut_and_preconditioned_does_not_change_its_optimum(how, monkeypatch):
    rows, labels = blobs(200)
    given, targets, penalties = standardised(rows), torch.from_numpy(labels), (1e-1, 1e-2, 1e-3)
    fit = partial(linear_classifiers.logistic_regressions, given, targets, 4, penalties, iterations=2000, tolerance=1e-11)
    whole = fit()
    name, value = {
        "one penalty at a time": ("COLUMNS", 4),
        "small blocks": ("SCORES", 1),
        "no preconditioning": ("MAX_WIDTH", 3),
    }[how]
    monkeypatch.setattr(linear_classifiers, name, value)
    np.testing.assert_allclose(fit().weights.numpy(), whole.weights.numpy(), atol=2e-4)


@pytest.mark.parametrize(("count", "width", "rank"), [(48, 1152, 48), (200, 1500, 3), (64, 512, 1)])
def test_fewer_images_than_features_are_no_obstacle(count, width, rank):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, rank, generator=generator) @ torch.randn(rank, width, generator=generator)
    labels = torch.arange(count) % 4
    found = linear_classifiers.logistic_regressions(rows, labels, 4, (1e-2, 1.0), iterations=500)
    assert found.converged == (True, True)
    for index, penalty in enumerate((1e-2, 1.0)):
        other = LogisticRegression(C=1 / (penalty * count), tol=1e-8, max_iter=5000).fit(rows.double().numpy(), labels.numpy())
        agree = found.scores(rows, index).argmax(1).numpy() == other.predict(rows.double().numpy())
        assert agree.mean() > 0.98


def test_the_chosen_penalty_is_the_best_of_scikit_learn_s_grid(tmp_path):
    (rows, labels), (others, truth) = blobs(300, spread=3.0, width=40), blobs(300, seed=1, spread=3.0, width=40)
    grid = [1e-4, 1e-2, 1e-1, 1.0]
    judge("linear_probe", tmp_path, rows, others, labels, truth, precision="float64", held_out=0.3, l2=grid)
    chosen = json.loads((tmp_path / "penalties.json").read_text())
    scaled = StandardScaler().fit_transform(rows.astype(np.float64))
    held = linear_classifiers.held_out_rows(labels, 0.3, 0)
    assert chosen["held_out"] == held.sum() == pytest.approx(90, abs=4)
    scores = {}
    for tried in chosen["tried"]:
        oracle = LogisticRegression(C=1 / (tried["l2"] * (~held).sum()), tol=1e-6, max_iter=5000)
        scores[tried["l2"]] = oracle.fit(scaled[~held], labels[~held]).score(scaled[held], labels[held])
        assert tried["top1"] == pytest.approx(scores[tried["l2"]], abs=0.012)  # one image of 90
    assert scores[chosen["l2"]] >= max(scores.values()) - 0.012


def test_the_grid_of_dinov2_is_its_45_values_of_c(tmp_path):
    tried = linear_probe.penalties(linear_probe.Spec(l2="dinov2"), 1000)
    np.testing.assert_allclose([1 / (1000 * l2) for l2 in tried], np.logspace(-6, 5, 45))


def test_penalties_cannot_be_chosen_where_no_image_can_be_held_out(tmp_path):
    rows, labels = np.eye(4, dtype=np.float32), np.arange(4)
    with pytest.raises(ValueError, match="none can be held out"):
        judge("linear_probe", tmp_path, rows, rows, labels, labels)
    assert judge("linear_probe", tmp_path, rows, rows, labels, labels, l2=1e-3)["top1"] == 1


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
    once = standardised(rows)
    fit = partial(linear_classifiers.logistic_regressions, classes=4, penalties=[1e-2], iterations=500, tolerance=1e-9)
    weights = fit(once, torch.from_numpy(labels)).weights
    doubled = fit(torch.cat([once, once]), torch.from_numpy(np.tile(labels, 2))).weights
    np.testing.assert_allclose(weights.numpy(), doubled.numpy(), atol=1e-4)


def test_the_linear_probe_is_deterministic(tmp_path):
    (rows, labels), (others, truth) = blobs(200), blobs(100, seed=1)
    first = judge("linear_probe", tmp_path, rows, others, labels, truth)
    plot = (tmp_path / "confusion.png").read_bytes()
    assert judge("linear_probe", tmp_path, rows, others, labels, truth) == first
    assert (tmp_path / "confusion.png").read_bytes() == plot


def test_a_constant_feature_does_not_disturb_the_linear_probe(tmp_path):
    (rows, labels), (others, truth) = blobs(200), blobs(100, seed=1)
    before = judge("linear_probe", tmp_path, rows, others, labels, truth, precision="float64", l2=1e-2)
    constant = np.full((200, 1), 0.1, np.float32)
    other = np.full((100, 1), 0.1, np.float32)
    after = judge(
        "linear_probe",
        tmp_path,
        np.hstack([rows, constant]),
        np.hstack([others, other]),
        labels,
        truth,
        precision="float64",
        l2=1e-2,
    )
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-5)


def test_a_class_without_training_images_costs_accuracy_but_does_not_crash(tmp_path):
    (rows, labels), (others, truth) = blobs(200, classes=3), blobs(100, seed=1)
    metrics = judge("linear_probe", tmp_path, rows, others, labels, truth)
    assert 0 < metrics["top1"] <= (truth < 3).mean()
    assert math.isfinite(metrics["loss"])


def test_a_probe_with_few_labels_uses_that_many_of_each_class_and_more_are_better(tmp_path):
    (rows, labels), (others, truth) = blobs(400, spread=2.5), blobs(400, seed=1, spread=2.5)
    found = {n: linear_classifiers.subset_per_class(labels, n, seed=0) for n in (1, 10, 1000)}
    assert np.bincount(labels[found[10]]).tolist() == [10] * len(np.unique(labels))
    assert set(found[1]) < set(found[10]) < set(found[1000]) == set(range(400))
    tops = [judge("linear_probe", tmp_path, rows, others, labels, truth, per_class=n, l2=1e-3)["top1"] for n in (1, 10, None)]
    assert tops[0] < tops[1] < tops[2]
    assert linear_classifiers.subset_per_class(labels, 1, seed=1).tolist() != found[1].tolist()


def test_one_label_per_class_leaves_none_to_choose_a_penalty_on():
    for several in ("path", "dinov2", (0.1, 0.01)):
        with pytest.raises(ValueError, match="give one"):
            linear_probe.Spec(per_class=1, l2=several)
    assert linear_probe.Spec(per_class=1, l2=(0.1,)).per_class == 1


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
