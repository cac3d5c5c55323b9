"""The ledger of a search: what runs next, what a killed driver leaves, and what is never done twice."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest

from ktray.errors import StoppedEarly, UserError
from ktray.search import study as studies
from ktray.search.ledger import folder
from ktray.search.study import Assignment, Study
from ktray.search.trial import Trial
from tests.source import ROOT
from tests.toy_space import FINITE, drive, score, tell, toy_space

NO_STOP = {"early_stop": None}
TWO = [{"metric": "linear_probe/top1", "mode": "max"}, {"metric": "cost/seconds", "mode": "min"}]
SINGLE = {
    **FINITE,
    "teacher": {"descriptor": {"kind": "hog", "cell": {"choice": [4, 7]}}},
    "transfer": {"kind": "clusters", "k": 5},
}


def states(study: Study) -> Counter[str]:
    return Counter(trial.state for trial in study.trials())


def given(study: Study) -> Assignment:
    answer = study.next()
    assert isinstance(answer, Assignment)
    return answer


def test_a_search_ends_at_its_target_with_the_rest_pruned(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 12, "concurrent": 2}))
    drive(study)
    assert study.reason == "all 12 trials are drawn and judged"
    pruned = study.close()
    assert states(study)["completed"] >= 1
    assert len(pruned) == states(study)["pruned"] == 12 - states(study)["completed"]
    assert study.best()[0].params["teacher"] == "rotation"


def test_without_early_stop_every_trial_runs_to_its_end_at_once(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, **NO_STOP))
    assert all(answer.final and answer.until == 9 for answer in drive(study))
    assert states(study) == {"completed": 6}


def test_a_search_too_small_for_a_promotion_still_ends_with_a_result(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 2, "concurrent": 2}))
    drive(study)
    assert states(study) == {"completed": 1, "paused": 1}
    assert study.best()[0].scores.keys() == {1, 3, 9}


def test_no_more_trials_run_at_once_than_the_budget_says(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path), concurrent=3)
    assert [isinstance(study.next(), Assignment) for _ in range(3)] == [True] * 3
    assert study.next() == "wait"


def test_a_promotion_goes_before_a_new_draw(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path))
    for _ in range(3):
        tell(study, given(study))
    promoted = given(study)
    assert promoted.until == 3
    assert promoted.trial.number == max(study.trials(), key=lambda trial: trial.scores[1]).number


def test_the_same_results_in_the_same_order_give_the_same_search(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    runs = []
    for name in ("first", "second"):
        study = Study.open(tmp_path, space, name, clock=lambda: 0.0)
        drive(study)
        study.close()
        runs.append(study.trials())
    assert runs[0] == runs[1]


def test_what_is_read_from_disk_is_what_the_driver_knew(tmp_path: Path) -> None:
    space = toy_space(tmp_path, objectives=TWO)
    study = Study.open(tmp_path, space)
    drive(study)
    assert studies.read(tmp_path, "toy").trials == study.trials()
    study.close()
    history = studies.read(tmp_path, "toy")
    assert history.trials == study.trials()
    assert history.objectives == space.objectives
    assert history.target == 6


def test_a_finished_search_that_is_started_again_does_nothing(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    study = Study.open(tmp_path, space)
    drive(study)
    study.close()
    again = Study.open(tmp_path, space)
    assert again.next() == "done"
    assert again.trials() == study.trials()


def test_a_resumed_search_goes_on_and_repeats_no_draw_of_its_own(tmp_path: Path) -> None:
    space = toy_space(tmp_path, start_with=[{"teacher": "hog", "transfer.k": 20}], **NO_STOP)
    for count in (2, 4, 6):
        with Study.open(tmp_path, space, trials=count) as study:
            drive(study)
    rates = [trial.params["student.schedule.lr"] for trial in study.trials()]
    assert len(set(rates)) == 6
    assert [trial.planned for trial in study.trials()] == [0, None, None, None, None, None]


def test_trials_that_an_interrupted_driver_left_running_come_first_under_their_number(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    with Study.open(tmp_path, space) as study:
        first, second = given(study), given(study)
        tell(study, second)
        assert study.close() == []
    again = Study.open(tmp_path, space)
    adopted = given(again)
    assert (adopted.trial, adopted.until) == (first.trial, 1)
    assert states(again) == {"running": 1, "paused": 1}


def test_a_promoted_trial_is_adopted_from_its_last_rung(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    with Study.open(tmp_path, space) as study:
        for _ in range(3):
            tell(study, given(study))
        promoted = given(study)
    adopted = given(Study.open(tmp_path, space))
    assert (adopted.trial.number, adopted.trial.epoch, adopted.until) == (promoted.trial.number, 1, 3)


def test_one_driver_at_a_time_has_a_study(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    with Study.open(tmp_path, space):
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            Study.open(tmp_path, space)
        Study.open(tmp_path, space, "another").close()
    Study.open(tmp_path, space).close()


def test_another_space_under_an_old_name_is_refused_with_the_difference(tmp_path: Path) -> None:
    Study.open(tmp_path, toy_space(tmp_path)).close()
    with pytest.raises(UserError, match=r"pair\.transfer\.k\.choice was \[5, 10, 20\], is \[5, 10\]"):
        Study.open(tmp_path, toy_space(tmp_path, {"transfer": {"kind": "clusters", "k": {"choice": [5, 10]}}}))
    Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 99})).close()


def test_a_study_name_is_a_plain_file_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="study name"):
        Study.open(tmp_path, toy_space(tmp_path), "../other")


def test_a_study_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    Study.open(tmp_path, toy_space(tmp_path)).close()
    with pytest.raises(UserError, match=r"no study 'toi'.*There are toy"):
        studies.read(tmp_path, "toi")


def test_more_trials_add_to_a_target_that_was_met_and_only_once(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 3, "concurrent": 2})
    with Study.open(tmp_path, space, trials="+2") as study:
        assert study.target == 2  # a new study has no target to add to
    with Study.open(tmp_path, space, trials=3) as study:
        drive(study)
        study.close()
    with Study.open(tmp_path, space, trials="+4") as study:
        drive(study, segments=1)  # killed
    with Study.open(tmp_path, space, trials="+4") as study:
        assert study.target == 7
        drive(study)
        assert study.drawn == 7
    with Study.open(tmp_path, space, trials="+4") as study:
        assert study.target == 7  # all drawn, but the end was never told: some are still paused
        assert study.next() == "done"
        study.close()
    with Study.open(tmp_path, space) as study:
        assert study.target == 7
    with Study.open(tmp_path, space, trials="+4") as study:
        assert study.target == 11


def test_a_changed_budget_in_the_file_is_a_new_target(tmp_path: Path) -> None:
    Study.open(tmp_path, toy_space(tmp_path), trials=2).close()
    assert Study.open(tmp_path, toy_space(tmp_path), "toy").target == 2
    assert Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 9}), "toy").target == 9


@pytest.mark.parametrize("wish", ["-3", "many", "0", "+"])
def test_a_target_is_a_number(tmp_path: Path, wish: str) -> None:
    with pytest.raises(UserError, match="no number of trials"):
        Study.open(tmp_path, toy_space(tmp_path), trials=wish)


def test_pruned_trials_stay_so_when_more_are_asked_for(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 4, "concurrent": 2})
    with Study.open(tmp_path, space) as study:
        drive(study)
        pruned = study.close()
    assert pruned
    with Study.open(tmp_path, space, trials="+6") as study:
        drive(study)
        assert [study.trials()[trial.number] for trial in pruned] == pruned


def test_a_draw_that_equals_an_earlier_one_costs_no_budget(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, FINITE, budget={"trials": 20, "concurrent": 1}, **NO_STOP))
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
    assert study.reason == "the space is exhausted"


def test_an_exhausted_space_ends_the_search(tmp_path: Path) -> None:
    space = toy_space(tmp_path, SINGLE, budget={"trials": 50, "concurrent": 4}, **NO_STOP)
    study = Study.open(tmp_path, space)
    drive(study, lambda trial, epoch: 0.5)
    assert (study.reason, states(study)["completed"]) == ("the space is exhausted", 2)
    study.close()
    again = Study.open(tmp_path, space, trials="+50")
    assert again.next() == "done"
    assert again.reason == "the space is exhausted"


def test_planned_draws_come_first_and_once(tmp_path: Path) -> None:
    planned = [{"teacher": "hog", "transfer.k": 20}, {"teacher": "rotation", "teacher.rotation.layer": "conv5"}]
    space = toy_space(tmp_path, start_with=planned)
    with Study.open(tmp_path, space) as study:
        given(study)
    with Study.open(tmp_path, space) as study:
        drive(study)
    hog, rotation, *others = study.trials()
    assert (hog.params["teacher"], hog.params["transfer.k"]) == ("hog", 20)
    assert (rotation.params["teacher"], rotation.params["teacher.rotation.layer"]) == ("rotation", "conv5")
    assert [trial.planned for trial in others] == [None] * 4


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_fails_its_trial(tmp_path: Path, value: float) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path))
    failed = tell(study, given(study), lambda trial, epoch: value)
    assert (failed.state, failed.cause) == ("failed", f"knn/top1 is {value} at epoch 1")
    study = Study.open(tmp_path, toy_space(tmp_path, **NO_STOP), "other")
    failed = tell(study, given(study), lambda trial, epoch: value)
    assert (failed.state, failed.cause) == ("failed", f"the objective linear_probe/top1 is {value}")


def test_a_missing_objective_fails_its_trial(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, **NO_STOP))
    assert study.finish(given(study).trial.number, {}, {}, {}, {}).cause == "the objective linear_probe/top1 is missing"


def test_ten_failures_in_a_row_stop_the_search_and_it_can_go_on(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 30, "concurrent": 1})
    with Study.open(tmp_path, space) as study:
        for number in range(10):
            study.fail(given(study).trial.number, f"no disk {number}")
        with pytest.raises(StoppedEarly, match="no disk 9"):
            study.next()
        study.close()
    with Study.open(tmp_path, space) as study:
        tell(study, given(study))
        assert states(study) == {"failed": 10, "paused": 1}


def test_a_success_between_failures_lets_a_search_go_on(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 30, "concurrent": 1}))
    for _ in range(3):
        for _ in range(6):
            study.fail(given(study).trial.number, "unlucky")
        tell(study, given(study))
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
    assert study.drawn == 12


def test_time_counts_over_resumes_and_what_is_paused_waits_for_more(tmp_path: Path) -> None:
    now = [0.0]
    space = toy_space(tmp_path, budget={"trials": 9, "concurrent": 1, "stop_after": "10s"})
    with Study.open(tmp_path, space, clock=lambda: now[0]) as study:
        now[0] = 6
        tell(study, given(study))
    now[0] = 100
    with Study.open(tmp_path, space, clock=lambda: now[0]) as study:
        last = given(study)
        now[0] = 105
        assert study.spent == 11
        assert study.next() == "wait"
        tell(study, last)
        assert study.next() == "done"
        assert study.reason == "stop_after (10 s) is used up"
        assert study.close() == []
    more = toy_space(tmp_path, budget={"trials": 9, "concurrent": 1, "stop_after": "1h"})
    with Study.open(tmp_path, more, clock=lambda: now[0]) as study:
        drive(study)
        assert study.drawn == 9


def test_a_report_for_another_epoch_is_a_mistake_of_the_driver(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path))
    number = given(study).trial.number
    with pytest.raises(ValueError, match="runs to epoch 1 of 9 and reports epoch 3"):
        study.report(number, 3, 0.5)
    with pytest.raises(KeyError):
        study.fail(17, "who?")


def test_the_pareto_front_holds_what_nothing_beats(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, objectives=TWO, budget={"trials": 4, "concurrent": 1}, **NO_STOP))
    for top1, seconds in ((0.5, 10.0), (0.6, 20.0), (0.5, 20.0), (0.4, 1.0)):
        values = {"linear_probe/top1": top1, "cost/seconds": seconds}
        study.finish(given(study).trial.number, values, values, {}, {"seconds": seconds})
    assert [trial.number for trial in study.best(pareto=True)] == [1, 0, 3]
    assert [trial.number for trial in study.best()] == [1, 0, 2, 3]


def test_keys_of_paused_trials_are_in_use_too(tmp_path: Path) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path))
    study.report(given(study).trial.number, 1, 0.5, {"student": "student-1", "evaluations": {"knn": "evaluation-1"}})
    assert studies.keys_in_use(tmp_path) == {"student-1", "evaluation-1"}


def test_optuna_reads_the_journal_as_an_ordinary_study(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 9, "concurrent": 2})
    with Study.open(tmp_path, space) as study:
        drive(study)
        study.close()
    backend = optuna.storages.journal.JournalFileBackend(str(folder(tmp_path, "toy") / "journal.log"))
    read = optuna.load_study(study_name="toy", storage=optuna.storages.JournalStorage(backend))
    assert read.best_trial.number == study.best()[0].number
    assert read.best_value == study.best()[0].objectives["linear_probe/top1"]
    for ours, theirs in zip(study.trials(), read.trials, strict=True):
        assert theirs.params == ours.params
        assert theirs.intermediate_values == ours.scores
        if ours.state == "pruned":
            assert (theirs.state.name, theirs.value) == ("PRUNED", ours.scores[ours.epoch])


DRIVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ktray.search import space
from ktray.search.study import Study
from tests.toy_space import tell
study = Study.open(Path(sys.argv[2]), space.load(Path(sys.argv[2]) / "toy.yaml", []))
print("open", flush=True)
while True:
    answer = study.next()
    if answer == "done":
        break
    tell(study, answer)
    print(answer.trial.number, flush=True)
"""


