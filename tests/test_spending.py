"""Real searches that mind what they spend: poor teachers get no students, prices are learned, old results are used."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.searches import SPACE, Home, toy_space

pytestmark = pytest.mark.slow
EVALS = [{"kind": "knn"}, {"kind": "knn", "name": "teacher_knn", "of": "teacher"}]
TEACHER = {"metric": "teacher_knn/top1", "keep": 0.5}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """A home with one finished search over two layers of one teacher and HOG, judged before they got students."""
    home = Home(tmp_path_factory.mktemp("spending") / "home")
    space = toy_space(home.path.parent, early_stop={**SPACE["early_stop"], "teacher": TEACHER}, pair__evals=EVALS)
    ended = home.run("search", space, "--json")
    assert ended.code == 0, ended.err
    return home


def test_a_poor_teacher_got_no_features_no_clusters_and_no_student(home: Home) -> None:
    trials = home.study().trials
    poor = [trial for trial in trials if trial.is_stopped_at_teacher_rung]
    good = [trial for trial in trials if trial.scores]
    assert poor
    assert any(trial.state == "completed" for trial in good)
    assert all(trial.state == "pruned" and "no student" in str(trial.cause) for trial in poor)
    assert all(set(trial.keys) <= {"teacher", "evaluation"} for trial in poor)
    judged = {trial.keys["features"] for trial in good}
    assert {home.record(key)["inputs"].get("teacher") for key in judged} == {trial.keys.get("teacher") for trial in good}
    assert len(home.keys("features")) == len(judged)


def test_what_the_trials_were_charged_is_what_their_artifacts_say(home: Home) -> None:
    charged = {key: s for trial in home.study().trials for part in trial.attributed_costs.values() for key, s in part.items()}
    rests = {key for trial in home.study().trials for key in trial.artifact_keys}
    assert charged.keys() <= home.artifacts().keys()
    # What came out of another trial's forward pass was never ordered, and is free.
    assert all(set(home.record(key)["together"]) & charged.keys() for key in rests - charged.keys())
    assert all(seconds == home.record(key)["seconds"] for key, seconds in charged.items())


def test_a_plan_for_a_changed_space_knows_what_it_would_cost(home: Home, tmp_path: Path) -> None:
    wider = toy_space(tmp_path, study="wider", pair__transfer__k={"choice": [5, 10, 20]}, start_with=[{"transfer.k": 20}])
    estimate = home.run("plan", wider, "--json").answer["estimate"]
    assert 0 < estimate["low"] < estimate["seconds"] < estimate["high"]


def test_a_changed_space_begins_with_the_old_results_and_the_old_teachers(home: Home, tmp_path: Path) -> None:
    changes = {"pair__evals": EVALS, "pair__transfer__k": {"choice": [5, 10, 20]}, "start_with": []}
    stop = {**SPACE["early_stop"], "teacher": TEACHER}
    changed = toy_space(tmp_path, **changes, early_stop=stop, budget={"trials": 3, "concurrent": 3})
    refused = home.run("search", changed, "--warm-start", "toy")
    assert refused.code == 2
    assert "pair.transfer.k.choice was [5, 10], is [5, 10, 20]" in refused.err
    before = home.keys("teacher")
    ended = home.run("search", changed, "--name", "changed", "--warm-start", "toy", "--json")
    assert ended.code == 0, ended.err
    assert home.keys("teacher") == before
    assert home.study("changed").target == 3
