"""What is particular to each transfer, compared with scikit-learn, SciPy and NumPy."""

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import accuracy_score, log_loss
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.preprocessing import StandardScaler, normalize

from ktray.artifact import Artifact
from ktray.errors import UserError
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.report import best_pair
from ktray.spec import Augment, Schedule
from ktray.training import classification, distillation, loop, task
from ktray.training.task import Features, Labels, Targets, make_batch
from ktray.transfer import clusters, random_clusters, regression, similarity, soft_clusters
from tests.reports import pair, trial
from tests.test_transfer import BACKBONE, IMAGES
from tests.toy_space import toy_space
from tests.toys import HOG, toy_pair

torch.set_num_threads(1)

RNG = np.random.default_rng(0)
ROWS = (RNG.normal(size=(64, 12)) ** 2).astype(np.float32)  # as after a ReLU: no row points away from another
FEATURES = Features((ROWS[:30], ROWS[30:31], ROWS[31:]))
STILL = Augment(crop=0)


def targets_of(task, indices):
    """What the task wants of these images."""
    pixels = torch.from_numpy(IMAGES.read(np.asarray(indices)))
    return make_batch(task, pixels, torch.tensor(indices), torch.Generator().manual_seed(0))[1]


def logits(rows, columns):
    return RNG.normal(size=(rows, columns)).astype(np.float32)


# --- clusters


def test_cross_entropy_and_top1_equal_scikit_learns():
    scores, wanted = logits(40, 5), RNG.integers(0, 5, 40)
    loss, metrics = classification.cross_entropy(torch.from_numpy(scores), torch.from_numpy(wanted))
    assert float(loss) == pytest.approx(log_loss(wanted, softmax(scores, axis=1), labels=range(5)), abs=1e-5)
    assert float(metrics["top1"]) == pytest.approx(accuracy_score(wanted, scores.argmax(axis=1)))


def test_the_loss_of_several_heads_is_the_mean_of_their_losses_over_the_images_that_each_keeps():
    scores = logits(40, 5 + 3 + 7)
    wanted = np.stack([RNG.integers(low, high, 40) for low, high in ((0, 5), (-1, 3), (-1, 7))], axis=1)
    loss, metrics = classification.joint_cross_entropy(torch.from_numpy(scores), torch.from_numpy(wanted), [5, 3, 7])
    losses, tops = [], []
    for part, labels in zip(np.split(scores, [5, 8], axis=1), wanted.T, strict=True):
        known = labels >= 0
        losses.append(log_loss(labels[known], softmax(part[known], axis=1), labels=range(part.shape[1])))
        tops.append(accuracy_score(labels[known], part[known].argmax(axis=1)))
    assert float(loss) == pytest.approx(np.mean(losses), abs=1e-5)
    assert float(metrics["top1"]) == pytest.approx(np.mean(tops))


def test_a_head_without_an_image_in_the_batch_costs_nothing():
    wanted = torch.tensor([[0, -1], [1, -1]])
    loss, _ = classification.joint_cross_entropy(torch.from_numpy(logits(2, 4)), wanted, [2, 2])
    assert torch.isfinite(loss)


def test_several_k_train_one_student_and_an_image_that_one_k_leaves_out_still_trains_the_other_heads(tmp_path):
    fine, coarse = np.arange(64) % 8, np.where(np.arange(64) < 10, -1, np.arange(64) % 4)
    both = Targets(64, (Labels(fine, 8), Labels(np.where(np.arange(64) < 5, -1, coarse), 4)))
    neither = Targets(64, (Labels(np.where(np.arange(64) < 3, -1, fine), 8), both.heads[1]))
    spec = clusters.Spec(k=[8, 4])
    assert clusters.task(spec, both, STILL).keep.tolist() == list(range(64))
    task = clusters.task(spec, neither, STILL)
    assert task.keep.tolist() == list(range(3, 64))
    assert targets_of(task, [4, 12]).tolist() == [[4, -1, 2, 1, 2], [4, 0, 2, 1, 2]]
    schedule = Schedule(epochs=30, lr=0.05, batch_size=16)
    metrics = loop.fit(loop.untrained_backbone(BACKBONE, 0), task, IMAGES, schedule, 0, out=tmp_path, until=30)
    assert metrics["top1"] > 0.7


