"""If the disk is full, a search stops with all results so far intact, and resumes once there is space."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.searches import Home, toy_space, until
from tests.toys import ROTATION

pytestmark = pytest.mark.slow
SIZE = 600 << 20  # a search does not begin on less than 512 MB


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """A file that leaves no byte."""
    ballast = folder / "ballast"
    with suppress(OSError), open(ballast, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 10, 1):
            with suppress(OSError):
                while file.write(bytes(size)):
                    pass
    assert os.statvfs(folder).f_bavail == 0
    return ballast


def assert_readable(home: Home) -> None:
    """The journal, the database and the spool are whole."""
    for line in (home.path / "studies/toy/journal.log").read_text().splitlines():
        json.loads(line)
    database = sqlite3.connect(home.path / "mlflow.db")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()
    spooled = (home.path / "studies/toy/tracking/events.jsonl").read_bytes()
    for line in spooled.splitlines():
        json.loads(line)


@pytest.mark.timeout(600)
def test_a_full_disk_stops_the_search_with_exit_5_and_it_goes_on_when_there_is_room(small_disk: Path, tmp_path: Path) -> None:
    slow = {**ROTATION, "schedule": {"epochs": 12, "lr": 0.02, "batch_size": 32}, "layer": {"choice": ["conv3", "conv5"]}}
    space = toy_space(
        tmp_path, pair__teacher={"one_of": {"rotation": slow}}, start_with=[], budget={"trials": 8, "concurrent": 2}
    )
    home = Home(small_disk / "home")
    with home.start("search", space, files=tmp_path) as running:
        running.until(lambda: "paused" in home.states() or "completed" in home.states())
        ballast = fill(small_disk)
        before, states = home.artifacts(), home.states()
        ended = running.wait()
        until(lambda: not running.processes(), 90)
    assert ended.code == 5, ended.err
    last = ended.err.splitlines()[-1]
    assert "disk" in last
    assert "the same command goes on from here" in last
    assert "Traceback" not in ended.err
    assert ended.seconds < 120
    ballast.unlink()
    assert_readable(home)
    after = home.artifacts()
    assert {key: after[key] for key in before} == before
    assert len(home.states()) >= len(states)
    again = home.run("search", space, files=tmp_path)
    assert again.code == 0, again.err
    assert_readable(home)
    assert set(home.states()) <= {"completed", "pruned", "duplicate"}
    assert sum(state != "duplicate" for state in home.states()) == 8
    final = home.artifacts()
    assert {key: final[key] for key in after} == after
    assert {run.info.status for run in home.runs()} <= {"FINISHED", "KILLED"}
    assert sum(run.data.tags["ktray.role"] == "stage" for run in home.runs()) == len(final)
    assert not list((home.store / ".scratch").iterdir())


@pytest.mark.timeout(300)
def test_a_disk_that_is_full_from_the_beginning_is_refused_in_one_paragraph(small_disk: Path, tmp_path: Path) -> None:
    fill(small_disk)
    ended = Home(small_disk / "home").run("search", toy_space(tmp_path), files=tmp_path)
    assert ended.code in (4, 5)
    assert len(ended.err.splitlines()) == 1, ended.err
    assert "full" in ended.err
