"""A journal that does not fit on the disk keeps its whole lines, and goes on when there is room."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from ktray.errors import StoppedEarly
from ktray.search import ledger
from ktray.search.study import Study, read
from tests.toy_space import drive, toy_space


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A disk on which half of what is appended fits; ``full()`` fills it, ``full(False)`` makes room."""
    append = ledger.JournalFileBackend.append_logs

    def torn(self: Any, logs: list[dict[str, Any]]) -> None:
        path = Path(self._file_path)
        size = path.stat().st_size
        append(self, logs)
        os.truncate(path, size + (path.stat().st_size - size) // 2)
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda on=True: monkeypatch.setattr(ledger.JournalFileBackend, "append_logs", torn if on else append)


def test_a_trial_that_cannot_be_written_stops_the_search_and_the_journal_is_whole(tmp_path: Path, full: Any) -> None:
    study = Study.open(tmp_path, toy_space(tmp_path, early_stop=None))
    drive(study, segments=3)
    trials = len(study.trials())
    before = (tmp_path / "studies/toy/journal.log").read_bytes()
    full()
    with pytest.raises(StoppedEarly, match=r"the disk is full: .*journal\.log cannot be written"):
        study.next()
    with pytest.raises(StoppedEarly):
        study.close()
    assert (tmp_path / "studies/toy/journal.log").read_bytes() == before
    full(False)
    with Study.open(tmp_path, toy_space(tmp_path, early_stop=None)) as again:  # it was unlocked all the same
        assert len(again.trials()) == trials
        drive(again)
    assert {trial.state for trial in read(tmp_path, "toy").trials} <= {"completed", "duplicate"}
