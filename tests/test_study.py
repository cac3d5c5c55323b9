"""A study: what runs next, what a killed driver leaves, and what is never done twice."""

from __future__ import annotations

import math
from pathlib import Path

import optuna
import pytest

from ktray.cli.leaderboard import still_failed
from ktray.errors import SearchStopped
from ktray.search import history
from ktray.search.draws import SampledDraws
from ktray.search.journal import study_folder
from ktray.search.space_tree import Params
from ktray.search.study import Assignment, Study
from ktray.search.trial import Trial
from tests.toy_space import FINITE, drive, end_segment, next_assignment, states, toy_space

NO_STOP = {"early_stop": None}
TWO = [{"metric": "linear_probe/top1", "mode": "max"}, {"metric": "cost/seconds", "mode": "min"}]
SINGLE = {
    **FINITE,
    "teacher": {"descriptor": {"kind": "hog", "cell": {"choice": [4, 7]}}},
    "transfer": {"kind": "clusters", "k": 5},
}


def test_a_search_ends_at_its_target_with_the_rest_pruned(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 12, "concurrent": 2}))
    drive(study)
    assert study.stop_reason == "all 12 trials are drawn and judged"
    pruned = study.prune_and_close()
    assert states(study)["completed"] >= 1
    assert len(pruned) == states(study)["pruned"] == 12 - states(study)["completed"]
    assert study.ranked_trials()[0].params["teacher"] == "rotation"


def test_without_early_stop_every_trial_runs_to_its_end_at_once(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, **NO_STOP))
    assert all(answer.final and answer.until == 9 for answer in drive(study))
    assert states(study) == {"completed": 6}


@pytest.mark.parametrize("trials", [1, 2])
def test_a_search_too_small_for_a_promotion_still_ends_with_a_result(tmp_path: Path, trials: int) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, budget={"trials": trials, "concurrent": 2}))
    drive(study)
    assert states(study) == ({"completed": 1, "paused": 1} if trials == 2 else {"completed": 1})
    assert study.ranked_trials()[0].scores.keys() == {1, 3, 9}


def test_no_more_trials_run_at_once_than_the_budget_says(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 12, "concurrent": 3}))
    assert [isinstance(study.next(), Assignment) for _ in range(3)] == [True] * 3
    assert study.next() == "wait"


def test_a_promotion_goes_before_a_new_draw(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path))
    for _ in range(3):
        end_segment(study, next_assignment(study))
    promoted = next_assignment(study)
    assert promoted.until == 3
    assert promoted.trial.number == max(study.trials(), key=lambda trial: trial.scores[1]).number