def test_uniform_sampling_shows_every_cluster_and_every_image_of_a_cluster_equally_often():
    labels = np.repeat([0, 1, 2, 3, -1], [1, 5, 40, 14, 4])
    order = clusters.task(clusters.Spec(sampling="uniform"), Targets(64, (Labels(labels, 9),)), STILL).order
    drawn = [order(torch.Generator().manual_seed(seed)).numpy() for seed in range(3)]
    assert not np.array_equal(drawn[0], drawn[1])
    for images in drawn:
        assert len(images) == 60
        assert np.bincount(labels[images], minlength=4).tolist() == [15] * 4
        for cluster in range(4):
            times = np.bincount(images, minlength=64)[labels == cluster]
            assert times.max() - times.min() <= 1
        assert len(set(labels[images[:10]])) > 1, "clusters come mixed"
    assert len(np.unique(np.concatenate(drawn))) > len(np.unique(drawn[0])), (
        "a large cluster shows others of its images next time"
    )


def test_uniform_sampling_of_several_k_divides_the_draws_among_them():
    coarse, fine = np.repeat([0, 1], [50, 14]), np.repeat([0, 1, 2, -1], [2, 4, 24, 34])
    both = Targets(64, (Labels(coarse, 2), Labels(fine, 3)))
    order = clusters.task(clusters.Spec(k=[2, 3], sampling="uniform"), both, STILL).order
    counts = sum(np.bincount(order(torch.Generator().manual_seed(seed)).numpy(), minlength=64) for seed in range(400)) / 400
    expected = 16 / np.bincount(coarse)[coarse] + np.where(fine < 0, 0, 32 / 3 / np.bincount(fine[fine >= 0])[fine])
    np.testing.assert_allclose(counts, expected, rtol=0.2)


def test_uniform_sampling_follows_its_order_and_gives_the_same_bits_however_it_is_split_into_segments(tmp_path):
    labels = np.where(np.arange(64) < 48, 0, IMAGES.labels)
    task = clusters.task(clusters.Spec(sampling="uniform"), Targets(64, (Labels(labels, 4),)), STILL)

    def fit(out, until, start=None):
        return loop.fit(
            loop.untrained_backbone(BACKBONE, 0), task, IMAGES, Schedule(epochs=3), 0, out=out, until=until, start=start
        )

    whole = fit(tmp_path / "whole", 3)
    fit(tmp_path / "1", 1)
    assert fit(tmp_path / "parts", 3, tmp_path / "1") == whole
    assert (tmp_path / "whole/weights.safetensors").read_bytes() == (tmp_path / "parts/weights.safetensors").read_bytes()


# --- soft_clusters


def test_soft_targets_are_a_softmax_of_distances_in_units_of_the_mean_nearest_one():
    squared = np.sort(RNG.uniform(0.2, 3, (64, 4)).astype(np.float32), axis=1)
    shares = soft_clusters.soft_assignments(squared, 0.3)
    expected = softmax(-squared / (0.3 * squared[:, 0].mean()), axis=1)
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    np.testing.assert_allclose(soft_clusters.soft_assignments(1000 * squared, 0.3), shares, atol=1e-5)
    assert soft_clusters.soft_assignments(np.array([[0, 0.1], [0, 2]], np.float32), 0.1).tolist() == [[1, 0], [1, 0]]


def test_soft_targets_lie_at_their_clusters_and_are_hard_near_temperature_0():
    nearest = np.stack([RNG.permutation(6)[:3] for _ in range(64)])
    squared = np.sort(RNG.uniform(0.2, 3, (64, 3)).astype(np.float32), axis=1)
    given = Targets(64, (Labels(nearest[:, 0], 6, nearest, squared),))
    warm = targets_of(soft_clusters.task(soft_clusters.Spec(k=6, neighbours=3), given, STILL), [7, 0]).numpy()
    assert np.array_equal(np.argsort(-warm, axis=1)[:, 0], nearest[[7, 0], 0])
    assert [set(np.flatnonzero(row)) <= set(nearest[image]) for row, image in zip(warm, (7, 0), strict=True)] == [True, True]
    cold = targets_of(soft_clusters.task(soft_clusters.Spec(k=6, neighbours=3, temperature=1e-6), given, STILL), range(64))
    scores = logits(64, 6)
    loss, metrics = soft_clusters.cross_entropy(torch.from_numpy(scores), cold)
    assert float(loss) == pytest.approx(log_loss(nearest[:, 0], softmax(scores, axis=1), labels=range(6)), abs=1e-5)
    assert float(metrics["top1"]) == pytest.approx(accuracy_score(nearest[:, 0], scores.argmax(axis=1)))


def test_soft_clusters_raise_if_the_pseudo_labels_carry_no_distances():
    with pytest.raises(ValueError, match="needs the distances"):
        soft_clusters.task(soft_clusters.Spec(), Targets(64, (Labels(IMAGES.labels, 4),)), STILL)


# --- regression


