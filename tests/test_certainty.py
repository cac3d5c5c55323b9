"""Pairs that cannot be told apart are marked, seeds are summed up, and two students are compared on the same images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from ktray.artifact import Artifact
from ktray.cli.leaderboard import NOT_TOLD_APART
from ktray.runs import comparison, uncertainty
from ktray.runs.best_trials import sentences_on_test
from ktray.scoring import per_image
from ktray.search.trial import Trial
from tests.reports import html_of, trial


class Store:
    """Finds the evaluations that were put into it; nothing of it is damaged."""

    def __init__(self, folder):
        self.folder, self.found = folder, {}

    def judged(self, key, right):
        """An evaluation by kNN that got these images right."""
        directory = self.folder / key
        directory.mkdir()
        per_image.write(directory, [f"{index}.png" for index in range(len(right))], {"top1": right.astype(np.float64)})
        record = {"spec": {"kind": "knn", "split": "val"}, "files": {per_image.FILE: {}}}
        self.found[key] = Artifact(key, directory, {"top1": float(right.mean())}, record)

    def find(self, key):
        return self.found.get(key)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(uncertainty, "intact_file_or_none", lambda artifact, name: artifact.directory / name)
    found, random = Store(tmp_path), np.random.default_rng(0)
    base = random.random(400) < 0.7
    found.judged("best", base | (random.random(400) < 0.02))
    found.judged("level", base)
    found.judged("worse", base & (random.random(400) < 0.7))
    return found


def pair(number, key, seed=0, value=0.5):
    spec = {"student": {"seed": seed, "lr": 0.1}, "data": {"target": {"split": {"seed": 3}}}}
    keys = {"evaluation": {"knn": key}}
    return Trial(number, {}, spec, state="completed", keys=keys, objectives={"knn/top1": value})


def test_pairs_are_level_with_the_best_where_the_images_do_not_tell_them_apart(store):
    trials = [pair(0, "best"), pair(1, "level"), pair(2, "worse"), pair(3, "absent")]
    assert uncertainty.level_with_best(trials, "knn/top1", store) == {1}
    assert uncertainty.level_with_best([], "knn/top1", store) == set()


def test_standard_errors_are_those_of_the_means_over_images(store):
    errors = uncertainty.standard_errors(pair(0, "worse").keys, store)
    right = per_image.read(store.folder / "worse" / per_image.FILE).columns["top1"]
    assert errors == {"knn/top1": pytest.approx(right.std(ddof=1) / 20)}


def test_one_pair_under_several_seeds_has_a_mean_a_deviation_and_a_student_interval():
    values = [0.5, 0.6, 0.55]
    trials = [pair(number, "x", seed=number, value=value) for number, value in enumerate(values)]
    other = replace(pair(3, "x"), pair={"student": {"seed": 0, "lr": 0.2}, "data": {}})
    split = replace(pair(4, "x"), pair={"student": {"seed": 0, "lr": 0.1}, "data": {"target": {"split": {"seed": 4}}}})
    (found,) = uncertainty.over_seeds([*trials, other, split], "knn/top1")
    assert found.trials == (0, 1, 2)
    assert (found.mean, found.deviation) == (pytest.approx(0.55), pytest.approx(0.05))
    low, high = stats.t.interval(0.95, 2, loc=0.55, scale=stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))


def test_images_that_only_one_student_gets_right_are_named(store):
    one, other = (per_image.read(store.folder / name / per_image.FILE) for name in ("best", "worse"))
    first, second = comparison._differing(one, other)
    ours, theirs = one.columns["top1"] > 0.5, other.columns["top1"] > 0.5
    assert first == [f"{index}.png" for index in np.flatnonzero(ours & ~theirs)]
    assert second == [f"{index}.png" for index in np.flatnonzero(~ours & theirs)]
    found = uncertainty.differences(pair(0, "best").keys, pair(1, "worse").keys, store)["knn/top1"]
    assert found.value == pytest.approx((len(first) - len(second)) / 400)
    assert found.told_apart


def test_the_report_begins_with_the_test_split_and_marks_what_is_level(store):
    results = {
        "0": {"metrics": {"linear_probe/top1": 0.7}, "errors": {"linear_probe/top1": 0.01}},
        "random student": {"metrics": {"linear_probe/top1": 0.3}, "errors": {}},
    }
    sentences = sentences_on_test(results, ["linear_probe/top1"])
    assert sentences == ["trial 0: linear_probe/top1 0.7000 ± 0.0100", "random student: linear_probe/top1 0.3000"]
    spread = vars(uncertainty.OverSeeds((0, 1), 0.5, 0.1, 0.4, 0.6))
    certainty = {"test": results, "level": [1], "seeds": [spread]}
    html = html_of([trial(0, 0.6), trial(1, 0.5)], store, certainty=certainty)
    assert html.index("0.7000 ± 0.0100") < html.index("is the best of")
    assert NOT_TOLD_APART in html
    assert "0.4000 to 0.6000" in html
