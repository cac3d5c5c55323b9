"""A journal that does not fit on the disk keeps its whole lines, and goes on when there is room."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest

from ktray.errors import SearchStopped
from ktray.search import journal_writer
from ktray.search.history import read_study
from ktray.search.study import Study
from tests.toy_space import drive, end_segment, next_assignment, toy_space


class Full(io.FileIO):
    """A file on a disk where half of what is appended fits."""

    def write(self, content: Any) -> int:
        return super().write(bytes(content)[: len(content) // 2])


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``full()`` fills the disk, ``full(False)`` makes room."""

    def opened(path: Path, mode: str, buffering: int = -1) -> Any:
        return Full(path, "a") if mode == "ab" else open(path, mode)

    return lambda on=True: monkeypatch.setattr(journal_writer, "open", opened if on else open, raising=False)


def test_a_trial_that_cannot_be_written_stops_the_search_and_the_journal_is_whole(tmp_path: Path, full: Any) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, early_stop=None))
    drive(study, segments=3)
    trials = len(study.trials())
    before = (tmp_path / "studies/toy/journal.log").read_bytes()
    full()
    with pytest.raises(SearchStopped, match=r"the disk is full: .*journal\.log cannot be written"):
        study.next()
    with pytest.raises(SearchStopped):
        study.prune_and_close()
    assert (tmp_path / "studies/toy/journal.log").read_bytes() == before
    full(False)
    with Study.open(tmp_path, toy_space(tmp_path, early_stop=None)) as again:  # it was unlocked all the same
        assert len(again.trials()) == trials
        drive(again)
    assert {trial.state for trial in read_study(tmp_path, "toy").trials} <= {"completed", "duplicate"}


def test_a_lock_that_finds_no_room_stops_the_search_and_loses_no_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*names: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with Study.open(tmp_path, toy_space(tmp_path, early_stop=None, budget={"trials": 1})) as study:
        one = next_assignment(study)
        with monkeypatch.context() as patched:
            patched.setattr(os, "symlink", no_room)
            with pytest.raises(SearchStopped, match=r"the disk is full: .*journal\.log"):
                study.fail(one.trial.number, "unlucky")
        assert end_segment(study, one).state == "completed"
        assert study.next() == "done"