@pytest.mark.parametrize("standardise", [False, True])
def test_the_targets_of_regression_are_the_teachers_features_as_scikit_learn_normalises_them(standardise):
    constant = np.concatenate([ROWS, np.full((64, 1), 0.1, np.float32)], axis=1)
    given = Targets(64, (), Features((constant[:30], constant[30:])))
    wanted = targets_of(regression.task(regression.Spec(standardise=standardise), given, STILL), [5, 40, 31])
    expected = normalize(StandardScaler().fit_transform(constant) if standardise else constant)
    np.testing.assert_allclose(wanted.numpy(), expected[[5, 40, 31]], atol=1e-5)


def test_the_losses_of_regression_equal_numpys_distances():
    predicted, wanted = logits(20, 12), normalize(ROWS[:20])
    pair = torch.from_numpy(predicted), torch.from_numpy(wanted)
    apart = np.linalg.norm(normalize(predicted) - wanted, axis=1) ** 2
    assert float(regression.cosine(*pair)[0]) == pytest.approx(apart.mean(), abs=1e-5)
    assert float(regression.l2(*pair)[0]) == pytest.approx((np.linalg.norm(predicted - wanted, axis=1) ** 2).mean(), abs=1e-4)
    likeness = np.mean([cosine_similarity(predicted[i : i + 1], wanted[i : i + 1]) for i in range(20)])
    for loss in (regression.cosine, regression.l2):
        assert float(loss(*pair)[1]["cosine"]) == pytest.approx(likeness, abs=1e-6)


# --- similarity


def test_the_loss_of_similarity_equals_scipys_divergence():
    spec = similarity.Spec(anchors=9, temperature=0.2, teacher_temperature=0.05)
    task = similarity.task(spec, Targets(64, (), FEATURES), STILL)
    outputs = logits(20, 12)
    loss, metrics = task.loss(torch.from_numpy(outputs), targets_of(task, range(20)))
    anchors = ROWS[similarity.anchor_indices(64, 9, spec.seed)]
    teacher, student = cosine_similarity(ROWS[:20], anchors), cosine_similarity(outputs, anchors)
    expected = entropy(softmax(teacher / 0.05, axis=1), softmax(student / 0.2, axis=1), axis=1).mean()
    assert float(loss) == pytest.approx(expected, rel=1e-4)
    assert float(metrics["nearest"]) == pytest.approx((teacher.argmax(1) == student.argmax(1)).mean())


def test_a_student_that_is_the_teacher_has_nothing_to_learn_from_similarity():
    task = similarity.task(similarity.Spec(anchors=30), Targets(64, (), FEATURES), STILL)
    loss, metrics = task.loss(torch.from_numpy(7 * ROWS), targets_of(task, range(64)))
    assert abs(float(loss)) < 1e-6
    assert float(metrics["nearest"]) == 1


def test_anchors_are_distinct_images_and_a_function_of_the_seed():
    one = similarity.anchor_indices(1000, 200, 0)
    assert len(set(one)) == 200
    assert np.array_equal(one, similarity.anchor_indices(1000, 200, 0))
    assert not np.array_equal(one, similarity.anchor_indices(1000, 200, 1))


# --- random_clusters


def test_random_clusters_have_equal_sizes_and_do_not_depend_on_the_images():
    labels = random_clusters.random_labels(1003, 10, 0)
    assert sorted(np.bincount(labels)) == [100] * 7 + [101] * 3
    assert np.array_equal(labels, random_clusters.random_labels(1003, 10, 0))
    assert 50 < (labels == random_clusters.random_labels(1003, 10, 1)).sum() < 150
    assert abs(np.corrcoef(labels, np.arange(1003))[0, 1]) < 0.1


# --- features by index


def test_features_by_index_are_the_rows_of_all_shards_together():
    indices = np.array([63, 0, 30, 29, 31, 30])
    assert np.array_equal(FEATURES.read(indices), ROWS[indices])
    half = Features(tuple(shard.astype(np.float16) for shard in FEATURES.shards))
    assert half.read(indices).dtype == np.float32
    np.testing.assert_allclose(half.read(indices), ROWS[indices], atol=0.01)
    for outside in (64, -1):
        with pytest.raises(IndexError, match="there are 64"):
            FEATURES.read(np.array([3, outside]))


def test_features_kept_on_the_device_equal_those_read_for_each_batch():
    device = torch.device("cpu")
    held = Features(FEATURES.shards)
    assert torch.equal(held.held_on(device)[torch.tensor([63, 0, 30, 29])], torch.from_numpy(ROWS[[63, 0, 30, 29]]))
    assert held.held_on(device) is held.held_on(device)