def test_the_same_results_in_the_same_order_give_the_same_search(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    runs = []
    for name in ("first", "second"):
        study = Study.open(tmp_path, space, name, clock=lambda: 0.0)
        drive(study)
        study.prune_and_close()
        runs.append(study.trials())
    assert runs[0] == runs[1]


def test_a_draw_that_equals_an_earlier_one_costs_no_budget(tmp_path: Path) -> None:
    study = Study.open(
        tmp_path, toy_space(tmp_path, FINITE, budget={"trials": 20, "concurrent": 1}, sampler="random", **NO_STOP)
    )
    drive(study)
    assert states(study)["completed"] == 20
    assert states(study)["duplicate"] > 0
    pairs = [repr(trial.pair) for trial in study.trials() if trial.state == "completed"]
    assert len(set(pairs)) == 20
    for trial in study.trials():
        if trial.duplicate_of is not None:
            assert trial.pair == study.trials()[trial.duplicate_of].pair


def test_a_draw_of_other_parameters_that_is_the_same_pair_is_a_duplicate(tmp_path: Path) -> None:
    spelled = {"choice": [{"kind": "clusters", "k": 5}, {"kind": "clusters", "k": 5, "l2": True}]}  # l2 is on by default
    study = Study.open(tmp_path, toy_space(tmp_path, {**SINGLE, "transfer": spelled}, budget={"trials": 4}, **NO_STOP))
    drive(study, lambda trial, epoch: 0.5)
    assert states(study)["completed"] == 2
    assert study.stop_reason == "the space is exhausted"


def test_an_exhausted_space_ends_the_search(tmp_path: Path) -> None:
    space = toy_space(tmp_path, SINGLE, budget={"trials": 50, "concurrent": 4}, **NO_STOP)
    study = Study.open(tmp_path, space)
    drive(study, lambda trial, epoch: 0.5)
    assert (study.stop_reason, states(study)["completed"]) == ("the space is exhausted", 2)
    study.prune_and_close()
    again = Study.open(tmp_path, space, trials="+50")
    assert again.next() == "done"
    assert again.stop_reason == "the space is exhausted"


def test_planned_draws_come_first_and_once(tmp_path: Path) -> None:
    planned = [{"teacher": "hog", "transfer.k": 20}, {"teacher": "rotation", "teacher.rotation.layer": "conv5"}]
    space = toy_space(tmp_path, start_with=planned)
    with Study.open(tmp_path, space) as study:
        next_assignment(study)
    with Study.open(tmp_path, space) as study:
        drive(study)
    hog, rotation, *others = study.trials()
    assert (hog.params["teacher"], hog.params["transfer.k"]) == ("hog", 20)
    assert (rotation.params["teacher"], rotation.params["teacher.rotation.layer"]) == ("rotation", "conv5")
    assert [trial.planned for trial in others] == [None] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_fails_its_trial(tmp_path: Path, value: float) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path))
    failed = end_segment(study, next_assignment(study), lambda trial, epoch: value)
    assert (failed.state, failed.cause) == ("failed", f"knn/top1 is {value} at epoch 1")
    study = Study.open(tmp_path, toy_space(tmp_path, **NO_STOP), "other")
    failed = end_segment(study, next_assignment(study), lambda trial, epoch: value)
    assert (failed.state, failed.cause) == ("failed", f"the objective linear_probe/top1 is {value}")


def test_a_missing_objective_fails_its_trial(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, **NO_STOP))
    assert (
        study.finish(next_assignment(study).trial.number, {}, {}, {}, {}).cause == "the objective linear_probe/top1 is missing"
    )


def test_ten_failures_in_a_row_stop_the_search_and_it_can_go_on(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 30, "concurrent": 1})
    with Study.open(tmp_path, space) as study:
        for number in range(10):
            study.fail(next_assignment(study).trial.number, f"no disk {number}")
        with pytest.raises(SearchStopped, match="no disk 9"):
            study.next()
        study.prune_and_close()
    with Study.open(tmp_path, space) as study:
        end_segment(study, next_assignment(study))
        assert states(study) == {"failed": 10, "paused": 1}


def test_trials_that_fail_with_one_stage_are_one_failure(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 40, "concurrent": 16}))
    running = [next_assignment(study).trial.number for _ in range(16)]
    for number in running[:10]:
        study.fail(number, "the teacher cannot be trained", "teacher-1")
    for number in running[10:14]:
        study.fail(number, f"a student of its own, {number}", f"student-{number}")
    next_assignment(study)
    for _ in range(5):
        study.fail(next_assignment(study).trial.number, "unlucky")
    with pytest.raises(SearchStopped, match=r"19 trials failed one after the other; .* unlucky"):
        study.next()


def test_a_success_between_failures_lets_a_search_go_on(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 30, "concurrent": 1}))
    for _ in range(3):
        for _ in range(6):
            study.fail(next_assignment(study).trial.number, "unlucky")
        end_segment(study, next_assignment(study))
    assert states(study)["failed"] == 18


def test_a_combination_that_is_no_pair_fails_without_running(tmp_path: Path) -> None:
    schedule = {"epochs": 9, "kind": {"choice": ["warmup_stable", "constant"]}, "warmup": {"choice": [0.0, 1.0]}}
    student = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": schedule}
    space = toy_space(tmp_path, {"student": student}, budget={"trials": 12, "concurrent": 1}, **NO_STOP)
    study = Study.open(tmp_path, space)
    drive(study)
    failed = [trial for trial in study.trials() if trial.state == "failed"]
    assert failed
    assert "a constant schedule has no warmup" in str(failed[0].cause)
    assert study.draw_count == 12


OFTEN_NO_PAIR = {"epochs": 9, "kind": {"choice": ["warmup_stable", "constant"]}, "warmup": {"choice": [0.0, 1.0, 2.0, 3.0]}}


