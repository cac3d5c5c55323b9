"""What each worker of a study's searches ran, noted beside its journal as it happens; the report draws it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FILE = "workers.jsonl"  # in the folder of a study
log = logging.getLogger("ktray")


def noting_what_workers_run(folder: Path) -> Callable[[list[dict[str, Any]], Mapping[str, Any]], None]:
    """A function of new events of a scheduler and its status, which appends each run that has ended to a file of the study.

    A disk that is full costs the notes, not the search.
    """
    from ktray.scheduler.messages import PUBLISHED, STARTED  # a report only reads

    running: dict[str, tuple[str, float]] = {}

    def observe(events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        ended = []
        for event in events:
            key = event["key"]
            if event["event"] == STARTED:
                running[key] = (event["worker"], event["time"])
            elif key in running:
                worker, began = running.pop(key)
                outcome = "" if event["event"] == PUBLISHED else event["event"]
                run = {"key": key, "stage": event["stage"], "worker": worker, "session": status["name"]}
                ended.append({**run, "began": round(began, 2), "ended": round(event["time"], 2), "outcome": outcome})
        if ended:
            try:
                with open(folder / FILE, "a", encoding="utf-8") as file:
                    file.write("".join(f"{json.dumps(run)}\n" for run in ended))
            except OSError as error:
                log.warning("what workers ran is not noted: %s", error.strerror)

    return observe


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs that have ended, over all searches of a study; a line that was not written whole is left out."""
    found = []
    with contextlib.suppress(FileNotFoundError), open(folder / FILE, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                run = json.loads(line)
                if isinstance(run, dict) and run.keys() >= _NAMES:
                    found.append(run)
    return found


_NAMES = {"key", "stage", "worker", "session", "began", "ended", "outcome"}
