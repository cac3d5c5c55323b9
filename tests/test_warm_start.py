"""Warm start: a study learns from the results of another one, each at the rung that it reached."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktray.errors import UserError
from ktray.search import warm_start
from ktray.search.budget import PrefixSuffixSeconds
from ktray.search.history import read_study
from ktray.search.sampler import Sampler
from ktray.search.space import Space
from ktray.search.study import Study
from tests.toy_space import PAIR, drive, next_assignment, states, toy_space

SHORT = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": {"epochs": 9, "lr": {"log_float": [0.01, 0.1]}}}
LONG = {**SHORT, "schedule": {**SHORT["schedule"], "epochs": 27}}


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """A home with a finished study `toy` of 40 trials in which rotation is better than HOG."""
    with Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 40, "concurrent": 2})) as study:
        drive(study)
        study.prune_and_close()
    return tmp_path


def observed(home: Path, space: Space) -> list[Any]:
    return warm_start.observation_trials({"toy": warm_start.applicable_results(space, read_study(home, "toy"))})


def test_results_of_the_same_space_are_taken_over_unchanged(old: Path) -> None:
    theirs = read_study(old, "toy").trials
    ours = observed(old, toy_space(old))
    assert [trial.number for trial in ours] == list(range(-40, 0))
    for trial, taken in zip(theirs, ours, strict=True):
        assert taken.params == trial.params
        assert (taken.state == "completed") == (trial.state == "completed")
        assert taken.last_rung_and_score == trial.last_rung_and_score or taken.objectives == trial.objectives


def test_a_student_with_fewer_epochs_counts_by_its_scores_at_rungs(old: Path) -> None:
    stop = {"metric": "knn/top1", "rungs": [1, 3, 9, 27], "reduction": 3}
    ours = observed(old, toy_space(old, {"student": LONG}, early_stop=stop))
    assert {trial.state for trial in ours} == {"paused"}
    assert max(trial.last_rung_and_score[0] for trial in ours) == 9


def test_a_student_with_more_epochs_counts_by_its_scores_up_to_the_length_here(old: Path) -> None:
    short = {**SHORT, "schedule": {**SHORT["schedule"], "epochs": 3}}
    ours = observed(old, toy_space(old, {"student": short}, early_stop={"metric": "knn/top1", "rungs": [1, 3], "reduction": 3}))
    assert max(trial.last_rung_and_score[0] for trial in ours) == 3
    assert not any(trial.objectives for trial in ours)


def test_unknown_parameters_and_values_outside_the_space_are_dropped(old: Path) -> None:
    narrow = {**SHORT, "schedule": {"epochs": 9, "lr": {"log_float": [0.01, 0.03]}}}
    space = toy_space(old, {"student": narrow, "transfer": {"kind": "clusters", "k": {"choice": [5, 40]}}})
    for taken, trial in zip(observed(old, space), read_study(old, "toy").trials, strict=True):
        assert ("student.schedule.lr" in taken.params) == (trial.params["student.schedule.lr"] <= 0.03)
        assert taken.params.get("transfer.k", 5) == 5
        assert taken.params["teacher"] == trial.params["teacher"]


def test_parameters_of_a_branch_that_no_longer_exists_are_dropped(old: Path) -> None:
    hog = PAIR["teacher"]["one_of"]["hog"]
    space = toy_space(old, {"teacher": {"one_of": {"hog": hog, "other": {"descriptor": {"kind": "raw_pixels"}}}}})
    assert {name for trial in observed(old, space) for name in trial.params if name.startswith("teacher.")} == {
        "teacher.hog.descriptor.cell"
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"evals": [{"kind": "knn", "k": 5}, {"kind": "linear_probe", "l2": 0.01}]},
        {"data": {**PAIR["data"], "seed": 7}},
    ],
)
def test_metrics_of_another_evaluation_or_data_set_are_not_used(old: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no result of the study 'toy' applies to this space"):
        Study.open(old, toy_space(old, changes), "new", warm_start="toy")
    assert not (old / "studies/new/journal.log").exists() or states_of(old) == {}


def states_of(home: Path) -> dict[str, int]:
    with Study.open(home, toy_space(home), "new") as study:
        return dict(states(study))


def test_the_first_draws_follow_the_good_results_of_the_other_study_also_after_a_resume(old: Path) -> None:
    wider = {"transfer": {"kind": "clusters", "k": {"choice": [5, 10, 20, 40]}}}
    space = toy_space(old, wider)
    with Study.open(old, space, "new", warm_start="toy") as study:
        draws = [next_assignment(study).trial.params for _ in range(2)]
        assert study.draw_count == 2
        assert "toy" in study._journal.notes()["warm_start"]
    cold = Study.open(old, space, "cold")
    assert [next_assignment(cold).trial.params for _ in range(2)] != draws
    again = Study.open(old, space, "again", warm_start="toy")
    assert [next_assignment(again).trial.params for _ in range(2)] == draws
    ours = Sampler(space)
    for trial in observed(old, space):
        ours.record_trial(trial)
    assert [ours.propose(count, PrefixSuffixSeconds())["teacher"] for count in range(20)].count("rotation") >= 15


def test_giving_the_same_study_again_changes_nothing_although_it_has_new_trials(old: Path) -> None:
    Study.open(old, toy_space(old), "new", warm_start="toy").prune_and_close()
    first = Study.open(old, toy_space(old), "new")._journal.notes()
    with Study.open(old, toy_space(old), trials="+5") as study:
        drive(study)
    with Study.open(old, toy_space(old), "new", warm_start="toy") as study:
        assert study._journal.notes()["warm_start"] == first["warm_start"]


def test_a_missing_study_and_the_study_itself_are_refused(old: Path) -> None:
    with pytest.raises(UserError, match="no study 'gone'"):
        Study.open(old, toy_space(old), "new", warm_start="gone")
    with pytest.raises(UserError, match="cannot start from its own results"):
        Study.open(old, toy_space(old), "toy", warm_start="toy")