@pytest.mark.parametrize("seed", range(3))
def test_draws_that_are_no_pair_stop_no_search_that_has_others(tmp_path: Path, seed: int) -> None:
    student = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": OFTEN_NO_PAIR}
    budget = {"trials": 60, "concurrent": 32}
    study = Study.open(tmp_path, toy_space(tmp_path, {"student": student}, budget=budget, seed=seed, sampler="random"))
    running = []
    while isinstance(answer := study.next(), Assignment):
        running.append(answer)
    assert len(running) > 20
    assert states(study)["failed"] > 10


class Barren(SampledDraws):
    """As drawn, but never with a warmup that its schedule can have."""

    def _make_trial(self, params: Params, planned: int | None = None) -> Trial:
        return super()._make_trial({**params, "student.schedule.kind": "constant", "student.schedule.warmup": 1.0}, planned)


def test_a_search_that_finds_no_pair_at_all_stops_after_ten_draws(tmp_path: Path) -> None:
    student = {"backbone": {"kind": "alexnet", "width": 0.125}, "schedule": OFTEN_NO_PAIR}
    space = toy_space(tmp_path, {"student": student}, budget={"trials": 60, "concurrent": 4})
    for drawn in (10, 20):
        with Study.open(tmp_path, space, draws=Barren(space)) as study:
            with pytest.raises(SearchStopped, match=r"10 trials failed .* a constant schedule has no warmup"):
                study.next()
            assert states(study) == {"failed": drawn}


def test_time_counts_over_resumes_and_what_is_paused_waits_for_more(tmp_path: Path) -> None:
    now = [0.0]
    space = toy_space(tmp_path, budget={"trials": 9, "concurrent": 1, "stop_after": "10s"})
    with Study.open(tmp_path, space, clock=lambda: now[0]) as study:
        now[0] = 6
        end_segment(study, next_assignment(study))
    now[0] = 100
    with Study.open(tmp_path, space, clock=lambda: now[0]) as study:
        last = next_assignment(study)
        now[0] = 105
        assert study.elapsed == 11
        assert study.next() == "wait"
        end_segment(study, last)
        assert study.next() == "done"
        assert study.stop_reason == "stop_after (10 s) is used up"
        assert study.prune_and_close() == []
    more = toy_space(tmp_path, budget={"trials": 9, "concurrent": 1, "stop_after": "1h"})
    with Study.open(tmp_path, more, clock=lambda: now[0]) as study:
        drive(study)
        assert study.draw_count == 9


def test_a_report_for_another_epoch_is_a_mistake_of_the_driver(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path))
    number = next_assignment(study).trial.number
    with pytest.raises(ValueError, match="runs to epoch 1 of 9 and reports epoch 3"):
        study.pause_at_rung(number, 3, 0.5)
    with pytest.raises(KeyError):
        study.fail(17, "who?")


def test_the_pareto_front_holds_what_nothing_beats(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, objectives=TWO, budget={"trials": 4, "concurrent": 1}, **NO_STOP))
    for top1, seconds in ((0.5, 10.0), (0.6, 20.0), (0.5, 20.0), (0.4, 1.0)):
        values = {"linear_probe/top1": top1, "cost/seconds": seconds}
        study.finish(next_assignment(study).trial.number, values, values, {}, {"seconds": seconds})
    assert [trial.number for trial in study.ranked_trials(pareto=True)] == [1, 0, 3]
    assert [trial.number for trial in study.ranked_trials()] == [1, 0, 2, 3]


def test_keys_of_paused_trials_are_in_use_too(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path))
    study.pause_at_rung(
        next_assignment(study).trial.number, 1, 0.5, {"student": "student-1", "evaluations": {"knn": "evaluation-1"}}
    )
    assert history.keys_in_use(tmp_path) == {"student-1", "evaluation-1"}


