"""What stages will cost: learned from records alone, and honest about how far it may be off."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import BayesianRidge

from ktray.artifact import Stage, kind_of
from ktray.cost_model import bayesian_regression
from ktray.cost_model.stage_costs import EXPONENTS, PRIOR_CPU_FACTOR, PRIOR_SECONDS, PRIOR_SECONDS_PER_EPOCH, CostModel

IMAGES = Stage("images", {"kind": "synthetic", "size": 28, "count": 1000}, {})


def network(width: float = 0.25, form: str = "alexnet") -> dict[str, Any]:
    return {"backbone": {"kind": form, "width": width}}


def student(epoch: int, width: float = 0.25, seed: int = 0, resume_from: tuple[str, ...] = (), form: str = "alexnet") -> Stage:
    spec = {**network(width, form), "epoch": epoch, "seed": seed}
    return Stage("student", spec, {}, {"images.transfer": IMAGES.key}, resume_from)


def record(
    stage: Stage, seconds: float, device: str = "cpu", published: str = "2026-01-01", **metrics: float
) -> dict[str, Any]:
    return {
        **{"key": stage.key, "stage": stage.name, "spec": stage.spec, "inputs": stage.inputs, "metrics": metrics},
        **{"seconds": seconds, "seconds_alone": seconds, "device": device, "published": published},
    }


def records(*made: tuple[Stage, float]) -> dict[str, dict[str, Any]]:
    return {stage.key: record(stage, seconds) for stage, seconds in made}


def truth(stage: Stage) -> float:
    """Seconds of a student on some machine: half a second per epoch at full width, a little more at small ones."""
    return 0.5 * float(stage.spec["epoch"]) * float(stage.spec["backbone"]["width"]) ** 0.6


def noisy(count: int, seed: int = 0, sigma: float = 0.15) -> dict[str, dict[str, Any]]:
    rng = random.Random(seed)
    stages = [
        student(rng.choice([2, 5, 10, 40]), rng.choice([0.125, 0.25, 0.5, 1.0]), rng.randrange(10**6)) for _ in range(count)
    ]
    return records(*((stage, truth(stage) * math.exp(rng.gauss(0, sigma))) for stage in stages))


def test_from_one_record_a_longer_training_is_estimated_in_proportion_to_its_epochs() -> None:
    costs = CostModel(records((student(10), 20.0)))
    assert costs.estimate([student(40)]).seconds == pytest.approx(80, rel=0.01)


def test_without_covariates_that_differ_the_median_of_the_kind_is_taken() -> None:
    seconds = (1.0, 1.1, 1.2, 1.3, 90.0)  # the last one was run on a machine that slept
    costs = CostModel(records(*((student(10, seed=seed), each) for seed, each in enumerate(seconds))))
    assert costs.estimate([student(10, seed=99)]).seconds == pytest.approx(1.2, rel=0.15)


def test_exponents_are_learned_from_records_and_not_only_assumed() -> None:
    costs = CostModel(noisy(200))
    wide, narrow = (costs.estimate([student(10, width)]).seconds for width in (1.0, 0.125))
    assert wide / narrow == pytest.approx(8**0.6, rel=0.1)
    assert costs.estimate([student(20, 0.5)]).seconds == pytest.approx(truth(student(20, 0.5)), rel=0.08)


@pytest.mark.parametrize("count", [3, 8, 30])
def test_nine_of_ten_stages_fall_into_their_interval(count: int) -> None:
    inside = []
    for seed in range(30):
        costs = CostModel(noisy(count, seed))
        for stage, found in ((student(e, w, 777), noisy(1, seed + 1000)) for e, w in ((5, 0.125), (10, 0.25), (40, 1.0))):
            noise = next(iter(found.values()))
            factor = noise["seconds"] / truth(student(noise["spec"]["epoch"], noise["spec"]["backbone"]["width"]))
            estimate = costs.estimate([stage])
            inside.append(estimate.low <= truth(stage) * factor <= estimate.high)
    assert np.mean(inside) >= 0.9


def test_more_records_narrow_the_interval_and_a_network_never_seen_widens_it() -> None:
    def width(costs: CostModel, stage: Stage) -> float:
        found = costs.estimate([stage])
        return math.log(found.high / found.low)

    few, many = CostModel(noisy(3)), CostModel(noisy(100))
    assert width(many, student(10)) < 0.8 * width(few, student(10))
    assert width(many, student(10, form="vit")) > 2 * width(many, student(10))


def test_an_error_of_a_kind_is_shared_by_all_of_its_stages() -> None:
    costs = CostModel(records((student(10), 20.0)))
    one, ten = costs.estimate([student(10)]), costs.estimate([student(10, seed=seed) for seed in range(10)])
    assert ten.seconds == pytest.approx(10 * one.seconds)
    assert math.log(ten.high / ten.low) > 0.3 * math.log(one.high / one.low)  # it would be 1/sqrt(10) if they were independent


def test_a_training_costs_only_what_is_beyond_a_snapshot_that_is_there_or_planned() -> None:
    five, ten = student(5), student(10)
    forty = student(40, resume_from=(ten.key, five.key))
    costs = CostModel(records((ten, 10.0)))
    assert costs.estimate([forty], made=[ten.key]).seconds == pytest.approx(30, rel=0.01)
    chain = [five, student(10, resume_from=(five.key,)), forty]
    assert costs.estimate(chain).seconds == pytest.approx(costs.estimate([student(40)]).seconds, rel=0.01)


def test_a_stage_counts_once_and_not_if_it_is_made() -> None:
    costs = CostModel(records((student(10), 20.0)))
    assert costs.estimate([student(10, seed=1)] * 3).known == 1
    assert costs.estimate([student(10)], made={student(10).key}).seconds == 0


def test_stages_of_a_kind_without_records_are_counted_and_left_out_of_the_seconds() -> None:
    labels = Stage("pseudo_labels", {}, {})
    found = CostModel(records((student(10), 20.0))).estimate([labels, student(10, seed=1)])
    assert (found.known, found.unknown) == (1, 1)
    assert found.seconds == pytest.approx(20, rel=0.01)


def test_single_stages_have_an_estimate_even_before_the_first_record() -> None:
    assert CostModel().predict([student(7)]) == {student(7).key: 7 * PRIOR_SECONDS_PER_EPOCH["student"]}


def test_one_stage_at_a_time_is_predicted_from_the_prior_and_then_from_records_each_of_which_counts_once() -> None:
    costs, clusters = CostModel(), Stage("clusters", {}, {})
    assert costs.seconds(clusters) == PRIOR_SECONDS
    for key, found in {
        "clusters-1": {"seconds_alone": 4.0},
        "clusters-2": {"seconds_alone": 8.0},
        "teacher-1": {"seconds_alone": 30.0, "spec": {"epoch": 10}},
    }.items():
        costs.add(key, found)
        costs.add(key, found)
    assert costs.seconds(clusters) == pytest.approx(6.0, rel=0.1)
    assert costs.seconds(Stage("teacher", {"epoch": 40}, {})) == pytest.approx(120.0, rel=0.02)


def test_before_the_first_record_a_wider_network_is_predicted_to_take_longer_by_the_prior_s_exponent() -> None:
    narrow, wide = (CostModel().seconds(student(10, width)) for width in (0.25, 1.0))
    assert wide / narrow == pytest.approx(4 ** EXPONENTS["width"][0])
    assert wide == pytest.approx(10 * PRIOR_SECONDS_PER_EPOCH["student"])


def test_one_training_at_a_time_is_predicted_from_the_snapshot_that_is_recorded_or_will_be_made() -> None:
    five, ten = student(5), student(10)
    forty = student(40, resume_from=(ten.key, five.key))
    costs = CostModel(records((five, 5.0)))
    assert costs.seconds(forty) == pytest.approx(35, rel=0.02)
    assert costs.seconds(forty, {ten.key: ten}) == pytest.approx(30, rel=0.02)
    assert costs.seconds(student(40, resume_from=(ten.key,))) == pytest.approx(40, rel=0.02)


def test_of_thousands_of_records_only_some_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktray.cost_model.stage_costs.MOST_KEPT", 5)
    costs = CostModel(records(*((student(10, seed=seed), 20.0) for seed in range(5))))
    costs.add(student(10, seed=5).key, record(student(10, seed=5), 2e9))
    assert costs.seconds(student(10, seed=99)) == pytest.approx(20, rel=0.01)
    assert costs.seconds(student(40, resume_from=(student(10, seed=5).key,))) == pytest.approx(60, rel=0.02)


def test_numpy_is_not_imported_before_the_first_record_is_learned_from() -> None:
    script = """
