"""How long searches of a study have run, over all resumes."""

from __future__ import annotations

from collections.abc import Callable

NOTE_EVERY = 30.0  # seconds that a kill -9 may take from `stop_after`


class ElapsedTime:
    """Seconds since the first search of a study began, while one ran.

    Args:
        clock: seconds.
        before: seconds of earlier sessions.
        note: writes them down.
    """

    def __init__(self, clock: Callable[[], float], before: float, note: Callable[[float], None]) -> None:
        self._clock, self._began = clock, clock()
        self._before = self._noted = before
        self._write = note

    @property
    def seconds(self) -> float:
        return self._before + self._clock() - self._began

    def note(self) -> None:
        """Write down how long it was."""
        self._noted = self.seconds
        self._write(self._noted)

    def tick(self) -> None:
        """Write it down if that is due."""
        if self.seconds - self._noted >= NOTE_EVERY:
            self.note()
