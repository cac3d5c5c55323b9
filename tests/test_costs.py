"""What trials cost and stages will cost, from records alone."""

from __future__ import annotations

from ktray.artifact import Stage
from ktray.search.costs import estimate, marginal_seconds, seconds


def stage(name: str, number: int) -> Stage:
    return Stage(name, {"number": number}, {})


RECORDS = {"teacher-1": {"seconds": 100.0}, "features-1": {"seconds": 3.0}, "student-1": {"seconds": 20.0}}


def test_a_trial_costs_all_of_its_stages_as_if_alone() -> None:
    assert seconds(RECORDS) == 123.0


def test_a_trial_adds_what_it_computed_itself() -> None:
    assert marginal_seconds(RECORDS, ["student-1", "features-1", "another-trial's"]) == 23.0


def test_an_unknown_stage_takes_the_median_of_its_kind_and_a_known_one_its_own_time() -> None:
    known = stage("student", 0)
    records = {known.key: {"seconds": 50.0}, "student-a": {"seconds": 10.0}, "student-b": {"seconds": 12.0}}
    assert estimate([known, stage("student", 1), stage("student", 1)], records) == (62.0, 2, 0)


def test_stages_of_a_kind_without_a_past_are_counted_and_left_out() -> None:
    assert estimate([stage("pseudo_labels", 0), stage("clusters", 0)], {"pseudo_labels-1": {"seconds": 2.0}}) == (2.0, 1, 1)
