"""The live table that a terminal shows while a search runs."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ktray.runs.display import _Live
from ktray.search.study import Study
from ktray.search.trial import Trial
from tests.toy_space import drive, toy_space
from tests.toys import toy_spec

STATUS: dict[str, Any] = {
    "workers": [{"name": "worker-1", "state": "stage"}],
    "running": [
        {
            "key": "teacher-3f9a1c0b2d44",
            "stage": "teacher",
            "worker": "worker-1",
            "since": 0.0,
            "progress": {"epoch": 3, "of": 8, "loss": 1.25, "lr": 0.02},
            "helpers": [],
        }
    ],
    "waiting": [{"waiter": "trial 0", "key": "teacher-3f9a1c0b2d44", "since": 0.0}],
    "queued": ["features-3f9a1c0b2d44"],
}


def drawn(live: _Live) -> list[str]:
    with live.console.capture() as captured:
        live.console.print(live.render())
    return [line.rstrip() for line in captured.get().splitlines()]


def shown(folder: Path, legs: int, width: int, height: int, status: dict[str, Any]) -> list[str]:
    """The table after so many legs of a toy study, on a terminal of this size."""
    space = toy_space(folder)
    live = _Live(space, "toy", Console(file=io.StringIO(), width=width, height=height, color_system=None), lambda key: False)
    with Study.open(folder, space) as study:
        live.begin(study)
        drive(study, segments=legs)
        live.work([], status)
        return drawn(live)


def test_the_running_trials_come_first_with_what_they_wait_for_and_how_far_that_is(tmp_path: Path) -> None:
    lines = shown(tmp_path, 5, 100, 30, STATUS)
    assert any("of 6 trials" in line and "finished" in line for line in lines[:3])
    at = next(number for number, line in enumerate(lines) if "epoch 3 of 8  loss 1.25" in line)
    assert "teacher" in lines[at]
    assert at < next(number for number, line in enumerate(lines) if "best first" in line)
    assert any("1 stage is queued" in line for line in lines)
    assert not any("3f9a1c0b2d44" in line for line in lines)


def test_of_the_others_completed_trials_come_first_and_the_best_of_them_on_top(tmp_path: Path) -> None:
    lines = shown(tmp_path, 40, 100, 40, STATUS)
    rows = [line.split() for line in lines if re.search(r"(completed|paused|pruned)$", line)]
    assert [row[-1] for row in rows] == sorted((row[-1] for row in rows), key=lambda state: state != "completed")
    scores = [float(row[-2]) for row in rows if row[-1] == "completed"]
    assert scores
    assert scores == sorted(scores, reverse=True)


def many(count: int, running: int) -> list[Trial]:
    pair = toy_spec()
    return [
        Trial(number, {"student.schedule.lr": number / 1000}, pair, "running" if number < running else "paused", epoch=2)
        for number in range(count)
    ]


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (100, 10)])
@pytest.mark.parametrize(("count", "running"), [(3, 2), (40, 4), (100, 64)])
def test_with_many_trials_it_uses_the_height_and_shows_both_kinds(
    tmp_path: Path, width: int, height: int, count: int, running: int
) -> None:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    live = _Live(toy_space(tmp_path), "toy", console, lambda key: False)
    trials = many(count, running)
    live.study = SimpleNamespace(trials=lambda: trials, target=count, elapsed=1.0)  # type: ignore[assignment]
    lines = drawn(live)
    assert len(lines) < height
    assert any("running" in line for line in lines)
    assert any(line.endswith("paused") for line in lines)
    assert count < height or len(lines) >= height - 3
    assert any("lr" in line for line in lines)


@pytest.mark.parametrize(("width", "height"), [(60, 14), (80, 24), (200, 50)])
def test_the_table_fits_its_terminal(tmp_path: Path, width: int, height: int) -> None:
    lines = shown(tmp_path, 40, width, height, STATUS)
    assert len(lines) < height
    assert max(map(len, lines)) <= width


def test_before_anything_runs_it_says_that_it_starts(tmp_path: Path) -> None:
    assert "starting" in shown(tmp_path, 0, 80, 24, {})
    starting = {"workers": [{"name": "worker-1", "state": "starting"}], "running": [], "waiting": [], "queued": ["a-1"]}
    assert "workers are starting" in shown(tmp_path, 0, 80, 24, starting)
