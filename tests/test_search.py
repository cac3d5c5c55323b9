"""`ktray search` as a user runs it: what one call computes, what the next one finds, and what both say."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests.searches import CommandResult, Home, toy_space

STAGES = {"images", "teacher", "features", "clusters", "pseudo_labels", "student", "evaluation"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def space(folder: Path) -> Path:
    return toy_space(folder)


@pytest.fixture(scope="module")
def home(folder: Path) -> Home:
    return Home(folder / "home")


@pytest.fixture(scope="module")
def first(home: Home, space: Path) -> tuple[CommandResult, dict[str, int]]:
    """The first search of a space, and the artifacts that it left."""
    ended = home.run("search", space, "--json")
    return ended, home.artifacts()


@pytest.fixture(scope="module")
def second(home: Home, space: Path, first: Any) -> tuple[CommandResult, list[Path], list[Path]]:
    """The same command again after a driver was killed when all was done, with Ray's logs before and after."""
    with open(home.path / "ray", "a") as pointer:
        pointer.write(f"{tempfile.mkdtemp(prefix='ktray-')}\n")
    logs = sorted((home.path / "logs").glob("*"))
    ended = home.run("search", space)
    return ended, logs, sorted((home.path / "logs").glob("*"))


def test_a_search_reaches_its_target_and_says_what_it_computed(first: tuple[CommandResult, dict[str, int]]) -> None:
    ended, artifacts = first
    assert ended.code == 0, ended.err
    trials = ended.answer["trials"]
    assert trials["completed"] >= 1
    assert trials["completed"] + trials["pruned"] == 6
    assert trials["failed"] == 0
    assert sum(ended.answer["stages"]["computed"].values()) == len(artifacts)
    assert ended.answer["stages"]["reused"] == {}


def test_four_trials_that_need_one_teacher_first_train_it_once(home: Home, first: Any) -> None:
    assert len(home.keys("teacher")) == 1
    assert first[0].answer["stages"]["computed"]["teacher"] == 1


def test_every_key_that_was_demanded_was_computed_once(home: Home, first: tuple[CommandResult, dict[str, int]]) -> None:
    ended, artifacts = first
    named: set[str] = set().union(*(trial.artifact_keys for trial in home.study().trials))
    computed = ended.answer["stages"]["computed"]
    assert computed == {stage: sum(key.startswith(f"{stage}-") for key in artifacts) for stage in computed}
    assert named <= set(artifacts)
    assert not list((home.store / ".scratch").glob("*"))


def test_the_answer_has_the_documented_form(home: Home, first: tuple[CommandResult, dict[str, int]]) -> None:
    answer = first[0].answer
    assert list(answer) == ["study", "trials", "stages", "best", "seconds", "home", "tracking_uri", "events_waiting"]
    assert set(answer["trials"]) == {"completed", "pruned", "failed", "duplicate"}
    assert set(answer["stages"]) == {"computed", "reused"}
    assert set(answer["stages"]["computed"]) <= STAGES
    best = answer["best"]
    assert set(best) == {"trial", "params", "metrics", "objectives", "keys", "cost"}
    assert set(best["keys"]) <= STAGES - {"images"}
    assert set(best["keys"]["evaluation"]) == {"knn"}
    assert set(best["cost"]) == {"seconds", "marginal_seconds"}
    assert best["objectives"] == {"knn/top1": best["metrics"]["knn/top1"]}
    assert answer["home"] == str(home.path)
    assert answer["tracking_uri"] == f"sqlite:///{home.path / 'mlflow.db'}"
    listed = json.loads(home.run("best", "toy", "--json").out)
    assert listed[0] == {**best, "level_with_best": False}


def test_stderr_has_lines_of_ours_only(first: tuple[CommandResult, dict[str, int]]) -> None:
    lines = first[0].err.splitlines()
    assert any("paused" in line for line in lines)
    assert [line for line in lines if not re.match(r"\[ *\d+ s\] ", line)] == []


def test_the_pages_of_mlflow_open_on_the_trials(home: Home, first: Any) -> None:
    tags = home.experiment().tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert "metrics.`objective/" in tags["mlflow.sharedViewState.ktray"]


def test_every_run_in_mlflow_has_ended_well(home: Home, first: Any) -> None:
    runs = home.runs()
    assert {run.info.status for run in runs} == {"FINISHED"}
    roles = [run.data.tags["ktray.role"] for run in runs]
    assert roles.count("search") == 1
    assert roles.count("trial") == 6
    assert roles.count("stage") == len(first[1])


def test_the_same_command_again_computes_nothing_and_starts_no_ray(
    home: Home, first: tuple[CommandResult, dict[str, int]], second: tuple[CommandResult, list[Path], list[Path]]
) -> None:
    ended, before, after = second
    assert ended.code == 0, ended.err
    assert before == after, "each start of Ray has a log"
    assert home.artifacts() == first[1]
    assert len([state for state in home.states() if state != "duplicate"]) == 6
    assert re.search(r"; 0 stages computed, [1-9]\d* reused, ", ended.out)
    folders = [Path(line) for line in (home.path / "ray").read_text().splitlines()]
    assert folders
    assert not any(folder.exists() for folder in folders), "what the killed driver's Ray left is removed without Ray, too"


def test_without_json_stdout_has_the_leaderboard_with_its_reference_lines(
    second: tuple[CommandResult, list[Path], list[Path]],
) -> None:
    lines = second[0].out.splitlines()
    assert lines[1].split()[:4] == ["trial", "teacher", "transfer", "student"]
    assert any("(random student)" in line for line in lines)
    assert any("(supervised ceiling)" in line for line in lines)
    assert any(line.startswith("6 of 6 trials") for line in lines)
    assert second[0].err == ""


@pytest.mark.slow
def test_a_killed_plus_two_that_is_repeated_draws_two_more_and_computes_nothing_twice(
    home: Home, space: Path, second: Any
) -> None:
    drawn = len(home.study().trials)
    with home.start("search", space, "--trials", "+2") as running:
        running.until(lambda: len(home.study().trials) > drawn)
        running.kill()
    before = home.artifacts()
    ended = home.run("search", space, "--trials", "+2", "--json")
    assert ended.code == 0, ended.err
    assert sum(state != "duplicate" for state in home.states()) == 8
    after = home.artifacts()
    assert {key: after[key] for key in before} == before
    assert {run.info.status for run in home.runs()} <= {"FINISHED", "KILLED"}
    assert sum(ended.answer["stages"]["computed"].values()) == len(after) - len(before)
