"""What each worker of a study's searches did when, from the stages that they noted."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ktray.report.formatting import duration
from ktray.report.timeline import COLOURS, drawing_of_stages
from ktray.text import counted

MOST_STAGES = 3000  # drawn; a page with more of them is slow to open
PAUSE = 1.0  # seconds between two searches in the drawing


def workers_timeline(runs: Sequence[Mapping[str, Any]], keys: Collection[str]) -> dict[str, Any] | None:
    """A row per worker with the stages that it ran, searches one after the other; None if nothing was noted.

    Args:
        runs: `key`, `stage`, `worker`, `session`, `began` and `ended` in seconds since 1970, `outcome` of a failed attempt.
        keys: of the study's artifacts; what a scheduler ran for other searches is left out, failed attempts are kept.
    """
    own = [run for run in runs if run["key"] in keys or run["outcome"]]
    shown = sorted(own, key=lambda run: float(run["began"]))[-MOST_STAGES:]
    if not shown:
        return None
    sessions: dict[str, list[Mapping[str, Any]]] = {}
    for run in shown:
        sessions.setdefault(str(run["session"]), []).append(run)
    stages, phases, offset = [], [], 0.0
    for number, found in enumerate(sessions.values(), 1):
        first, last = min(float(run["began"]) for run in found), max(float(run["ended"]) for run in found)
        name = f"{number}/" if len(sessions) > 1 else ""
        for run in found:
            times = {"began": offset + float(run["began"]) - first, "ended": offset + float(run["ended"]) - first}
            stages.append({**run, **times, "worker": f"{name}{run['worker']}"})
        offset += last - first + PAUSE
        phases += [{"name": f"search {number} ended", "at": offset - PAUSE}] if len(sessions) > 1 else []
    data = {"stages": stages, "phases": phases, "workers": {}, "gpus": {}, "cpu": []}
    busy = sum(stage["ended"] - stage["began"] for stage in stages)
    workers = len({stage["worker"] for stage in stages})
    total = offset - PAUSE * len(sessions)
    return {
        "plot": Markup(drawing_of_stages(data)),  # which escapes every text in it
        "legend": [(name, colour) for name, colour in COLOURS.items() if any(stage["stage"] == name for stage in stages)],
        "sentence": f"{counted(len(stages), 'stage')} on {counted(workers, 'worker')} in {duration(total)}; "
        f"{duration(busy)} of stages, {busy / total if total else 1:.1f} at a time on average.",
        "left_out": len(own) - len(shown),
    }
