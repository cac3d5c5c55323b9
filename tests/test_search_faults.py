"""Whatever kills, stops or breaks a search: nothing that was published is lost, and the same command goes on."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from pathlib import Path

import pytest

from tests.searches import Home, toy_space, until
from tests.toys import HOG, ROTATION

# Long enough that a signal meets it.
SLOW = {
    "hog": HOG,
    "rotation": {**ROTATION, "schedule": {"epochs": 40, "lr": 0.02, "batch_size": 32}, "layer": {"choice": ["conv3", "conv5"]}},
}
SECONDS_TO_STOP = 10


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def space(tmp_path: Path) -> Path:
    return toy_space(tmp_path)


@pytest.fixture
def slow_space(tmp_path: Path) -> Path:
    """Its teacher takes long."""
    return toy_space(tmp_path, pair__teacher={"one_of": SLOW})


def counted(home: Home, name: str = "toy") -> int:
    return sum(state != "duplicate" for state in home.states(name))


def assert_whole(home: Home, trials: int = 6) -> None:
    """The study has reached its target, and MLflow shows no run that goes on."""
    assert set(home.states()) <= {"completed", "pruned", "duplicate"}
    assert counted(home) == trials
    assert {run.info.status for run in home.runs()} <= {"FINISHED", "KILLED"}


def trains(home: Home) -> bool:
    """Whether a teacher is being trained."""
    return bool(list((home.store / ".scratch").glob("teacher-*")))


# ---- Ctrl-C


@pytest.mark.slow
def test_ctrl_c_during_stages_ends_within_ten_seconds_leaves_no_process_and_the_same_command_goes_on(
    home: Home, slow_space: Path
) -> None:
    with home.start("search", slow_space) as running:
        running.until(lambda: trains(home))
        ended = running.signal(signal.SIGINT)
        assert ended.code == 130
        assert ended.seconds < SECONDS_TO_STOP
        assert ended.err.splitlines()[-1].startswith(f"ktray: interrupted; resume with: ktray search {slow_space}")
        until(lambda: not running.processes(), 2)
    assert "RUNNING" not in {run.info.status for run in home.runs()}
    before = home.artifacts()
    again = home.run("search", slow_space)
    assert again.code == 0, again.err
    assert_whole(home)
    after = home.artifacts()
    assert {key: after[key] for key in before} == before


@pytest.mark.slow
def test_signals_while_it_starts_end_it_and_the_same_command_goes_on(home: Home, space: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    for after, number in itertools.product((0.5, 2.0, 3.0, 4.0, 5.0, 6.5, 8.0), numbers):
        with home.start("search", space) as running:
            time.sleep(after)
            ended = running.signal(number)
            assert ended.seconds < SECONDS_TO_STOP, after
            if after > 1:  # before that Python itself is still starting
                assert "Traceback" not in ended.err
                assert ended.code in (130, -signal.SIGINT)  # of an interrupted import Python makes the latter; shells see 130
                assert "resume with: " in ended.err
            until(lambda running=running: not running.processes(), 15)  # what a starting Ray leaves is ended within seconds
    again = home.run("search", space)
    assert again.code == 0, again.err
    assert_whole(home)


@pytest.mark.slow
def test_sigterm_during_stages_is_like_ctrl_c(home: Home, slow_space: Path) -> None:
    with home.start("search", slow_space) as running:
        running.until(lambda: trains(home))
        ended = running.signal(signal.SIGTERM)
        assert ended.code == 130
        assert ended.seconds < SECONDS_TO_STOP
        until(lambda: not running.processes(), 2)


# ---- kill -9


@pytest.mark.slow
def test_kills_of_a_worker_of_the_broker_and_of_a_trial_cost_no_trial(home: Home, slow_space: Path) -> None:
    with home.start("search", slow_space, "--json") as running:
        running.until(lambda: trains(home))
        for title in ("ResourceTrainable", "Worker", "Broker"):
            for pid in running.until(lambda title=title: running.actors(title))[:2]:
                os.kill(pid, signal.SIGKILL)
            time.sleep(1.0)
        ended = running.wait()
    assert ended.code == 0, ended.err
    assert ended.answer["trials"]["failed"] == 0
    assert sum(ended.answer["stages"]["computed"].values()) == len(home.artifacts())
    assert_whole(home)
    stages = [run for run in home.runs() if run.data.tags["ktray.role"] == "stage"]
    assert len(stages) == len(home.artifacts())


@pytest.mark.slow
@pytest.mark.parametrize("title", ["Broker", "ResourceTrainable", "Worker"])
def test_a_process_that_stands_still_for_ever_is_replaced_and_costs_no_trial(title: str, home: Home, slow_space: Path) -> None:
    with home.start("search", slow_space, "--json") as running:
        running.until(lambda: trains(home))
        frozen = running.actors(title)
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        ended = running.wait()
        assert frozen
        assert not set(frozen) & set(running.processes())
    assert ended.code == 0, ended.err
    assert ended.answer["trials"]["failed"] == 0
    assert_whole(home)


@pytest.mark.slow
@pytest.mark.parametrize("trials", [1, 3, 5])
def test_a_search_that_is_killed_halfway_reaches_exactly_its_target_and_computes_nothing_twice(
    home: Home, space: Path, trials: int
) -> None:
    with home.start("search", space) as running:
        running.until(lambda: sum(state in ("paused", "completed") for state in home.states()) >= trials)
        running.kill()
    before = home.artifacts()
    paused = {trial.number: trial.keys["student"] for trial in home.study().trials if trial.state == "paused"}
    ended = home.run("search", space, "--json")
    assert ended.code == 0, ended.err
    assert_whole(home)
    after = home.artifacts()
    assert {key: after[key] for key in before} == before
    assert sum(ended.answer["stages"]["computed"].values()) == len(after) - len(before)
    continued = [trial for trial in home.study().trials if paused.get(trial.number, "") not in ("", trial.keys["student"])]
    for trial in continued:
        chain = [trial.keys["student"]]
        while earlier := home.record(chain[-1])["started_from"]:
            chain.append(earlier)
        assert paused[trial.number] in chain


@pytest.mark.slow
def test_a_training_that_was_killed_goes_on_from_its_last_checkpoint(home: Home, tmp_path: Path) -> None:
    long = {"rotation": {**SLOW["rotation"], "schedule": {"epochs": 200, "lr": 0.02, "batch_size": 32}}}
    space = toy_space(tmp_path, pair__teacher={"one_of": long}, start_with=[], budget={"trials": 2, "concurrent": 2})
    (tmp_path / "runtime.yaml").write_text("checkpoint_seconds: 1\n")
    arguments = ("search", space, "--runtime", tmp_path / "runtime.yaml")
    with home.start(*arguments) as running:
        running.until(lambda: list((home.store / ".scratch").glob("teacher-*/checkpoint-*")))
        running.kill()
    ended = home.run(*arguments)
    assert ended.code == 0, ended.err
    assert home.record(home.keys("teacher")[0])["started_from"].startswith("checkpoint-")


# ---- stages that fail


@pytest.mark.slow
def test_a_stage_that_raises_fails_the_trials_that_need_it_names_the_cause_once_and_the_search_goes_on(
    home: Home, tmp_path: Path
) -> None:
    space = toy_space(
        tmp_path,
        pair__teacher=HOG,
        pair__transfer={"kind": "clusters", "k": 5, "iterations": 5, "min_size": {"choice": [2, 200]}},  # of 270 images
        pair__student__schedule={"epochs": 4, "lr": {"choice": [0.01, 0.02]}, "batch_size": 32},
        start_with=[],
        budget={"trials": 10, "concurrent": 2},
    )
    ended = home.run("search", space)
    assert ended.code == 3, ended.err
    trials = [trial for trial in home.study().trials if trial.state != "duplicate"]
    assert len(trials) == 4
    assert "the space is exhausted" in ended.out
    failed = [trial for trial in trials if trial.state == "failed"]
    assert len(failed) == 2
    assert {trial.params["transfer.min_size"] for trial in failed} == {200}
    said = "every cluster has fewer than min_size=200 images"
    assert ended.err.count(said) == 1
    assert all("pseudo_labels-" in str(trial.cause) and said in str(trial.cause) for trial in failed)
    statuses = {run.data.tags["ktray.trial"]: run.info.status for run in home.runs() if "ktray.trial" in run.data.tags}
    assert {statuses[str(trial.number)] for trial in failed} == {"FAILED"}


@pytest.mark.slow
def test_ten_failures_in_a_row_stop_the_search_with_exit_5(home: Home, tmp_path: Path) -> None:
    transfer = {"kind": "clusters", "k": {"choice": list(range(5, 40))}, "iterations": 2, "min_size": 200}
    space = toy_space(
        tmp_path, pair__teacher=HOG, pair__transfer=transfer, start_with=[], budget={"trials": 30, "concurrent": 2}
    )
    ended = home.run("search", space, "--json")
    assert ended.code == 5, ended.err
    reasons = {trial.params["transfer.k"] for trial in home.study().trials if trial.state == "failed"}
    assert 10 <= len(reasons) <= 11  # one more may have been on its way; who draws a k again fails with it
    assert "trials failed one after the other" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_its_trial_and_the_search_goes_on(home: Home, tmp_path: Path) -> None:
    schedule = {"epochs": 4, "lr": {"choice": [0.02, 100.0]}, "batch_size": 32}
    student = {"backbone": {"kind": "resnet", "width": 0.125}, "schedule": schedule}
    space = toy_space(tmp_path, pair__teacher=HOG, pair__student=student, start_with=[], budget={"trials": 4, "concurrent": 2})
    ended = home.run("search", space, "--json")
    trials = home.study().trials
    assert {trial.params["student.schedule.lr"] for trial in trials if trial.state == "failed"} == {100.0}
    assert ended.code == 3
    assert ended.answer["trials"]["completed"] >= 1


# ---- two at once


@pytest.mark.slow
def test_a_second_search_on_one_home_is_refused_in_one_sentence_and_the_first_is_unharmed(home: Home, slow_space: Path) -> None:
    with home.start("search", slow_space) as running:
        running.until(lambda: trains(home))
        same = home.run("search", slow_space)
        other = home.run("search", slow_space, "--name", "other")
        ended = running.wait()
    for refused in (same, other):
        assert refused.code == 2
        assert len(refused.err.splitlines()) == 1
        assert refused.seconds < 30
    assert "is being searched by process" in same.err
    assert "is in use by process" in other.err
    assert ended.code == 0, ended.err
    assert_whole(home)
    assert home.run("search", slow_space, "--name", "other").code == 0
    assert "RUNNING" not in {run.info.status for run in home.runs("other")}


@pytest.mark.slow
def test_two_first_searches_at_the_same_moment_leave_one_sound_database(home: Home, space: Path) -> None:
    with home.start("search", space, "--name", "one") as one, home.start("search", space, "--name", "two") as two:
        codes = {"one": one.wait().code, "two": two.wait().code}
    assert sorted(codes.values()) == [0, 2]
    for name, code in codes.items():
        if code:
            assert home.run("search", space, "--name", name).code == 0
    for name in codes:
        assert counted(home, name) == 6
        assert {run.info.status for run in home.runs(name)} <= {"FINISHED", "KILLED"}


# ---- surroundings


@pytest.mark.slow
def test_an_exhausted_space_ends_well_says_so_and_duplicates_cost_no_budget(home: Home, tmp_path: Path) -> None:
    space = toy_space(
        tmp_path,
        pair__teacher=HOG,
        pair__student__schedule={"epochs": 4, "lr": 0.01, "batch_size": 32},
        start_with=[{"transfer.k": 5}, {"transfer.k": 5}],
        budget={"trials": 10, "concurrent": 2},
    )
    ended = home.run("search", space)
    assert ended.code == 0, ended.err
    assert "the space is exhausted" in ended.out
    assert home.states().count("duplicate") >= 1
    assert counted(home) == 2


@pytest.mark.slow
def test_a_tracker_that_is_down_delays_nothing_and_fails_nothing(home: Home, space: Path) -> None:
    ended = home.run("search", space, "--tracking", "http://127.0.0.1:9", "--json")
    assert ended.code == 0, ended.err
    assert sum("for MLflow; the same command writes" in line for line in ended.err.splitlines()) == 1
    began = time.monotonic()
    again = home.run("search", space, "--tracking", "http://127.0.0.1:9")
    assert again.code == 0
    assert time.monotonic() - began < 40
    for _ in range(3):  # each waits 20 s at most for what was spooled to be written
        assert home.run("search", space).code == 0
    assert {run.info.status for run in home.runs()} == {"FINISHED"}
    assert sum("ktray.trial" in run.data.tags for run in home.runs()) == len(home.study().trials)


@pytest.mark.slow
def test_an_artifact_that_was_damaged_between_two_calls_is_computed_again_and_it_is_said(home: Home, space: Path) -> None:
    home.run("search", space)
    before = home.artifacts()
    best = json.loads(home.run("best", "toy", "--json").out)[0]
    key = best["keys"]["student"]
    weights = home.store / key / "weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    ended = home.run("search", space, "--json")
    assert ended.code == 0
    assert f"{key} is damaged" in ended.err
    assert ended.answer["stages"]["computed"] == {"student": 1}
    assert weights.read_bytes() == whole
    after = home.artifacts()
    assert {each for each in before if after[each] != before[each]} == {key}


@pytest.mark.slow
def test_damaged_bytes_that_a_search_meets_are_said_and_mended_in_the_same_run_and_fail_no_trial(
    home: Home, space: Path, tmp_path: Path
) -> None:
    home.run("search", space, "--trials", "3")
    damaged = set()
    for key in home.artifacts():
        for path in (home.store / key).iterdir():
            if path.suffix in (".npy", ".npz", ".safetensors"):
                flip_byte(path)
                damaged.add(key)
    ended = home.run("search", space, "--trials", "6")
    assert ended.code == 0, ended.err
    assert_whole(home)
    said = [line for line in ended.err.splitlines() if "is damaged (" in line]
    assert {key for key in damaged if any(key in line for line in said)} >= set(home.keys("images")), ended.err
    assert len(said) > 3
    intact = Home(tmp_path / "intact")
    intact.run("search", space)
    common = set(home.keys("evaluation")) & set(intact.keys("evaluation"))
    assert len(common) > 3
    for key in common:
        assert home.record(key)["metrics"] == intact.record(key)["metrics"], key


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