def test_optuna_reads_the_journal_as_an_ordinary_study(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 9, "concurrent": 2})
    with Study.open(tmp_path, space) as study:
        drive(study)
        study.prune_and_close()
    backend = optuna.storages.journal.JournalFileBackend(str(study_folder(tmp_path, "toy") / "journal.log"))
    read = optuna.load_study(study_name="toy", storage=optuna.storages.JournalStorage(backend))
    assert read.best_trial.number == study.ranked_trials()[0].number
    assert read.best_value == study.ranked_trials()[0].objectives["linear_probe/top1"]
    for ours, theirs in zip(study.trials(), read.trials, strict=True):
        assert theirs.params == ours.params
        assert theirs.intermediate_values == ours.scores
        if ours.state == "pruned":
            assert (theirs.state.name, theirs.value) == ("PRUNED", ours.scores[ours.epoch])


def test_trials_of_a_study_hold_what_their_pairs_have_in_common_once(tmp_path: Path) -> None:
    with Study.open(tmp_path, toy_space(tmp_path, early_stop=None)) as study:
        drive(study)
        drawn = [trial.pair for trial in study.trials()]
    with Study.open(tmp_path, toy_space(tmp_path, early_stop=None)) as again:
        read_again = [trial.pair for trial in again.trials()]
    assert read_again == drawn
    for pairs in (drawn, read_again):
        assert len({id(pair["data"]) for pair in pairs}) == 1


def test_with_several_objectives_rungs_stop_on_their_own_metric_and_all_objectives_rank(tmp_path: Path) -> None:
    """The faster half has the lower scores at the rung: it is stopped, and among the others no objective is forgotten."""
    stop = {"metric": "knn/top1", "rungs": [1, 9], "reduction": 2}
    space = toy_space(tmp_path, objectives=TWO, early_stop=stop, budget={"trials": 8, "concurrent": 8})
    study = Study.open(tmp_path, space)
    first = [next_assignment(study).trial.number for _ in range(8)]
    for number in first:
        study.pause_at_rung(number, 1, 0.1 * number)
    for _ in range(4):
        promoted = next_assignment(study).trial.number
        values = {"linear_probe/top1": 0.5 - 0.01 * promoted, "cost/seconds": 100.0 - promoted, "knn/top1": 0.5}
        study.finish(promoted, values, values, {}, {"seconds": 1.0})
    assert {trial.number for trial in study.ranked_trials()} == {4, 5, 6, 7}
    assert [trial.number for trial in study.ranked_trials()] == [4, 5, 6, 7]  # by the first objective
    assert {trial.number for trial in study.ranked_trials(pareto=True)} == {4, 5, 6, 7}  # each is best in some trade


def test_the_pairs_of_failed_trials_are_drawn_again_if_one_asks_for_it(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 4, "concurrent": 1}, **NO_STOP)
    with Study.open(tmp_path, space) as study:
        while not isinstance(assignment := study.next(), str):
            study.fail(assignment.trial.number, "the images are gone")
    failed = [trial.params for trial in study.trials()]
    assert len(failed) == 4
    with Study.open(tmp_path, space) as study:
        assert study.next() == "done"
    assert still_failed(study.trials())
    with Study.open(tmp_path, space, retry=True) as study:
        assert study.target == 8
        drive(study, lambda trial, epoch: 0.5)
    assert not still_failed(study.trials())
    assert [(trial.params, trial.state) for trial in study.trials()[4:]] == [(params, "completed") for params in failed]
    with Study.open(tmp_path, space, retry=True) as study:  # nothing is left to try again
        assert (study.target, study.next()) == (8, "done")
    with Study.open(tmp_path, space, trials="+1") as study:
        drive(study, lambda trial, epoch: 0.5)
        assert len([trial for trial in study.trials() if trial.state != "duplicate"]) == 9


def test_a_retry_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 3, "concurrent": 1}, **NO_STOP)
    with Study.open(tmp_path, space) as study:
        while not isinstance(assignment := study.next(), str):
            study.fail(assignment.trial.number, "the images are gone")
    failed = [trial.params for trial in study.trials()]
    with Study.open(tmp_path, space, retry=True) as study:
        study.next()  # killed while it runs
    with Study.open(tmp_path, space, retry=True) as study:
        assert study.target == 6
        drive(study, lambda trial, epoch: 0.5)
    assert {repr(trial.params) for trial in study.trials() if trial.state == "completed"} >= {repr(params) for params in failed}
