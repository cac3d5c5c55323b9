"""A study that was interrupted, killed, or is asked for more goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ktray import cli
from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.search.draws import pair_identity
from ktray.search.history import read_study
from ktray.search.journal import read, study_folder, trial_from
from ktray.search.study import Study
from ktray.search.trial import Trial
from ktray.stores.locks import lock_home
from tests import searches
from tests.source import ROOT
from tests.toy_space import FINITE, drive, end_segment, next_assignment, score, states, toy_space

NO_STOP = {"early_stop": None}
TWO = [{"metric": "linear_probe/top1", "mode": "max"}, {"metric": "cost/seconds", "mode": "min"}]
SINGLE = {
    **FINITE,
    "teacher": {"descriptor": {"kind": "hog", "cell": {"choice": [4, 7]}}},
    "transfer": {"kind": "clusters", "k": 5},
}


def test_what_is_read_from_disk_is_what_the_driver_knew(tmp_path: Path) -> None:
    space = toy_space(tmp_path, objectives=TWO)
    study = Study.open(tmp_path, space)
    drive(study)
    assert read_study(tmp_path, "toy").trials == study.trials()
    study.prune_and_close()
    history = read_study(tmp_path, "toy")
    assert history.trials == study.trials()
    assert history.objectives == space.objectives
    assert history.target == 6


def test_a_finished_search_that_is_started_again_does_nothing(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    study = Study.open(tmp_path, space)
    drive(study)
    study.prune_and_close()
    again = Study.open(tmp_path, space)
    assert again.next() == "done"
    assert again.trials() == study.trials()


def test_a_resumed_search_goes_on_and_repeats_no_draw_of_its_own(tmp_path: Path) -> None:
    space = toy_space(tmp_path, start_with=[{"teacher": "hog", "transfer.k": 20}], **NO_STOP)
    for count in (2, 4, 6):
        with Study.open(tmp_path, space, trials=count) as study:
            drive(study)
    assert len({canonical(dict(trial.params)) for trial in study.trials()}) == 6
    assert [trial.planned for trial in study.trials()] == [0, None, None, None, None, None]


def test_trials_that_an_interrupted_driver_left_running_come_first_under_their_number(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    with Study.open(tmp_path, space) as study:
        first, second = next_assignment(study), next_assignment(study)
        end_segment(study, second)
        assert study.prune_and_close() == []
    again = Study.open(tmp_path, space)
    adopted = next_assignment(again)
    assert (adopted.trial, adopted.until) == (first.trial, 1)
    assert states(again) == {"running": 1, "paused": 1}


def test_a_promoted_trial_is_adopted_from_its_last_rung(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    with Study.open(tmp_path, space) as study:
        for _ in range(3):
            end_segment(study, next_assignment(study))
        promoted = next_assignment(study)
    adopted = next_assignment(Study.open(tmp_path, space))
    assert (adopted.trial.number, adopted.trial.epoch, adopted.until) == (promoted.trial.number, 1, 3)


def test_one_driver_at_a_time_has_a_study(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    with Study.open(tmp_path, space):
        with pytest.raises(UserError, match=f"process {os.getpid()}"):
            Study.open(tmp_path, space)
        Study.open(tmp_path, space, "another").prune_and_close()
    Study.open(tmp_path, space).prune_and_close()


def test_another_space_under_an_old_name_is_refused_with_the_difference(tmp_path: Path) -> None:
    with Study.open(tmp_path, toy_space(tmp_path)) as study:
        study.next()
    with pytest.raises(UserError, match=r"pair\.transfer\.k\.choice was \[5, 10, 20\], is \[5, 10\]"):
        Study.open(tmp_path, toy_space(tmp_path, {"transfer": {"kind": "clusters", "k": {"choice": [5, 10]}}}))
    Study.open(tmp_path, toy_space(tmp_path, budget={"trials": 99})).prune_and_close()


def test_a_study_without_any_trial_may_be_begun_with_another_space(tmp_path: Path) -> None:
    Study.open(tmp_path, toy_space(tmp_path)).prune_and_close()
    Study.open(tmp_path, toy_space(tmp_path, {"transfer": {"kind": "clusters", "k": 5}})).prune_and_close()
    assert read_study(tmp_path, "toy").space.resume_relevant_fields()["pair"]["transfer"]["k"] == 5


def test_the_tolerance_for_unreadable_images_may_change_and_makes_no_other_pair(tmp_path: Path) -> None:
    spaces = [
        toy_space(tmp_path, {"data": {"kind": "synthetic", "count": 60, "classes": 3, "max_unreadable": tolerance}})
        for tolerance in (0.01, 0.3)
    ]
    with Study.open(tmp_path, spaces[0]) as study:
        study.next()
        (trial,) = study.trials()
    with Study.open(tmp_path, spaces[1]) as study:
        other = spaces[1].pair(trial.params).model_dump(mode="json")
    assert other != trial.pair
    assert pair_identity(other) == pair_identity(trial.pair)


def test_a_study_name_is_a_plain_file_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="study name"):
        Study.open(tmp_path, toy_space(tmp_path), "../other")


def test_a_study_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    Study.open(tmp_path, toy_space(tmp_path)).prune_and_close()
    with pytest.raises(UserError, match=r"no study 'toi'.*Existing studies: toy"):
        read_study(tmp_path, "toi")


def test_more_trials_add_to_a_target_that_was_met_and_only_once(tmp_path: Path) -> None:
    space = toy_space(tmp_path, budget={"trials": 3, "concurrent": 2})
    with Study.open(tmp_path, space, trials="+2") as study:
        assert study.target == 2  # a new study has no target to add to
    with Study.open(tmp_path, space, trials=3) as study:
        drive(study)
        study.prune_and_close()
    with Study.open(tmp_path, space, trials="+4") as study:
        drive(study, segments=1)  # killed
    with Study.open(tmp_path, space, trials="+4") as study:
        assert study.target == 7
        drive(study)
        assert study.draw_count == 7
    with Study.open(tmp_path, space, trials="+4") as study:
        assert study.target == 7  # all drawn, but the end was never told: some are still paused
        assert study.next() == "done"
        study.prune_and_close()
    with Study.open(tmp_path, space) as study:
        assert study.target == 7
    with Study.open(tmp_path, space, trials="+4") as study:
        assert study.target == 11


def test_a_changed_budget_in_the_file_is_a_new_target(tmp_path: Path) -> None:
    Study.open(tmp_path, toy_space(tmp_path), trials=2).prune_and_close()
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
        pruned = study.prune_and_close()
    assert pruned
    with Study.open(tmp_path, space, trials="+6") as study:
        drive(study)
        assert [study.trials()[trial.number] for trial in pruned] == pruned


DRIVER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from ktray.search import space
from ktray.search.study import Study
from tests.toy_space import end_segment
study = Study.open(Path(sys.argv[2]), space.load(Path(sys.argv[2]) / "toy.yaml", []))
print("open", flush=True)
while True:
    answer = study.next()
    if answer == "done":
        break
    end_segment(study, answer)
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
        trials = read_study(tmp_path, "toy").trials
        assert [trial.params for trial in trials[: len(seen)]] == [trial.params for trial in seen]
        assert len(trials) > len(seen)
        seen = trials
    with Study.open(tmp_path, space, trials=len(seen) + 2) as study:
        drive(study)
        assert states(study)["running"] == 0
        assert study.draw_count == len(seen) + 2


@pytest.mark.parametrize("half", ['{"op_code": 8, "wor', '{"op_code": 8, "wor\n'])
def test_half_a_line_and_a_stale_lock_of_a_killed_driver_are_removed(tmp_path: Path, half: str) -> None:
    space = toy_space(tmp_path)
    with Study.open(tmp_path, space) as study:
        end_segment(study, next_assignment(study))
    before = study.trials()
    journal = study_folder(tmp_path, "toy") / "journal.log"
    with open(journal, "a") as file:
        file.write(half)
    os.symlink(journal, f"{journal}.lock")
    began = time.monotonic()
    with Study.open(tmp_path, space) as study:
        assert study.trials() == before
        drive(study)
        study.prune_and_close()
    assert time.monotonic() - began < 20  # Optuna alone waits 30 s for the lock
    assert read_study(tmp_path, "toy").trials == study.trials()


def test_a_driver_killed_between_the_last_value_and_the_state_has_finished_the_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = toy_space(tmp_path, **NO_STOP)
    with Study.open(tmp_path, space) as study, monkeypatch.context() as killed:
        answer = next_assignment(study)
        killed.setattr(optuna.storages.JournalStorage, "set_trial_state_values", _killed)
        with pytest.raises(KeyboardInterrupt):
            end_segment(study, answer)
    with Study.open(tmp_path, space) as study:
        assert study.ranked_trials()[0].objectives == {"linear_probe/top1": score(answer.trial)}
        assert next_assignment(study).trial.number == 1
    backend = optuna.storages.journal.JournalFileBackend(str(study_folder(tmp_path, "toy") / "journal.log"))
    loaded = optuna.load_study(study_name="toy", storage=optuna.storages.JournalStorage(backend))
    assert loaded.trials[0].state.name == "COMPLETE"


def _killed(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_time_of_a_search_that_is_killed_counts_though_no_trial_was_settled(tmp_path: Path) -> None:
    space, now = toy_space(tmp_path, budget={"trials": 6, "concurrent": 2, "stop_after": 100}), [0.0]
    with Study.open(tmp_path, space, clock=lambda: now[0]) as study:
        next_assignment(study)
        for now[0] in (10.0, 29.0, 45.0, 60.0):
            study.save_elapsed_if_due()
    again = Study.open(tmp_path, space, clock=lambda: now[0])
    assert again.elapsed == 45
    now[0] += 60
    assert again.next() == "done"


def test_what_a_paused_trial_has_cost_is_known_to_the_next_session(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    with Study.open(tmp_path, space) as study:
        first = next_assignment(study)
        study.pause_at_rung(first.trial.number, first.until, 0.5, cost={"marginal_seconds": 7.0})
    assert Study.open(tmp_path, space).trials()[0].cost == {"marginal_seconds": 7.0}


def test_a_study_is_held_from_pruning_until_it_is_closed(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    study = Study.open(tmp_path, space)
    drive(study)
    assert {trial.state for trial in study.prune_paused()} == {"pruned"}
    with pytest.raises(UserError, match="is being searched"):
        Study.open(tmp_path, space)
    assert study.prune_and_close() == []
    Study.open(tmp_path, space).prune_and_close()


# ---- what is refused leaves nothing


def listing(home: Path) -> list[str]:
    return sorted(str(path.relative_to(home)) for path in home.rglob("*"))


@pytest.mark.parametrize("asked", [[], ["--name", "other"], ["--trials", "+3"], ["--json"]], ids=" ".join)
def test_a_search_that_is_refused_because_its_home_is_in_use_leaves_nothing(
    asked: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    home, space = tmp_path / "home", searches.toy_space(tmp_path)
    with lock_home(home):
        before = listing(home)
        assert cli.main(["search", str(space), "--home", str(home), *asked]) == 2
        assert listing(home) == before
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert f"is in use by process {os.getpid()}" in err


def test_a_study_that_cannot_begin_because_there_is_nothing_to_learn_from_leaves_nothing(tmp_path: Path) -> None:
    space = toy_space(tmp_path)
    (tmp_path / "home").mkdir()
    with pytest.raises(UserError, match="no study 'absent'"):
        Study.open(tmp_path / "home", space, warm_start="absent")
    assert not (tmp_path / "home/studies/toy").exists()
    with Study.open(tmp_path / "home", space) as begun:
        begun.next()
    with pytest.raises(UserError, match="no study 'absent'"):
        Study.open(tmp_path / "home", space, warm_start="absent")
    assert len(read_study(tmp_path / "home", "toy").trials) == 1


def test_a_study_reads_the_same_without_optuna_as_with_it(tmp_path: Path) -> None:
    with Study.open(tmp_path, toy_space(tmp_path)) as study:
        drive(study, segments=12)
    storage = JournalStorage(JournalFileBackend(str(study_folder(tmp_path, "toy") / "journal.log")))
    wanted = optuna.load_study(study_name="toy", storage=storage)
    notes, found = read(tmp_path, "toy")
    assert notes == wanted.user_attrs
    assert [dict(trial.params) for trial in found] == [trial.params for trial in wanted.trials]
    assert found == [trial_from(each.number, each.params, each.user_attrs) for each in wanted.trials]
    assert {type(value) for trial in found for value in trial.params.values()} >= {float, int, str}


def test_reading_verbs_import_neither_optuna_nor_torch(tmp_path: Path) -> None:
    with Study.open(tmp_path, toy_space(tmp_path)) as study:
        drive(study, segments=12)
    for verb in (["best", "toy"], ["show", "toy"], ["show", "toy/0"], ["status", "toy"], ["report", "toy", "-o", "r.html"]):
        code = f"import sys; from ktray.cli import main; assert main({verb}) == 0; print(*sys.modules, sep='|')"
        environment = {**os.environ, "KTRAY_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
        out = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
        )
        loaded = set(out.stdout.splitlines()[-1].split("|"))
        assert not loaded & {"torch", "optuna", "ray", "mlflow", "pandas", "matplotlib", "sklearn", "scipy"}, verb
