"""Reads a study without driving it, also while a search writes it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from ktray.errors import UserError
from ktray.search import journal
from ktray.search.space import ResolvedObjective, Space
from ktray.search.trial import Trial


@dataclasses.dataclass(frozen=True)
class History:
    """A study as it was when it was read.

    Attributes:
        target: draws that it was last asked for.
        elapsed: seconds that searches of it ran.
    """

    name: str
    space: Space
    trials: list[Trial]
    target: int
    elapsed: float

    @property
    def objectives(self) -> tuple[ResolvedObjective, ...]:
        return self.space.objectives


def read(home: Path, name: str) -> History:
    """A study as it is now.

    Raises:
        UserError: there is no such study, or it was never begun.
    """
    notes, trials = journal.read(home, name)
    if "space" not in notes or "target" not in notes:  # its driver was killed before it noted these
        raise UserError(f"the study {name!r} was never begun", str(home), "Search it again.")
    space = Space.from_content(notes["space"], name)
    return History(name, space, trials, notes["target"]["trials"], notes.get("spent", 0.0))


def keys_in_use(home: Path) -> set[str]:
    """Keys that the trials of all studies of a home rest on, paused ones included."""
    return {key for name in journal.study_names(home) for trial in journal.read(home, name)[1] for key in trial.artifacts}
