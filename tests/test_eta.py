"""How long a search will still take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ktray.runs.study_status import time_left
from ktray.search.history import StudySnapshot
from ktray.search.trial import Trial
from tests.toy_space import toy_space

SETTLED = [100.0, 20.0, 20.0, 60.0]  # stage seconds of trials that are settled


def history(
    folder: Path, ordered: tuple[float, ...] = (), target: int = 10, spent: float = 100.0, **budget: Any
) -> StudySnapshot:
    seconds_of = [*SETTLED, *ordered]
    trials = [
        Trial(n, {}, {}, "paused" if n < len(SETTLED) else "running", attributed_costs={"suffix": {f"student-{n}": seconds}})
        for n, seconds in enumerate(seconds_of)
    ]
    space = toy_space(folder, budget={"trials": target, "concurrent": 2, **budget})
    return StudySnapshot("toy", space.content, trials, target, spent)


def never(key: str) -> bool:
    return False


def test_draws_to_come_cost_what_draws_have_cost_and_run_as_many_at_once(tmp_path: Path) -> None:
    found = time_left(history(tmp_path, target=4 + 6), never)
    assert found is not None
    seconds, low, high = found
    assert seconds == pytest.approx(6 * 50 / 2)  # 200 stage seconds in 100 s: two at once
    assert low < seconds < high


def test_what_is_ordered_is_still_to_come_until_it_is_there(tmp_path: Path) -> None:
    study = history(tmp_path, ordered=(400.0,), target=5)
    first = time_left(study, never)
    assert first is not None
    assert first[0] == pytest.approx(400 / 2)
    assert time_left(study, lambda key: key == "student-4") == (0, 0, 0)


def test_a_limit_of_the_budget_may_come_first(tmp_path: Path) -> None:
    for budget, seconds in (({"stop_after": 130.0}, 30.0), ({"hours": 300 / 3600}, 50.0)):
        found = time_left(history(tmp_path, target=1000, **budget), never)
        assert found is not None
        assert found[0] == pytest.approx(seconds, abs=0.1)


def test_nothing_is_said_too_early(tmp_path: Path) -> None:
    study = history(tmp_path)
    assert time_left(dataclasses.replace(study, trials=study.trials[:1]), never) is None
    assert time_left(dataclasses.replace(study, trials=[]), never) is None
