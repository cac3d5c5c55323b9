"""The live table that a terminal shows while a search runs."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ktray.runs.display import _Live
from ktray.search.study import Study
from tests.toy_space import drive, toy_space

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
    live = _Live(space, "toy", Console(file=io.StringIO(), width=width, height=height, color_system=None))
    with Study.open(folder, space) as study:
        live.begin(study)
        drive(study, segments=legs)
        live.work([], status)
        return drawn(live)


def test_the_table_names_what_runs_what_waits_and_how_far_the_study_is(tmp_path: Path) -> None:
    text = "\n".join(shown(tmp_path, 5, 100, 30, STATUS))
    assert "epoch 3 of 8  loss 1.25" in text
    assert "worker-1" in text
    assert "1 more stage waits" in text
    assert "of 6 trials" in text


def test_completed_trials_come_first_and_the_best_of_them_on_top(tmp_path: Path) -> None:
    lines = shown(tmp_path, 40, 100, 30, STATUS)
    states = [line.split()[-1] for line in lines if " -> " in line]
    assert states == sorted(states, key=lambda state: state != "completed")
    scores = [float(line.split()[-2]) for line in lines if line.endswith("completed")]
    assert scores
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(("width", "height"), [(60, 14), (80, 24), (200, 50)])
def test_the_table_fits_its_terminal(tmp_path: Path, width: int, height: int) -> None:
    lines = shown(tmp_path, 40, width, height, STATUS)
    assert len(lines) < height
    assert max(map(len, lines)) <= width


def test_before_anything_runs_it_says_that_it_starts(tmp_path: Path) -> None:
    assert "starting" in shown(tmp_path, 0, 80, 24, {})
    starting = {"workers": [{"name": "worker-1", "state": "starting"}], "running": [], "waiting": [], "queued": ["a-1"]}
    assert "workers are starting" in shown(tmp_path, 0, 80, 24, starting)
