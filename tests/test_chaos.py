"""Faults at random moments: a search that is repeated until done finds what an undisturbed one finds, and leaves nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.__main__ import figures, one
from tests.chaos.watching import Attempt, Waste, waste


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["fixed-own", "drawn-cluster"])
def test_a_short_round_of_chaos_breaks_nothing(name: str, tmp_path: Path) -> None:
    told, wrong = one(name, tmp_path / name, tmp_path, faults=6, mean=8.0, size=1, seed=1)
    assert not wrong, "\n".join([str(figures([told])), *map(str, told.faults), *wrong])
    assert told.faults


def record(attempt: str, seconds: float, started_from: str | None = None) -> dict[str, object]:
    return {"attempt": attempt, "seconds": seconds, "started_from": started_from}


def test_what_was_worked_after_the_last_checkpoint_that_counts_is_lost() -> None:
    attempts = {
        "teacher-1.a": Attempt("teacher-1", 0.0, 10.0, saved=(4, 8.0)),  # killed two seconds after its checkpoint
        "teacher-1.b": Attempt("teacher-1", 10.0, 16.0),
        "features-1.a": Attempt("features-1", 0.0, 3.0),  # killed without one
    }
    records = {"teacher-1": record("b", 6.0, "checkpoint-000004"), "features-1": record("b", 2.0)}
    assert waste(attempts, records) == Waste(total=10.0 + 3.0 + 6.0 + 2.0, lost=2.0 + 3.0, frozen=0.0)


def test_a_checkpoint_that_nobody_went_on_from_saves_nothing() -> None:
    attempts = {"teacher-1.a": Attempt("teacher-1", 0.0, 10.0, saved=(4, 8.0))}
    for started_from in (None, "checkpoint-000003", "teacher-0"):
        assert waste(attempts, {"teacher-1": record("b", 6.0, started_from)}).lost == 10.0


def test_the_time_in_which_a_process_stands_still_is_told_apart() -> None:
    attempts = {"teacher-1.a": Attempt("teacher-1", 0.0, 20.0, stopped=5.0)}
    assert waste(attempts, {}) == Waste(total=5.0, lost=5.0, frozen=15.0)
