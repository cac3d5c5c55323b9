"""`ktray status`: what a study has come to, and what the search of it does now."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ktray.runs.study_status
from ktray.errors import UserError
from ktray.runs.study_status import is_stuck, status, with_status_file, with_stuck_warnings
from ktray.search.history import STATUS_FILE
from ktray.search.study import Study
from ktray.stores.file import FileStore
from tests.toy_space import drive, toy_space

KEY = "student-0123456789ab"
CREW: dict[str, Any] = {
    "workers": [{"name": "worker-1"}, {"name": "worker-2"}],
    "running": [
        {"key": KEY, "stage": "student", "worker": "worker-1", "node": "f" * 56, "since": 0.0, "helpers": []}
        | {"progress": {"epoch": 3, "of": 9}, "silent_seconds": 0.5, "attempt": "a1"}
    ],
    "waiting": [
        {"waiter": "trial 0", "key": KEY, "since": 0.0},
        {"waiter": "trial 1", "key": "clusters-0123456789ab", "since": 0.0},
    ],
    "queued": ["clusters-0123456789ab"],
    "computed": {"teacher": 1},
    "reused": {},
}


@pytest.fixture
def study(tmp_path: Path) -> Any:
    with Study.open(tmp_path, toy_space(tmp_path, early_stop=None)) as study:
        yield study


def asked(home: Path) -> tuple[dict[str, Any], str]:
    return status(home, "toy", FileStore(home / "store"))


def scheduler(silent: float = 0.5, pace: float | None = None) -> dict[str, Any]:
    running = {**CREW["running"][0], "since": time.time() - 30, "silent_seconds": silent, "pace_seconds": pace}
    waiting = [{**wait, "since": time.time() - 12} for wait in CREW["waiting"]]
    return {**CREW, "running": [running], "waiting": waiting}


def test_an_unknown_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study 'toy'"):
        asked(tmp_path)


def test_a_study_that_nobody_searches_says_so_and_how_far_it_came(study: Study, tmp_path: Path) -> None:
    drive(study, segments=3)
    study.prune_and_close()
    (tmp_path / "studies/toy/driver.lock").write_text(f"process 999999999 on {socket.gethostname()}\n")
    answer, text = asked(tmp_path)
    assert not answer["running"]
    assert answer["now"] is answer["eta_seconds"] is None
    assert answer["trials"]["completed"] == 3
    assert answer["best"]["objectives"]["linear_probe/top1"] > 0
    assert "no search of it runs now; the same ktray search goes on from here" in text


def test_time_passes_between_two_writes_of_a_running_search(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.next()
    later = SimpleNamespace(time=lambda: time.time() + 20, monotonic=time.monotonic)  # less than until its next write
    monkeypatch.setattr(ktray.runs.study_status, "time", later)
    answer, text = asked(tmp_path)
    assert 20 <= answer["spent_seconds"] < 30
    assert f"{answer['spent_seconds']:.0f} s so far" in text


def test_a_finished_study_is_not_to_go_on(study: Study, tmp_path: Path) -> None:
    drive(study)
    study.prune_and_close()
    (tmp_path / "studies/toy/driver.lock").unlink()
    assert asked(tmp_path)[1].splitlines()[1] == "no search of it runs now"


def test_a_running_search_tells_what_each_trial_waits_for(study: Study, tmp_path: Path) -> None:
    study.next(), study.next()
    shown: list[Any] = []
    with_status_file(tmp_path / "studies/toy", lambda events, status: shown.append(events))([{"n": 1}], scheduler())
    answer, text = asked(tmp_path)
    assert shown == [[{"n": 1}]]
    assert answer["running"]
    assert str(os.getpid()) in answer["by"]
    assert [wait["state"] for wait in answer["now"]["waiting"]] == ["runs on worker-1, node ffffffff", "queued"]
    assert "waits for student since 12 s: runs on worker-1, node ffffffff" in text
    assert f"trial 0: student  epoch 3 of 9  30 s on worker-1, node ffffffff ({KEY})" in text
    assert f"0 finished, 2 running of {study.target} trials" in text
    assert "2 workers, 1 stage queued" in text
    assert "NO PROGRESS" not in text
    json.dumps(answer, allow_nan=False)


def test_a_stage_without_progress_for_long_is_named(study: Study, tmp_path: Path) -> None:
    with_status_file(tmp_path / "studies/toy", lambda events, status: None)([], scheduler(silent=300))
    assert "NO PROGRESS for 5 min" in asked(tmp_path)[1]


@pytest.mark.parametrize(
    ("silent", "pace", "stuck"),
    [
        (170, None, False),  # nothing is known of it: minutes
        (190, None, True),
        (29, 0.1, False),  # a worker that stalls is replaced sooner than that
        (31, 0.1, True),
        (90, 10.0, False),  # what loops say every ten seconds: between two phases of a stage there may be a minute
        (290, 30.0, False),  # epochs of half a minute
        (310, 30.0, True),
    ],
)
def test_no_progress_is_many_times_the_usual_pace_or_minutes(silent: float, pace: float | None, stuck: bool) -> None:
    assert is_stuck(scheduler(silent, pace)["running"][0]) is stuck


def test_a_search_says_once_per_attempt_which_stage_makes_no_progress() -> None:
    said: list[str] = []
    show = with_stuck_warnings(lambda events, status: None, said.append)
    for silent in (10, 40, 45, 50):
        show([], scheduler(silent, 1.0))
    assert said == [f"{KEY} on worker-1, node ffffffff, has made no progress for 40 s (its last: epoch 3 of 9)"]
    show([], {**scheduler(), "running": [{**scheduler(40, 1.0)["running"][0], "attempt": "a2"}]})
    assert len(said) == 2


def test_the_status_that_an_earlier_search_wrote_says_nothing_about_this_one(study: Study, tmp_path: Path) -> None:
    written = {"time": time.time(), "pid": 1, "scheduler": scheduler()}
    (tmp_path / "studies/toy" / STATUS_FILE).write_text(json.dumps(written))
    answer, text = asked(tmp_path)
    assert answer["now"] is None
    assert "it is starting" in text


def test_a_half_written_or_old_status_breaks_nothing(study: Study, tmp_path: Path) -> None:
    path = tmp_path / "studies/toy" / STATUS_FILE
    path.write_text('{"time": 1')
    assert asked(tmp_path)[0]["now"] is None
    path.write_text(json.dumps({"time": time.time() - 100, "pid": os.getpid(), "scheduler": scheduler()}))
    assert "it has said nothing for 2 min" in asked(tmp_path)[1]


def test_the_status_is_written_every_two_seconds_at_most(tmp_path: Path) -> None:
    show = with_status_file(tmp_path, lambda events, status: None)
    show([], scheduler())
    first = (tmp_path / STATUS_FILE).stat().st_mtime_ns
    show([], scheduler())
    assert (tmp_path / STATUS_FILE).stat().st_mtime_ns == first
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE]


def test_a_folder_that_cannot_be_written_stops_no_search(tmp_path: Path) -> None:
    shown: list[Any] = []
    with_status_file(tmp_path / "gone", lambda events, status: shown.append(status))([], scheduler())
    assert len(shown) == 1


def test_time_left_follows_the_pace_of_the_trials_so_far(tmp_path: Path) -> None:
    now = [0.0]
    with Study.open(tmp_path, toy_space(tmp_path, early_stop=None), clock=lambda: now[0]) as study:
        now[0] = 60.0
        drive(study, segments=2)
        answer, text = asked(tmp_path)
    assert answer["eta_seconds"] == 120.0
    assert "about 2 min left" in text