def test_features_too_large_for_a_device_are_read_with_the_draws_and_give_the_same_batch(monkeypatch):
    draw, batch = distillation.feature_batch(FEATURES, Augment(), lambda rows: rows)
    pixels, indices = torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.tensor([63, 0, 30, 29])
    small = batch(pixels, indices, draw(indices, torch.Generator().manual_seed(0)))
    monkeypatch.setattr(task, "RESIDENT_BYTES", 0)
    draws = draw(indices, torch.Generator().manual_seed(0))
    monkeypatch.setattr(Features, "read", lambda *_: pytest.fail("read although it came with the draws"))
    large = batch(pixels, indices, draws)
    assert torch.equal(small[0], large[0])
    assert torch.equal(small[1], large[1])


# --- what is refused

REFUSED = {
    "the same k twice": ({"kind": "clusters", "k": [50, 50]}, "a repeated number"),
    "a k of 1": ({"kind": "clusters", "k": [50, 1]}, "at least 2"),
    "no k": ({"kind": "clusters", "k": []}, "a whole number, or a list"),
    "a list of one k": ({"kind": "clusters", "k": [50]}, "write 50"),
    "a merger of nothing": ({"kind": "clusters", "small": "merge", "min_size": 1}, "merges nothing"),
    "more neighbours than clusters": ({"kind": "soft_clusters", "k": 5}, "use at most 5"),
    "a teacher for random clusters": ({"kind": "random_clusters", "k": 5}, "uses no teacher"),
}


@pytest.mark.parametrize(("transfer", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_a_contradictory_transfer_is_refused(transfer, said):
    with pytest.raises(ValueError, match=said):
        toy_pair(transfer=transfer)


@pytest.mark.parametrize("kind", ["clusters", "soft_clusters", "regression", "similarity"])
def test_a_transfer_from_a_teacher_is_refused_without_one(kind):
    with pytest.raises(ValueError, match="needs a teacher"):
        toy_pair(transfer={"kind": kind}, teacher=None)


TOO_MUCH = {
    "anchors": ({"kind": "similarity", "anchors": 217}, HOG, "transfer.anchors", "Use at most 216"),
    "random classes": ({"kind": "random_clusters", "k": 217}, None, "transfer.k", "Use at most 216"),
    "clusters shared by degrees": ({"kind": "soft_clusters", "k": 217}, HOG, "transfer.k", "Use at most 216"),
    "one of several k": ({"kind": "clusters", "k": [5, 217]}, HOG, "transfer.k", "Use at most 216"),
}


@pytest.mark.parametrize(("transfer", "teacher", "place", "right"), TOO_MUCH.values(), ids=TOO_MUCH.keys())
def test_a_spec_that_the_data_cannot_satisfy_is_refused_before_anything_runs(transfer, teacher, place, right):
    with pytest.raises(UserError) as caught:
        check_pair(toy_pair(transfer=transfer, teacher=teacher), data_loader())
    assert caught.value.where == place
    assert right in caught.value.instead


def test_cluster_quality_is_refused_where_no_pseudo_labels_are_made():
    with pytest.raises(UserError, match="makes none"):
        check_pair(toy_pair(transfer={"kind": "regression"}, evals=[{"kind": "cluster_quality"}]), data_loader())


# --- what a search draws, and what a report shows


def test_a_draw_may_have_several_k(tmp_path):
    found = toy_space(tmp_path, {"transfer": {"kind": "clusters", "k": {"choice": [5, [5, 20]]}}})
    assert [found.pair(found.fill_with_first_values({"transfer.k": label})).transfer.k for label in (5, "[5,20]")] == [
        5,
        (5, 20),
    ]


def test_a_continuous_field_of_the_students_stage_is_not_warned_about(tmp_path):
    transfers = {
        "soft": {"kind": "soft_clusters", "k": 20, "temperature": {"log_float": [0.01, 1]}},
        "similar": {"kind": "similarity", "anchors": 50, "temperature": {"log_float": [0.01, 1]}},
    }
    assert toy_space(tmp_path, {"transfer": {"one_of": transfers}}).sharing_warnings() == [], (
        "their features and clusters are shared"
    )


def test_a_report_counts_the_clusters_of_the_first_of_several_k(tmp_path):
    np.save(tmp_path / "labels.npy", np.array([0, 0, 3, -1]))
    best = trial(0, 0.5, pair=pair(transfer={"kind": "clusters", "k": [5, 9]}), keys={"pseudo_labels": "pseudo_labels-1"})
    found = best_pair.cluster_statistics(best, lambda key: Artifact(key, tmp_path, {}, {}))
    assert {"clusters": "5", "clusters without an image left": "3"}.items() <= dict(found["rows"]).items()
