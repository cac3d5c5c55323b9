"""Faults at random moments: a search that is repeated until done finds what an undisturbed one finds, and leaves nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos import spaces, supervisor, verdict
from tests.chaos.__main__ import figures, run_round
from tests.chaos.faults import TARGETS, FaultInjector
from tests.chaos.store_watcher import Attempt, WorkerSeconds, worker_seconds
from tests.searches import Home


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["fixed-own", "drawn-cluster"])
def test_a_short_round_of_chaos_breaks_nothing(name: str, tmp_path: Path) -> None:
    outcome, problems = run_round(name, tmp_path / name, tmp_path, faults=6, mean=8.0, size=1, seed=1)
    assert not problems, "\n".join([str(figures([outcome])), *map(str, outcome.faults), *problems])
    assert outcome.faults


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """An undisturbed search of the list."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = supervisor.run_undisturbed(spaces.fixed(folder, size=1), Home(folder / "home"))
    assert outcome.results[-1].code == 0
    return outcome.home


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_helper_that_dies_or_stands_still_costs_a_search_nothing(number: int, undisturbed: Home, tmp_path: Path) -> None:
    listed, home = spaces.fixed(tmp_path, size=1), Home(tmp_path / "home")
    with home.start("search", listed) as running:
        status = home.path / "studies" / spaces.STUDY / "status.json"
        faults = FaultInjector(random.Random(0), running.processes, lambda: running.process.pid, status)
        (victim,) = running.until(lambda: faults._victims("helper")[0])
        os.kill(victim, number)
        ended = running.wait()
        assert victim not in running.processes()
    assert ended.code == 0, ended.err
    assert not verdict.different_from_undisturbed(supervisor.Round(home), undisturbed)


def test_a_worker_that_helps_a_stage_is_a_target_too_and_no_stage_is_reported_as_frozen(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as victim:
        workers = [{"name": "w1", "pid": os.getpid(), "state": "stage"}, {"name": "w2", "pid": victim.pid, "state": "helping"}]
        scheduler = {"workers": workers, "running": [{"key": "images-1", "worker": "w1", "helpers": ["w2"]}]}
        status = tmp_path / "status.json"
        status.write_text(json.dumps({"pid": 1, "scheduler": scheduler}))
        faults = FaultInjector(random.Random(0), lambda: {victim.pid: "ray::Worker"}, lambda: 1, status, targets=("helper",))
        assert "helper" in TARGETS
        fault = faults.inject()
        assert fault is not None
        assert (fault.target, fault.pids, fault.key) == ("helper", [victim.pid], "")
        victim.kill()


def record(attempt: str, seconds: float, started_from: str | None = None) -> dict[str, object]:
    return {"attempt": attempt, "seconds": seconds, "started_from": started_from}


def test_what_was_worked_after_the_last_checkpoint_that_counts_is_lost() -> None:
    attempts = {
        "teacher-1.a": Attempt("teacher-1", 0.0, 10.0, checkpoint=(4, 8.0)),  # killed two seconds after its checkpoint
        "teacher-1.b": Attempt("teacher-1", 10.0, 16.0),
        "features-1.a": Attempt("features-1", 0.0, 3.0),  # killed without one
    }
    records = {"teacher-1": record("b", 6.0, "checkpoint-000004"), "features-1": record("b", 2.0)}
    assert worker_seconds(attempts, records) == WorkerSeconds(total=10.0 + 3.0 + 6.0 + 2.0, lost=2.0 + 3.0, frozen=0.0)


def test_a_checkpoint_that_nobody_resumed_from_saves_nothing() -> None:
    attempts = {"teacher-1.a": Attempt("teacher-1", 0.0, 10.0, checkpoint=(4, 8.0))}
    for started_from in (None, "checkpoint-000003", "teacher-0"):
        assert worker_seconds(attempts, {"teacher-1": record("b", 6.0, started_from)}).lost == 10.0


def test_the_time_in_which_a_process_stands_still_is_counted_separately() -> None:
    attempts = {"teacher-1.a": Attempt("teacher-1", 0.0, 20.0, stopped=5.0)}
    assert worker_seconds(attempts, {}) == WorkerSeconds(total=5.0, lost=5.0, frozen=15.0)
