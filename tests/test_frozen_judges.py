"""Low-shot classification, retrieval and linear machines agree with scikit-learn and with plain counting."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.svm import LinearSVC

from ktray.classifiers import linear_classifiers
from ktray.classifiers.linear_classifiers import Problem
from ktray.evals import low_shot, retrieval
from ktray.scoring import per_image
from tests.judging import blobs, images, judge

pytestmark = pytest.mark.usefixtures("one_thread")


def unit_rows(count, seed=0, width=12):
    rows, labels = blobs(count, seed, width=width)
    rows = (rows - 3) / 10.0 ** np.linspace(-2, 2, width, dtype=np.float32)
    return linear_classifiers.unit(torch.from_numpy(rows)).double(), labels


@pytest.mark.parametrize("width", [12, 150])  # fewer features than images, and more
@pytest.mark.parametrize("positive_weight", [1.0, 2.0])
def test_all_machines_at_once_are_those_of_scikit_learn_one_by_one(width, positive_weight):
    rows, labels = unit_rows(120, width=width)
    targets = torch.from_numpy(np.where(labels[:, None] == np.arange(4), 1, -1).astype(np.int8))
    sets = torch.stack([torch.ones(120, dtype=torch.bool), torch.arange(120) % 3 > 0])
    problems = [Problem(of, cost, number) for of in range(4) for cost in (0.1, 10.0) for number in range(2)]
    found = linear_classifiers.linear_machines(
        rows, targets, sets, problems, positive_weight=positive_weight, iterations=2000, tolerance=1e-10
    )
    for column, problem in enumerate(problems):
        used = sets[problem.images].numpy()
        oracle = LinearSVC(C=problem.cost, class_weight={1: positive_weight, -1: 1}, dual=False, tol=1e-9, max_iter=20000)
        oracle.fit(rows.numpy()[used], targets[:, problem.of].numpy()[used])
        expected = np.append(oracle.coef_[0], oracle.intercept_)
        np.testing.assert_allclose(found[:, column].numpy(), expected, atol=2e-3 * np.abs(expected).max())


def test_an_image_that_is_left_out_of_a_class_changes_nothing_there():
    rows, labels = unit_rows(60)
    targets = torch.from_numpy(np.where(labels[:, None] == np.arange(4), 1, -1).astype(np.int8))
    without = targets.clone()
    without[::3, 1] = 0
    everything = torch.ones(1, 60, dtype=torch.bool)
    found = linear_classifiers.linear_machines(rows, without, everything, [Problem(1, 1.0, 0)], tolerance=1e-10)
    kept = torch.arange(60) % 3 != 0
    expected = linear_classifiers.linear_machines(
        rows[kept], targets[kept], everything[:, kept], [Problem(1, 1.0, 0)], tolerance=1e-10
    )
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-4)


def test_low_shot_is_the_mean_over_draws_of_machines_that_see_so_many_labels(tmp_path):
    (rows, labels), (others, truth) = blobs(300), blobs(200, seed=1)
    metrics = judge("low_shot", tmp_path, rows, others, labels, truth, shots=[2, 8], draws=3)
    spec, scores = low_shot.Spec(shots=(2, 8), draws=3), []
    given, queries = (linear_classifiers.unit(torch.from_numpy(each)).numpy() for each in (rows, others))
    for draw in range(3):
        chosen = low_shot._draw(spec, labels, 8, draw)
        assert np.bincount(labels[chosen]).tolist() == [8] * 4
        assert {*low_shot._draw(spec, labels, 2, draw)} < {*chosen}
        answers = [
            LinearSVC(C=1.0, dual=False, tol=1e-8, max_iter=10000).fit(given[chosen], labels[chosen] == of) for of in range(4)
        ]
        predicted = np.stack([each.decision_function(queries) for each in answers], 1).argmax(1)
        scores.append((predicted == truth).mean())
    assert metrics["top1_8"] == metrics["top1"] == pytest.approx(np.mean(scores), abs=0.005)
    assert metrics["top1_8_std"] == pytest.approx(np.std(scores, ddof=1), abs=0.01)
    assert metrics["top1_2"] < metrics["top1_8"]
    assert json.loads((tmp_path / "low_shot.json").read_text())["labels"]["8 per class, draw 0"] == 32


def test_precision_is_the_share_of_neighbours_of_the_same_class(tmp_path):
    (rows, labels), (others, truth) = blobs(300), blobs(100, seed=1)
    metrics = judge("retrieval", tmp_path, rows, others, labels, truth, k=[1, 7])
    order = np.argsort(-cosine_similarity(others.astype(np.float64), rows.astype(np.float64)), axis=1)
    expected = {k: (labels[order[:, :k]] == truth[:, None]).mean() for k in (1, 7)}
    assert metrics["precision_at_1"] == pytest.approx(expected[1], abs=0.01)
    assert metrics["precision_at_7"] == metrics["precision"] == pytest.approx(expected[7], abs=0.003)


def test_the_sheet_shows_a_row_per_query_and_frames_wrong_neighbours(tmp_path):
    from PIL import Image

    rows, labels = np.eye(3, dtype=np.float32), np.array([0, 1, 1])

    def read(index):
        return np.zeros((len(index), 8, 8, 3), np.uint8)

    train = images(3, labels, ("cat", "$dog"))
    train = type(train)(3, 8, read, labels, ("cat", "$dog"))
    spec = retrieval.Spec(k=(1,), queries=2, shown=2)
    judged = type(train)(3, 8, read, labels, ("cat", "$dog"))
    retrieval.evaluate(
        spec, features=lambda _: rows, train=train, judged=judged, pseudo_labels=None, out=tmp_path, device="cpu"
    )
    sheet = np.asarray(Image.open(tmp_path / retrieval.SHEET))
    assert sheet.shape == (2 * 54, 3 * 54 + 12, 3)
    assert (sheet == (200, 30, 30)).all(-1).any()


def test_results_per_image_are_read_as_they_were_written_and_their_means_are_the_metrics(tmp_path):
    (rows, labels), (others, truth) = blobs(300), blobs(100, seed=1)
    metrics = judge("linear_probe", tmp_path, rows, others, labels, truth, l2=1e-2)
    found = per_image.read(tmp_path / per_image.FILE)
    assert found.names == tuple(map(str, range(100)))
    assert per_image.metrics_of(found, None) == pytest.approx(metrics)
    np.testing.assert_array_equal(found.columns["truth"], truth)
    right = found.columns["predicted"] == truth
    expected = np.sqrt(right.mean() * (1 - right.mean()) / 99)
    assert per_image.standard_errors(found)["top1"] == pytest.approx(expected, rel=1e-9)


def test_a_paired_bootstrap_tells_students_apart_that_differ_on_the_same_images_and_no_others(tmp_path):
    random = np.random.default_rng(0)
    names = [str(index) for index in range(500)]
    base = random.random(500) < 0.7
    better, noisy = base | (random.random(500) < 0.1), np.where(random.random(500) < 0.02, ~base, base)
    for name, values in (("base", base), ("better", better), ("noisy", noisy)):
        (tmp_path / name).mkdir()
        per_image.write(tmp_path / name, names, {"top1": values.astype(np.float64)})
    read = {name: per_image.read(tmp_path / name / per_image.FILE) for name in ("base", "better", "noisy")}
    apart = per_image.paired_differences(read["better"], read["base"])["top1"]
    assert apart.value == pytest.approx(better.mean() - base.mean())
    differences = better.astype(float) - base
    error = differences.std() / np.sqrt(500)
    assert (apart.low, apart.high) == pytest.approx((apart.value - 1.96 * error, apart.value + 1.96 * error), abs=error / 4)
    assert apart.told_apart
    assert not per_image.paired_differences(read["noisy"], read["base"])["top1"].told_apart
    other = per_image.PerImage(("x", *names[1:]), read["base"].columns)
    with pytest.raises(ValueError, match="499 of them shared"):
        per_image.paired_differences(read["base"], other)


def test_a_bootstrap_of_a_metric_that_is_no_mean_computes_it_anew():
    values = np.random.default_rng(0).normal(size=400)
    found = per_image.PerImage(tuple(map(str, range(400))), {"value": values})

    def median(columns, rows):
        return {"median": float(np.median(columns["value"][rows]))}

    assert per_image.metrics_of(found, median) == {"median": pytest.approx(np.median(values))}
    assert per_image.standard_errors(found, median)["median"] == pytest.approx(1.2533 / 20, rel=0.2)


@pytest.mark.gpu
def test_a_gpu_whose_steps_are_graphs_finds_the_minima_of_a_cpu() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 5, 2000)
    rows = torch.from_numpy((random.normal(size=(5, 40))[labels] + 2 * random.normal(size=(2000, 40))).astype(np.float32))
    penalties = [10.0**power for power in range(-5, 0)]
    found = {
        device: linear_classifiers.logistic_regressions(
            rows.to(device), torch.from_numpy(labels).to(device), 5, penalties, iterations=500
        )
        for device in ("cpu", "cuda:0")
    }
    assert all(found["cuda:0"].converged)
    for index, penalty in enumerate(penalties):
        losses = []
        for device, each in found.items():
            scores = each.scores(rows.to(device), index).double().cpu()
            loss = torch.nn.functional.cross_entropy(scores, torch.from_numpy(labels))
            losses.append(float(loss + penalty / 2 * each.weights[index].square().sum().cpu()))
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)
