"""Evaluations agree with scikit-learn and plain linear algebra, and never return a NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier

from ktray import plugins
from ktray.classifiers import neighbours
from ktray.errors import UserError
from ktray.evals import cluster_quality, effective_rank, knn
from tests.judging import blobs, judge

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINED = {"fine_tune", "nonlinear_probe", "voc07_cls_finetune", "voc_det", "coco_det", "voc12_seg"}
"""Kinds that read pixels and train: see test_fine_tuning.py and test_detection.py."""
KINDS = [kind for kind in plugins.kinds("evaluation") if kind not in {*TRAINED, "robustness", "dense_knn"}]


@pytest.mark.parametrize("k", [1, 5, 20])
def test_knn_with_equal_votes_agrees_with_scikit_learn(k):
    (rows, labels), (others, _) = blobs(300), blobs(200, seed=1)
    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(rows.astype(np.float64), labels)
    predicted = knn.predict(rows, labels, others, k=(k,), temperature=None)[:, 0]
    assert (predicted == oracle.predict(others.astype(np.float64))).mean() >= 0.995  # float32: a tie in cosine may fall apart


def test_knn_with_a_temperature_agrees_with_scikit_learn():
    (rows, labels), (others, _) = blobs(300), blobs(200, seed=1)
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    predicted = knn.predict(rows, labels, others, k=(20,), temperature=0.07)[:, 0]
    assert (predicted == oracle.fit(rows.astype(np.float64), labels).predict(others.astype(np.float64))).mean() >= 0.995


def test_knn_does_not_depend_on_the_chunks(monkeypatch):
    (rows, labels), (others, _) = blobs(300), blobs(200, seed=1)
    whole = knn.predict(rows, labels, others, k=(20,), temperature=0.07)
    monkeypatch.setattr(neighbours, "SIMILARITIES", 300 * 17)
    np.testing.assert_array_equal(knn.predict(rows, labels, others, k=(20,), temperature=0.07), whole)


def test_knn_depends_on_directions_and_not_on_lengths():
    (rows, labels), (others, _) = blobs(300), blobs(200, seed=1)
    lengths = np.random.default_rng(0).uniform(0.5, 2, (300, 1)).astype(np.float32)
    before = knn.predict(rows, labels, others, k=(5,), temperature=None)
    assert (knn.predict(rows * lengths, labels, others, k=(5,), temperature=None) == before).mean() >= 0.995


def test_a_tiny_temperature_is_the_nearest_neighbour_and_overflows_nothing():
    (rows, labels), (others, _) = blobs(300), blobs(200, seed=1)
    nearest = knn.predict(rows, labels, others, k=(1,), temperature=None)
    np.testing.assert_array_equal(knn.predict(rows, labels, others, k=(20,), temperature=1e-9), nearest)


def test_fewer_images_than_neighbours_all_vote():
    rows, labels = np.eye(3, dtype=np.float32), np.array([1, 1, 0])
    np.testing.assert_array_equal(knn.predict(rows, labels, rows, k=(20,), temperature=None)[:, 0], [1, 1, 1])


def test_several_k_in_one_pass_are_as_each_alone(tmp_path):
    (rows, labels), (others, truth) = blobs(300), blobs(200, seed=1)
    together = judge("knn", tmp_path, rows, others, labels, truth, k=[10, 1, 400])
    alone = {k: judge("knn", tmp_path, rows, others, labels, truth, k=k)["top1"] for k in (10, 1, 400)}
    assert together == {"top1": alone[10], **{f"top1_k{k}": top1 for k, top1 in alone.items()}}


def test_knn_gives_top1(tmp_path):
    (rows, labels), (others, truth) = blobs(300), blobs(200, seed=1)
    predicted = knn.predict(rows, labels, others, k=(20,), temperature=0.07)[:, 0]
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
    with pytest.raises(ValueError, match="there are 3 pseudo-labels for 2 images"):
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


def test_effective_rank_of_many_images_uses_an_evenly_spaced_subset(tmp_path):
    rows = np.random.default_rng(0).normal(size=(101, 4)).astype(np.float32)
    metrics = judge("effective_rank", tmp_path, rows, rows, rows=11)
    assert metrics["rank"] == effective_rank.effective_rank(rows[::10])


def test_effective_rank_of_zeros_is_zero():
    assert effective_rank.effective_rank(np.zeros((5, 3), np.float32)) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_metric_has_a_direction_and_is_finite(kind, tmp_path):
    (rows, labels), (others, truth) = blobs(120), blobs(60, seed=1)
    metrics = judge(kind, tmp_path, rows, others, labels, truth, pseudo_labels=labels)
    module = plugins.module("evaluation", kind)
    stated = set(module.directions(module.Spec()) if hasattr(module, "directions") else module.DIRECTION)
    assert set(metrics) <= stated if getattr(module, "DEPENDS_ON_MACHINE", False) else set(metrics) == stated
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("kind", ["linear_probe", "knn", "low_shot", "retrieval"])
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


@pytest.mark.parametrize("kind", ["linear_probe", "knn", "effective_rank", "low_shot", "retrieval"])
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
@pytest.mark.parametrize("kind", ["linear_probe", "knn", "effective_rank", "low_shot", "retrieval"])
def test_an_evaluation_gives_the_same_metrics_on_a_gpu(kind, tmp_path):
    (rows, labels), (others, truth) = blobs(3000), blobs(500, seed=1)
    on_cpu = judge(kind, tmp_path, rows, others, labels, truth)
    on_gpu = judge(kind, tmp_path, rows, others, labels, truth, device="cuda:0")
    assert on_gpu == pytest.approx(on_cpu, rel=5e-3)
