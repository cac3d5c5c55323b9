"""When failures end a search: after ten in a row, each for a reason of its own.

Beside that a driver gives up when ten draws in a row need what has failed already: nothing is computed for them, so they would
use up a budget in no time.
"""

from __future__ import annotations

from collections.abc import Iterable

from ktray.errors import StoppedEarly
from ktray.search.trial import Trial

FAILURES = 10  # so many in a row stop a search


class FailureLimit:
    """Failures since the last result.

    Trials that wait for one stage fail with it, and are one failure. A draw that is no valid pair costs nothing: it counts only
    as long as none was valid.

    Args:
        trials: of earlier sessions.
    """

    def __init__(self, trials: Iterable[Trial]) -> None:
        self._valid = any(trial.state != "failed" for trial in trials)
        self._reasons: set[str] = set()
        self._row: list[Trial] = []

    def drawn(self, trial: Trial) -> None:
        """A new draw; failed: it is no valid pair."""
        if not self._valid and trial.state == "failed":
            self.failed(trial)
        elif not self._valid:
            self._valid = True
            self.over()

    def failed(self, trial: Trial, stage: str = "") -> None:
        """A trial has failed.

        Args:
            stage: key of the stage that raised, if one did.
        """
        self._reasons.add(stage or f"trial {trial.number}")
        self._row.append(trial)

    def over(self) -> None:
        """There is a result."""
        self._reasons.clear()
        self._row.clear()

    def heed(self) -> None:
        """Raises StoppedEarly after ten failures in a row."""
        if len(self._reasons) >= FAILURES:
            raise in_a_row(self._row)


def in_a_row(trials: list[Trial]) -> StoppedEarly:
    """Why a search ends after these trials failed, with the cause of the last."""
    last = trials[-1]
    return StoppedEarly(f"{len(trials)} trials failed one after the other; the last one, {last.number}: {last.cause}")
