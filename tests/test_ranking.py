"""One order of trials for the report, the best pairs and the export."""

from __future__ import annotations

from ktray.search.ranking import pareto_front, ranked
from tests.reports import OBJECTIVES, trial


def test_a_trial_without_a_finite_value_comes_last_and_is_on_no_front() -> None:
    nowhere = {"linear_probe/top1": float("nan"), "cost/seconds": 1.0}
    trials = [trial(0, 0.1), trial(1, 0.2, objectives=nowhere), trial(2, 0.6, objectives={}), trial(3, 0.3)]
    assert [each.number for each in ranked(trials, OBJECTIVES)] == [3, 0, 1, 2]
    assert [each.number for each in pareto_front(trials, OBJECTIVES)] == [3]
