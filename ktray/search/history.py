"""Reads a study from disk without driving it, even while a search writes to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ktray.errors import UserError
from ktray.search import journal
from ktray.search.trial import Trial
from ktray.stores.locks import LockHolder, lock_holder

if TYPE_CHECKING:
    from ktray.search.space import Space

STATUS_FILE = "status.json"  # written by a running search every few seconds


def driver_of_study(home: Path, name: str) -> LockHolder | None:
    """The process that searches a study; None if nobody does."""
    folder = journal.study_folder(home, name)
    return lock_holder(folder / journal.DRIVER_LOCK, folder / STATUS_FILE)


@dataclasses.dataclass(frozen=True)
class StudySnapshot:
    """A snapshot of a study.

    Attributes:
        content: of the space's file, modes included (`Space.content`). Verbs that only read need no more of it.
        target: number of draws that was last asked for.
        elapsed: seconds that its searches have run, over all resumes.
    """

    name: str
    content: Mapping[str, Any]
    trials: list[Trial]
    target: int
    elapsed: float

    @cached_property
    def space(self) -> Space:
        """The space, which needs pydantic and the specs of all methods: a quarter of a second.

        Raises:
            UserError: another version of ktray wrote it, and this one does not know its fields.
        """
        from ktray.search.space import Space

        return Space.from_content(self.content, self.name)

    @property
    def objectives(self) -> tuple[tuple[str, Literal["max", "min"]], ...]:
        """(metric, mode) of what the study optimises, the most important first."""
        return tuple((objective["metric"], objective["mode"] or "max") for objective in self.content["objectives"])


def read_study(home: Path, name: str) -> StudySnapshot:
    """The current state of a study. What ran when its search ended is `interrupted`, once nobody searches it any more.

    Raises:
        UserError: there is no such study, or its first driver was killed before it recorded anything.
    """
    notes, trials = journal.read(home, name)
    if "space" not in notes or "target" not in notes:  # its driver was killed before it wrote these
        raise UserError(f"the study {name!r} was never begun", str(home), "Search it again.")
    running = [index for index, trial in enumerate(trials) if trial.state == "running"]
    if running and driver_of_study(home, name) is None:
        for index in running:
            trials[index] = dataclasses.replace(trials[index], state="interrupted")
    return StudySnapshot(name, notes["space"], trials, notes["target"]["trials"], notes.get("spent", 0.0))


def keys_in_use(home: Path) -> set[str]:
    """Keys of all artifacts that trials in any study of a home refer to, paused trials included."""
    return {key for name in journal.study_names(home) for trial in journal.read(home, name)[1] for key in trial.artifact_keys}
