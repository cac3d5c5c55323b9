"""Teachers are judged before any student is paid for, and a poor one gets none."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ktray.errors import UserError
from ktray.runs.simulation import VirtualClock, simulate
from ktray.search.halving import RungScores, next_stop_epoch
from ktray.search.history import read_study
from ktray.search.observations import Observations
from ktray.search.space import Space
from ktray.search.space_file import EarlyStop, TeacherStop
from ktray.search.study import Study
from ktray.search.trial import State, Trial
from tests.test_simulate import seconds
from tests.toy_space import next_assignment, ranked_numbers, toy_space

EVALS = [{"kind": "knn"}, {"kind": "linear_probe"}, {"kind": "knn", "name": "teacher_knn", "of": "teacher"}]
JUDGED = {"metric": "knn/top1", "rungs": [1, 3, 9], "reduction": 3, "teacher": {"metric": "teacher_knn/top1", "keep": 0.5}}
STOP = EarlyStop(
    metric="knn/top1", rungs=(1, 3), reduction=2, mode="max", teacher=TeacherStop(metric="t/top1", keep=0.5, mode="max")
)


def judging(folder: Path, **fields: Any) -> Space:
    return toy_space(folder, {"evals": EVALS}, **{"early_stop": JUDGED, **fields})


def trial(
    number: int, teacher: str, score: float | None, state: State = "paused", scores: dict[int, float] | None = None
) -> Trial:
    pair = {"teacher": {"name": teacher} if teacher else None, "student": {"schedule": {"epochs": 3}}}
    return Trial(number, {}, pair, state, epoch=max(scores or {}, default=0), scores=scores or {}, teacher_score=score)


def test_a_pair_with_a_teacher_begins_at_rung_zero_and_one_without_at_its_first_student_rung() -> None:
    assert next_stop_epoch(STOP, trial(0, "a", None)) == 0
    assert next_stop_epoch(STOP, trial(0, "a", 0.5)) == 1
    assert next_stop_epoch(STOP, trial(0, "", None)) == 1
    assert next_stop_epoch(STOP.model_copy(update={"teacher": None}), trial(0, "a", None)) == 1


def test_the_best_half_of_the_teachers_gets_students() -> None:
    standings = RungScores(
        STOP, [trial(n, name, score) for n, (name, score) in enumerate([("a", 0.1), ("b", 0.3), ("c", 0.2)])]
    )
    assert standings.promotion() == 1
    standings.update(trial(1, "b", 0.3), trial(1, "b", 0.3, "running"))
    assert standings.promotion() == 2
    standings.update(trial(2, "c", 0.2), trial(2, "c", 0.2, "running"))
    assert standings.promotion() is None


def test_the_first_teacher_gets_students_at_once() -> None:
    assert RungScores(STOP, [trial(0, "a", 0.1)]).promotion() == 0


def test_many_trials_with_one_teacher_count_as_one() -> None:
    """Counted by trials, the second best of two teachers would be eleventh of twenty."""
    many = [trial(n, "a", 0.9, "running") for n in range(10)]
    poor = [trial(10 + n, name, 0.1 * n) for n, name in enumerate("bcd")]
    assert RungScores(STOP, [*many, *poor]).promotion() == 12


def test_a_trial_with_a_good_teacher_is_promoted_in_any_order_of_arrival() -> None:
    standings = RungScores(STOP, [trial(0, "a", 0.9, "completed", {3: 0.5}), trial(1, "a", 0.9), trial(2, "b", 0.1)])
    assert standings.promotion() == 1


def test_promotions_of_students_come_before_new_students() -> None:
    students = [trial(n, "a", 0.9, scores={1: 0.1 * n}) for n in range(2)]
    assert RungScores(STOP, [*students, trial(2, "a", 0.9)]).promotion() == 1


def test_a_better_teacher_that_failed_later_still_counts() -> None:
    judged = [trial(0, "a", 0.9, "running"), trial(1, "b", 0.1)]
    standings = RungScores(STOP, judged)
    assert standings.promotion() is None
    standings.update(judged[0], dataclasses.replace(judged[0], state="failed"))
    assert standings.promotion() is None


def test_a_smaller_score_is_better_in_mode_min() -> None:
    down = STOP.model_copy(update={"teacher": TeacherStop(metric="t/loss", reduction=2, mode="min")})
    assert RungScores(down, [trial(0, "a", 0.1), trial(1, "b", 0.3)]).promotion() == 0


def test_without_a_completed_trial_the_best_teacher_is_the_best_unfinished() -> None:
    standings = RungScores(STOP, [trial(0, "a", 0.9, "failed"), trial(1, "b", 0.1), trial(2, "c", 0.2)])
    assert standings.best_paused_if_none_completed() == 2


def test_trials_with_only_a_teacher_score_rank_behind_those_with_a_student_score(tmp_path: Path) -> None:
    space = judging(tmp_path)
    shown = [trial(0, "a", 0.9), trial(1, "b", 0.2, scores={1: 0.1}), trial(2, "c", 0.95), trial(3, "d", None, "running")]
    assert ranked_numbers(Observations(space, shown)) == [1, 2, 0, 3]


EPOCHS: dict[str, int] = {}
"""Key of a teacher that was simulated -> its epochs."""


def top1(stage: Any) -> dict[str, float]:
    """A teacher of more epochs is better, a descriptor worst."""
    if stage.name == "teacher":
        EPOCHS[stage.key] = stage.spec["epoch"]
    if stage.name != "evaluation":
        return {"loss": 1.0}
    return {"top1": EPOCHS.get(stage.inputs.get("teacher", ""), 1) / 10}


def test_a_poor_teacher_costs_no_features_clusters_or_student(tmp_path: Path) -> None:
    budget = {"trials": 24, "concurrent": 2}
    space, clock = judging(tmp_path, budget=budget, sampler="random"), VirtualClock()  # draws poor ones, too
    timeline = simulate(space, Study.open(tmp_path, space, clock=clock), clock, seconds, top1, cluster=2)
    poor = [trial for trial in timeline.trials if trial.is_stopped_at_teacher_rung]
    assert poor
    for each in poor:
        assert each.state == "pruned"
        assert "no student" in str(each.cause)
        assert set(each.keys) <= {"teacher", "evaluation"}
    computed = {key for _, key in timeline.computed}
    with_students = {each.keys["student"] for each in timeline.trials if "student" in each.keys}
    assert with_students
    assert with_students <= computed
    assert any(trial.state == "completed" for trial in timeline.trials)
    assert read_study(tmp_path, "toy").trials == timeline.trials


def test_a_trial_with_an_evaluated_teacher_resumes_after_a_kill(tmp_path: Path) -> None:
    space = judging(tmp_path)
    with Study.open(tmp_path, space) as study:
        first = next_assignment(study)
        assert (first.until, first.final) == (0, False)
        study.pause_at_rung(first.trial.number, 0, 0.5)
    with Study.open(tmp_path, space) as study:
        again = next_assignment(study)
        assert (again.trial.number, again.until) == (first.trial.number, 1)


@pytest.mark.parametrize(
    ("stop", "message"),
    [
        ({"metric": "teacher_knn/top1"}, "'reduction'.*or 'keep'"),
        ({"metric": "teacher_knn/top1", "reduction": 2, "keep": 0.5}, "'reduction'.*or 'keep'"),
        ({"metric": "knn/top1", "keep": 0.5}, "knn/top1 evaluates the student, not the teacher"),
        ({"metric": "teacher/loss", "keep": 0.5}, "no evaluation of the pair gives 'teacher/loss'"),
        ({"metric": "cost/seconds", "keep": 0.5}, "cost/seconds does not evaluate the teacher"),
        ({"metric": "teacher_knn/top1", "keep": 0.5, "mode": "min"}, "better direction of teacher_knn/top1 is 'max'"),
        ({"metric": "teacher_knn/top1", "keep": 0.0}, "keep is 0.0 and should be above 0"),
    ],
)
def test_a_metric_or_share_that_cannot_judge_teachers_is_refused(tmp_path: Path, stop: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        judging(tmp_path, early_stop={**JUDGED, "teacher": stop})


def test_the_effective_rank_judges_teachers_without_labels(tmp_path: Path) -> None:
    evals = [{"kind": "effective_rank"}, {"kind": "effective_rank", "name": "teacher_rank", "of": "teacher"}]
    stop = {**JUDGED, "metric": "effective_rank/rank", "teacher": {"metric": "teacher_rank/rank", "reduction": 2}}
    space = toy_space(tmp_path, {"evals": evals}, objectives=[{"metric": "effective_rank/rank"}], early_stop=stop)
    assert space.early_stop is not None
    assert space.early_stop.teacher is not None
    assert space.early_stop.teacher.mode == "max"