import sys
from ktray.artifact import Stage
from ktray.cost_model.stage_costs import CostModel
CostModel().seconds(Stage("clusters", {}, {}))
print([name for name in ("numpy", "torch") if name in sys.modules])
"""
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() == "[]"


def test_the_device_that_a_kind_was_last_run_on_is_the_one_that_counts() -> None:
    on_cpu = {stage.key: record(stage, 100.0) for stage in (student(10, seed=seed) for seed in range(5))}
    on_gpu = {s.key: record(s, 1.0, "H100", "2026-02-02") for s in (student(10, seed=seed) for seed in range(5, 10))}
    assert CostModel(on_cpu | on_gpu).estimate([student(10, seed=99)]).seconds == pytest.approx(1, rel=0.5)
    assert CostModel(on_cpu).estimate([student(10, seed=99)]).seconds == pytest.approx(100, rel=0.01)


def test_a_stage_for_cpus_and_gpus_is_estimated_on_each_from_its_records_there_or_with_an_assumed_factor() -> None:
    def clusters(k: int) -> Stage:
        return Stage("clusters", {"k": k}, {}, {})

    costs = CostModel()
    assert costs.seconds_on(False, clusters(100)) == pytest.approx(PRIOR_CPU_FACTOR * costs.seconds_on(True, clusters(100)))
    for k in (90, 100, 110):
        costs.add(clusters(k).key, record(clusters(k), 2.0, "NVIDIA H200"))
    assert costs.seconds_on(True, clusters(100)) == pytest.approx(2.0, rel=0.1)
    assert costs.seconds_on(False, clusters(100)) == pytest.approx(2.0 * PRIOR_CPU_FACTOR, rel=0.1)
    for k in (91, 101, 111):
        costs.add(clusters(k).key, record(clusters(k), 6.0, "cpu x86_64", "2025-01-01"))
    assert costs.seconds_on(False, clusters(100)) == pytest.approx(6.0, rel=0.2)
    assert costs.seconds_on(True, clusters(100)) == pytest.approx(2.0, rel=0.2)
    on_cpus = CostModel({clusters(k).key: record(clusters(k), 6.0) for k in (90, 100)})
    assert on_cpus.seconds_on(True, clusters(100)) == pytest.approx(6.0 / PRIOR_CPU_FACTOR, rel=0.1)


def test_clustering_of_features_that_are_not_there_yet_knows_their_width_from_another_teacher() -> None:
    def features(teacher: str, layer: str) -> Stage:
        return Stage("features", {**network(), "layer": layer, "dtype": "float32"}, {}, {"teacher": teacher})

    def clusters(of: Stage) -> Stage:
        return Stage("clusters", {"k": 10}, {}, {"features": of.key})

    made, known = {}, {"conv3": (64.0, 1.0), "conv5": (4096.0, 40.0)}
    for layer, (dim, seconds) in known.items():
        made[features("a", layer).key] = record(features("a", layer), 1.0, dim=dim)
        made[clusters(features("a", layer)).key] = record(clusters(features("a", layer)), seconds)
    costs = CostModel(made)
    thin, wide = (costs.predict([features("b", layer), clusters(features("b", layer))]) for layer in known)
    assert wide[clusters(features("b", "conv5")).key] > 5 * thin[clusters(features("b", "conv3")).key]


def test_the_regression_agrees_with_an_independent_one_where_nothing_is_wrong_with_the_data() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(500, 3))
    values = features @ [1.0, -0.5, 0.0] + 2.0 + 0.5 * rng.normal(size=500)
    ours, theirs = bayesian_regression.fit(features, values, np.full(3, 10.0)), BayesianRidge().fit(features, values)
    np.testing.assert_allclose(ours.weights, [theirs.intercept_, *theirs.coef_], atol=0.02)
    np.testing.assert_allclose(np.sqrt(np.diag(ours.covariance)[1:]), np.sqrt(np.diag(theirs.sigma_)), rtol=0.3)


def test_outliers_hardly_bend_the_regression() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(60, 1))
    values = features[:, 0] + 0.1 * rng.normal(size=60)
    values[:6] += 20
    assert bayesian_regression.fit(features, values, np.ones(1)).weights == pytest.approx([0, 1], abs=0.15)


def test_a_key_names_its_kind_of_stage() -> None:
    assert kind_of("pseudo_labels-3f9a1c0b2d44") == "pseudo_labels"