def test_a_killed_driver_leaves_a_study_that_goes_on(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 400, "concurrent": 1})
    seen: list[Trial] = []
    for _ in range(2):
        driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE, text=True)
        assert driver.stdout is not None
        for _ in range(8):
            assert driver.stdout.readline()
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        trials = studies.read(tmp_path, "toy").trials
        assert [trial.params for trial in trials[: len(seen)]] == [trial.params for trial in seen]
        assert len(trials) > len(seen)
        seen = trials
    with Study.open(tmp_path, space, trials=len(seen) + 2) as study:
        drive(study)
        assert states(study)["running"] == 0
        assert study.drawn == len(seen) + 2


@pytest.mark.parametrize("half", ['{"op_code": 8, "wor', '{"op_code": 8, "wor\n'])
def test_half_a_line_and_a_stale_lock_of_a_killed_driver_are_removed(tmp_path: Path, half: str) -> None:
    space = toy_space(tmp_path)
    with Study.open(tmp_path, space) as study:
        tell(study, given(study))
    before = study.trials()
    journal = folder(tmp_path, "toy") / "journal.log"
    with open(journal, "a") as file:
        file.write(half)
    os.symlink(journal, f"{journal}.lock")
    began = time.monotonic()
    with Study.open(tmp_path, space) as study:
        assert study.trials() == before
        drive(study)
        study.close()
    assert time.monotonic() - began < 20  # Optuna alone waits 30 s for the lock
    assert studies.read(tmp_path, "toy").trials == study.trials()


def test_a_driver_killed_between_the_last_value_and_the_state_has_finished_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = toy_space(tmp_path, **NO_STOP)
    with Study.open(tmp_path, space) as study, monkeypatch.context() as killed:
        answer = given(study)
        killed.setattr(optuna.storages.JournalStorage, "set_trial_state_values", _killed)
        with pytest.raises(KeyboardInterrupt):
            tell(study, answer)
    with Study.open(tmp_path, space) as study:
        assert study.best()[0].objectives == {"linear_probe/top1": score(answer.trial)}
        assert given(study).trial.number == 1
    backend = optuna.storages.journal.JournalFileBackend(str(folder(tmp_path, "toy") / "journal.log"))
    read = optuna.load_study(study_name="toy", storage=optuna.storages.JournalStorage(backend))
    assert read.trials[0].state.name == "COMPLETE"


def _killed(*_: object) -> None:
    raise KeyboardInterrupt
