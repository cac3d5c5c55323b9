"""Reading of studies on disk: an Optuna study in a journal file. Optuna itself is not imported, which takes half a second.

A line is one of Optuna's operations, with a checksum of ours before it. Only the operations that create a trial and that set
attributes matter here: everything else about a trial is in its attributes. `journal_writer.py` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktray.checksums import parse_json
from ktray.errors import UserError
from ktray.search.trial import Trial
from ktray.text import first_few, near_word

DRIVER_LOCK = "driver.lock"  # in the folder of a study
FILE = "journal.log"  # in the folder of a study
# Optuna's operations, by their number in a line.
_CREATE_STUDY, _SET_STUDY_ATTRIBUTE, _CREATE_TRIAL, _SET_STATE, _SET_TRIAL_ATTRIBUTE = 0, 2, 4, 6, 8
_UNFINISHED = (0, 4)  # Optuna's numbers of RUNNING and WAITING


def study_folder(home: Path, name: str) -> Path:
    """The folder of a study."""
    return home / "studies" / name


def study_names(home: Path) -> list[str]:
    """Names of all studies of a home, sorted."""
    return sorted(path.parent.name for path in (home / "studies").glob("*/journal.log"))


def read(home: Path, name: str) -> tuple[dict[str, Any], list[Trial]]:
    """Notes and trials of a study, even while a search writes to it; both are empty if it was never begun.

    Raises:
        UserError: there is no such study, or its journal is damaged.
    """
    if name not in study_names(home):
        raise UserError(f"there is no study {name!r}", str(home), known_studies(home, name))
    notes: dict[str, Any] = {}
    trials: list[_JournalTrial] = []
    begun = False
    for line in _lines(study_folder(home, name) / FILE):
        operation = line["op_code"]
        if operation == _CREATE_STUDY:
            begun = begun or line["study_name"] == name
        elif operation == _SET_STUDY_ATTRIBUTE:
            notes.update(line["user_attr"])
        elif operation == _CREATE_TRIAL:
            trials.append(_created(line))
        elif operation == _SET_TRIAL_ATTRIBUTE and not trials[line["trial_id"]].finished:
            trials[line["trial_id"]].attributes.update(line["user_attr"])
        elif operation == _SET_STATE:
            trials[line["trial_id"]].finished = line["state"] not in _UNFINISHED
    if not begun:
        return {}, []
    return notes, [trial_from(number, each.params, each.attributes) for number, each in enumerate(trials)]


def known_studies(home: Path, name: str) -> str:
    """What to do instead of naming a study that is not there."""
    known = study_names(home)
    near = near_word(name, known)
    hint = f"Did you mean {near!r}? " if near else ""
    return f"{hint}Existing studies: {first_few(known)}." if known else "This home has no study."


@dataclass
class _JournalTrial:
    params: dict[str, Any]
    attributes: dict[str, Any]
    finished: bool


def _created(line: Mapping[str, Any]) -> _JournalTrial:
    """A trial as it was created, with each value as the parameter's distribution means it: a choice is kept by its number."""
    distributions = {name: json.loads(text) for name, text in line.get("distributions", {}).items()}
    params = {name: _value(distributions[name], number) for name, number in line.get("params", {}).items()}
    return _JournalTrial(params, dict(line.get("user_attrs", {})), line.get("state", 0) not in _UNFINISHED)


def _value(distribution: Mapping[str, Any], number: float) -> Any:
    kind = distribution["name"]
    if kind == "CategoricalDistribution":
        return distribution["attributes"]["choices"][int(number)]
    return int(number) if kind == "IntDistribution" else float(number)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a journal; a last line that is damaged or not yet whole is left out.

    Raises:
        UserError: another line is damaged.
    """
    texts = path.read_bytes().split(b"\n")
    if texts.pop():  # without an end: it is being written
        texts.append(b"")
    for number, text in enumerate(texts, 1):
        try:
            yield parse_json(text.decode())
        except ValueError as error:
            if number < len(texts):
                raise damaged_line_error(path, number) from error


def damaged_line_error(path: Path, line: int) -> UserError:
    """The error about a line of a journal."""
    return UserError(
        f"line {line} of {path} is damaged, so that the study {path.parent.name!r} is not what it was",
        instead="Put a copy of this file back, or search the space again under another --name: what is in the store is reused.",
    )


def trial_from(number: int, params: Mapping[str, Any], noted: Mapping[str, Any]) -> Trial:
    """The trial of these parameters and attributes."""
    progress = noted["progress"]
    return Trial(
        number=number,
        params=params,
        # Text, since Optuna keeps it in memory for every trial and a mapping is eight times as big. Old studies have mappings.
        pair=json.loads(noted["pair"]) if isinstance(noted["pair"], str) else noted["pair"],
        state=progress["state"],
        epoch=progress["epoch"],
        scores={int(epoch): score for epoch, score in progress["scores"].items()},
        teacher_score=progress.get("teacher"),
        metrics=noted.get("metrics", {}),
        objectives=noted.get("objectives", {}),
        keys=noted.get("keys", {}),
        attributed_costs=noted.get("charges", {}),
        cost=noted.get("cost", {}),
        cause=noted.get("cause"),
        duplicate_of=noted.get("duplicate_of"),
        started=noted.get("started"),
        ended=noted.get("ended"),
        planned=noted.get("planned"),
    )
