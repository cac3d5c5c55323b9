"""Evaluations agree with scikit-learn and plain linear algebra, and never return a NaN."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from ktray import plugins
from ktray.errors import UserError
from ktray.evals import cluster_quality, effective_rank, knn, linear_probe
from ktray.images import Images

KINDS = plugins.kinds("evaluation")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(count: int, labels: NDArray[np.int64] | None = None, classes: tuple[str, ...] = ()) -> Images:
    """Images whose pixels nobody may look at: evaluations see features."""

    def read(_: NDArray[np.int64]) -> NDArray[np.uint8]:
        raise AssertionError("an evaluation read pixels")

    return Images(count=count, size=8, read=read, labels=labels, classes=classes)


def blobs(count: int, seed: int = 0, classes: int = 4, width: int = 12, spread: float = 2.0):
    """(features (N, D) float32, labels (N,)) of overlapping classes, with features of very different scales."""
    centres = np.random.default_rng(99).normal(size=(classes, width))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    rows = (centres[labels] + spread * rng.normal(size=(count, width))) * 10.0 ** np.linspace(-2, 2, width) + 3
    return rows.astype(np.float32), labels.astype(np.int64)


def judge(
    kind: str, tmp_path: Path, train, judged, train_labels=None, judged_labels=None, pseudo_labels=None, device="cpu", **fields
):
    """The metrics of an evaluation whose features are the given arrays."""
    module = plugins.module("evaluation", kind)
    of_train, of_judged = images(len(train), train_labels), images(len(judged), judged_labels)
    by_images = {id(of_train): train, id(of_judged): judged}
    return module.evaluate(
        module.Spec(**fields),
        features=lambda given: by_images[id(given)],
        train=of_train,
        judged=of_judged,
        pseudo_labels=pseudo_labels,
        out=tmp_path,
        device=device,
    )


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


def test_a_class_that_is_only_judged_costs_accuracy_and_no_crash(tmp_path):
    (rows, labels), (others, truth) = blobs(200, classes=3), blobs(100, seed=1)
    metrics = judge("linear_probe", tmp_path, rows, others, labels, truth)
    assert 0 < metrics["top1"] <= (truth < 3).mean()
    assert math.isfinite(metrics["loss"])


def test_a_probe_with_few_labels_learns_from_so_many_of_each_class_and_more_are_better(tmp_path):
    (rows, labels), (others, truth) = blobs(400, spread=2.5), blobs(400, seed=1, spread=2.5)
    found = {n: linear_probe.few(labels, n, seed=0) for n in (1, 10, 1000)}
    assert np.bincount(labels[found[10]]).tolist() == [10] * len(np.unique(labels))
    assert set(found[1]) < set(found[10]) < set(found[1000]) == set(range(400))
    tops = [judge("linear_probe", tmp_path, rows, others, labels, truth, per_class=n)["top1"] for n in (1, 10, None)]
    assert tops[0] < tops[1] < tops[2]
    assert linear_probe.few(labels, 1, seed=1).tolist() != found[1].tolist()


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


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_with_equal_votes_agrees_with_scikit_learn(k):
    (rows, labels), (others, _) = blobs(300), blobs(200, seed=1)
    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(rows.astype(np.float64), labels)
    predicted = knn.predict(rows, labels, others, k=k, temperature=None)
    assert (predicted == oracle.predict(others.astype(np.float64))).mean() >= 0.995  # float32: a tie in cosine may fall apart


def test_knn_with_a_temperature_agrees_with_scikit_learn():
    (rows, labels), (others, _) = blobs(300), blobs(200, seed=1)
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    predicted = knn.predict(rows, labels, others, k=20, temperature=0.07)
    assert (predicted == oracle.fit(rows.astype(np.float64), labels).predict(others.astype(np.float64))).mean() >= 0.995


def test_knn_does_not_depend_on_the_chunks(monkeypatch):
    (rows, labels), (others, _) = blobs(300), blobs(200, seed=1)
    whole = knn.predict(rows, labels, others, k=20, temperature=0.07)
    monkeypatch.setattr(knn, "SIMILARITIES", 300 * 17)
    np.testing.assert_array_equal(knn.predict(rows, labels, others, k=20, temperature=0.07), whole)


def test_knn_sees_directions_and_not_lengths():
    (rows, labels), (others, _) = blobs(300), blobs(200, seed=1)
    lengths = np.random.default_rng(0).uniform(0.5, 2, (300, 1)).astype(np.float32)
    before = knn.predict(rows, labels, others, k=5, temperature=None)
    assert (knn.predict(rows * lengths, labels, others, k=5, temperature=None) == before).mean() >= 0.995


def test_a_tiny_temperature_is_the_nearest_neighbour_and_overflows_nothing():
    (rows, labels), (others, _) = blobs(300), blobs(200, seed=1)
    nearest = knn.predict(rows, labels, others, k=1, temperature=None)
    np.testing.assert_array_equal(knn.predict(rows, labels, others, k=20, temperature=1e-9), nearest)


def test_fewer_images_than_neighbours_all_vote():
    rows, labels = np.eye(3, dtype=np.float32), np.array([1, 1, 0])
    np.testing.assert_array_equal(knn.predict(rows, labels, rows, k=20, temperature=None), [1, 1, 1])


def test_knn_gives_top1(tmp_path):
    (rows, labels), (others, truth) = blobs(300), blobs(200, seed=1)
    predicted = knn.predict(rows, labels, others, k=20, temperature=0.07)
    assert judge("knn", tmp_path, rows, others, labels, truth) == {"top1": pytest.approx((predicted == truth).mean())}


def sizes_and_agreement(pseudo_labels, labels, tmp_path):
    nothing = np.zeros((len(pseudo_labels), 1), np.float32)
    return judge("cluster_quality", tmp_path, nothing, nothing[:0], labels, pseudo_labels=pseudo_labels)


@pytest.mark.parametrize("seed", range(5))
def test_nmi_agrees_with_scikit_learn(seed, tmp_path):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, 200)
    pseudo_labels = np.where(rng.random(200) < 0.6, labels * 2, rng.integers(0, 13, 200))
    metrics = sizes_and_agreement(pseudo_labels, labels, tmp_path)
    assert metrics["nmi"] == pytest.approx(normalized_mutual_info_score(labels, pseudo_labels), abs=1e-12)


@pytest.mark.parametrize("clusters", [[0] * 6, [0, 0, 1, 1, 2, 2], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("classes", [[0] * 6, [1, 1, 0, 0, 2, 2], [0, 1, 0, 1, 0, 1]])
def test_nmi_of_degenerate_partitions_agrees_with_scikit_learn(clusters, classes, tmp_path):
    clusters, classes = np.array(clusters), np.array(classes)
    metrics = sizes_and_agreement(clusters, classes, tmp_path)
    assert metrics["nmi"] == pytest.approx(normalized_mutual_info_score(classes, clusters), abs=1e-12)


def test_purity_is_the_share_of_the_majority_classes(tmp_path):
    metrics = sizes_and_agreement(np.array([0, 0, 0, 7, 7, 7, 7]), np.array([1, 1, 2, 0, 0, 0, 1]), tmp_path)
    assert metrics["purity"] == pytest.approx(5 / 7)
    assert (metrics["clusters"], metrics["smallest"]) == (2, 3)
    assert metrics["largest_share"] == pytest.approx(4 / 7)


def test_images_left_out_do_not_count(tmp_path):
    with_rest = sizes_and_agreement(np.array([0, 0, 1, -1, -1]), np.array([0, 0, 1, 0, 1]), tmp_path)
    assert with_rest == sizes_and_agreement(np.array([0, 0, 1]), np.array([0, 0, 1]), tmp_path)
    assert with_rest["nmi"] == pytest.approx(1)


@pytest.mark.parametrize("labels", [None, np.zeros(3, np.int64)])
def test_cluster_quality_without_a_kept_image_is_zero_and_not_nan(labels, tmp_path):
    metrics = sizes_and_agreement(np.full(3, -1), labels, tmp_path)
    assert set(metrics.values()) == {0.0}


def test_cluster_quality_without_labels_gives_only_sizes(tmp_path):
    assert set(sizes_and_agreement(np.array([0, 1]), None, tmp_path)) == {"clusters", "largest_share", "smallest"}


def test_cluster_quality_refuses_a_pair_without_pseudo_labels(tmp_path):
    with pytest.raises(UserError, match="makes none"):
        judge("cluster_quality", tmp_path, np.zeros((2, 1)), np.zeros((0, 1)))


def test_cluster_quality_refuses_pseudo_labels_of_other_images(tmp_path):
    with pytest.raises(ValueError, match="3 pseudo-labels do not belong to 2 images"):
        judge("cluster_quality", tmp_path, np.zeros((2, 1)), np.zeros((0, 1)), pseudo_labels=np.zeros(3, np.int64))


def test_cluster_quality_has_no_layer_and_no_pooling():
    with pytest.raises(ValueError, match="layer"):
        cluster_quality.Spec(layer="layer4")
    with pytest.raises(ValueError, match="reads pseudo-labels"):
        cluster_quality.Spec(pool={"grid": 2})


def test_effective_rank_is_the_entropy_of_the_singular_values():
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32) * np.linspace(0.1, 3, 8, dtype=np.float32)
    shares = np.linalg.svd(rows.astype(np.float64), compute_uv=False)
    shares /= shares.sum()
    assert effective_rank.effective_rank(rows) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-10)


def test_effective_rank_of_orthogonal_features_is_their_number():
    assert effective_rank.effective_rank(np.eye(6, dtype=np.float32)) == pytest.approx(6, rel=1e-10)


@pytest.mark.parametrize("rank", [1, 3])
def test_effective_rank_is_at_most_the_rank(rank):
    rng = np.random.default_rng(0)
    rows = rng.integers(-3, 4, (40, rank)).astype(np.float32) @ rng.integers(-3, 4, (rank, 30)).astype(np.float32)
    assert 1 - 1e-9 <= effective_rank.effective_rank(rows) <= rank + 1e-6


def test_effective_rank_is_invariant_to_scale_rotation_and_order():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 8)) * np.linspace(0.1, 3, 8)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    before = effective_rank.effective_rank(rows)
    for other in (rows * 100, rows @ rotation, rows[::-1], np.vstack([rows, rows])):
        assert effective_rank.effective_rank(np.ascontiguousarray(other)) == pytest.approx(before, rel=1e-9)


def test_effective_rank_needs_no_labels_and_falls_back_to_train(tmp_path):
    rows = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    judged = judge("effective_rank", tmp_path, np.eye(4, dtype=np.float32), rows)
    assert judged == {"rank": effective_rank.effective_rank(rows)}
    assert judge("effective_rank", tmp_path, rows, rows[:0]) == judged


def test_effective_rank_of_many_images_takes_an_even_part(tmp_path):
    rows = np.random.default_rng(0).normal(size=(101, 4)).astype(np.float32)
    metrics = judge("effective_rank", tmp_path, rows, rows, rows=11)
    assert metrics["rank"] == effective_rank.effective_rank(rows[::10])


def test_effective_rank_of_zeros_is_zero():
    assert effective_rank.effective_rank(np.zeros((5, 3), np.float32)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_has_a_direction_and_is_finite(kind, tmp_path):
    (rows, labels), (others, truth) = blobs(120), blobs(60, seed=1)
    metrics = judge(kind, tmp_path, rows, others, labels, truth, pseudo_labels=labels)
    assert set(metrics) == set(plugins.module("evaluation", kind).DIRECTION)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("kind", ["linear_probe", "knn"])
@pytest.mark.parametrize("missing", ["train", "judged", "images"])
def test_missing_labels_or_images_are_an_error_and_not_a_nan(kind, missing, tmp_path):
    (rows, labels), (others, truth) = blobs(50), blobs(20, seed=1)
    given = {
        "train": (rows, others, None, truth),
        "judged": (rows, others, labels, None),
        "images": (rows, others[:0], labels, truth[:0]),
    }
    with pytest.raises(ValueError, match="label"):
        judge(kind, tmp_path, *given[missing])


@pytest.mark.parametrize("kind", ["linear_probe", "knn", "effective_rank"])
@pytest.mark.parametrize("where", ["train", "judged"])
def test_features_that_are_not_finite_are_an_error(kind, where, tmp_path):
    (rows, labels), (others, truth) = blobs(50), blobs(20, seed=1)
    if kind == "effective_rank" and where == "train":
        others = others[:0]
    (rows if where == "train" else others)[3, 2] = np.nan
    with pytest.raises(ValueError, match="not finite"):
        judge(kind, tmp_path, rows, others, labels, truth)


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_leaves_the_features_as_they_were(kind, tmp_path):
    (rows, labels), (others, truth) = blobs(50), blobs(20, seed=1)
    rows.setflags(write=False)
    others.setflags(write=False)
    judge(kind, tmp_path, rows, others, labels, truth, pseudo_labels=labels)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["linear_probe", "knn", "effective_rank"])
def test_a_gpu_judges_as_the_cpu_does(kind, tmp_path):
    (rows, labels), (others, truth) = blobs(3000), blobs(500, seed=1)
    on_cpu = judge(kind, tmp_path, rows, others, labels, truth)
    on_gpu = judge(kind, tmp_path, rows, others, labels, truth, device="cuda:0")
    assert on_gpu == pytest.approx(on_cpu, rel=5e-3)
