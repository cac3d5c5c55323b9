"""What a session of a study is asked for: how many draws, and in the study's own space."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ktray.errors import UserError
from ktray.search.journal import Journal
from ktray.search.space import Space


def checked(asked: str | int | None) -> str:
    """The wish as text, empty for none.

    Raises:
        UserError: it is no number of trials.
    """
    text = "" if asked is None else str(asked)
    if text and not re.fullmatch(r"\+?[1-9]\d*", text):
        raise UserError(f"{text!r} is no number of trials", "--trials", "Write 50, or +50 for fifty more.")
    return text


def settled(asked: str | int | None, budget: int, noted: Mapping[str, Any] | None, met: bool) -> dict[str, int]:
    """The target of this session and the budget that it answers to, as the study notes them.

    `+50` adds to a target that was met; before that it is the same command again, and adds nothing. Without a wish a study
    keeps its target until the space's budget is changed.

    Args:
        asked: ``50``, ``"50"``, ``"+50"`` or None.
        budget: trials in the space's file.
        noted: what this function returned when the study was last opened; None for a new study.
        met: whether that target was met and every trial came to its end.

    Raises:
        UserError: `asked` is no number of trials.
    """
    text = checked(asked)
    if not text:
        kept = noted is not None and noted["budget"] == budget
        return {"trials": noted["trials"] if noted and kept else budget, "budget": budget}
    if not text.startswith("+"):
        return {"trials": int(text), "budget": budget}
    if noted is None:
        return {"trials": int(text[1:]), "budget": budget}
    return {"trials": noted["trials"] + (int(text[1:]) if met else 0), "budget": budget}


def agreed(journal: Journal, space: Space, asked: str | int | None, drawn: int, unfinished: bool) -> int:
    """The target of this session; the journal notes it and the space.

    Args:
        drawn: trials so far, duplicates not counted.
        unfinished: whether some of them have not come to their end.
    """
    notes = journal.notes()
    met = "target" in notes and drawn >= notes["target"]["trials"] and not unfinished
    target = settled(asked, space.budget.trials, notes.get("target"), met)
    for name, value in {"space": space.document.model_dump(mode="json"), "target": target}.items():
        if notes.get(name) != value:
            journal.note(name, value)
    return target["trials"]


def raised(journal: Journal, trials: int) -> int:
    """The target of this session from now on."""
    journal.note("target", {**journal.notes()["target"], "trials": trials})
    return trials


def same_space(noted: Mapping[str, Any] | None, space: Space, name: str) -> None:
    """Refuse to go on with a study in another space than it was begun with.

    Args:
        noted: the space's document as the study keeps it; None for a new study.

    Raises:
        UserError: it names up to five differences.
    """
    if noted is None:
        return
    changed = space.difference(noted)
    if changed:
        more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
        raise UserError(
            f"the study {name!r} was begun with another space: {'; '.join(changed[:5])}{more}",
            space.source,
            "Give this search another --name, or undo the change.",
        )
