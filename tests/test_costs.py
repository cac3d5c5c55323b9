"""What stages will cost, from records alone."""

from __future__ import annotations

from ktray.artifact import Stage
from ktray.search.costs import estimate


def stage(name: str, number: int) -> Stage:
    return Stage(name, {"number": number}, {})


def test_an_unknown_stage_takes_the_median_of_its_kind_and_a_known_one_its_own_time() -> None:
    known = stage("student", 0)
    records = {known.key: {"seconds": 50.0}, "student-a": {"seconds": 10.0}, "student-b": {"seconds": 12.0}}
    assert estimate([known, stage("student", 1), stage("student", 1)], records) == (62.0, 2, 0)


def test_stages_of_a_kind_without_a_past_are_counted_and_left_out() -> None:
    assert estimate([stage("pseudo_labels", 0), stage("clusters", 0)], {"pseudo_labels-1": {"seconds": 2.0}}) == (2.0, 1, 1)
