"""How far a study is and what it does now: its journal, and what the running search notes beside it every few seconds."""

from __future__ import annotations

import json
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from ktray.pipeline.naming import pair_name
from ktray.scheduler.resources import STAGES
from ktray.search import journal, ranking
from ktray.search.budget import Spending
from ktray.search.eta import time_left
from ktray.search.history import History, read
from ktray.search.trial import STATES, Trial
from ktray.stores import Store

FILE = "status.json"
EVERY = 2.0
FRESH = 10.0  # seconds; what was noted longer ago says nothing about now
SILENT = 180.0  # seconds without progress that are worth a word, of a stage that has not reported any yet
PATIENCE = 10  # times the usual pace of a stage's reports: after each epoch, and in its longer loops
LEAST = 30.0  # seconds, of a stage with short epochs: its worker is replaced after half of that if it stands still
Show = Callable[[list[dict[str, Any]], Mapping[str, Any]], None]


def is_stuck(run: Mapping[str, Any]) -> bool:
    """Whether a stage that runs has made no progress for many times its usual pace, or for minutes if it has none.

    Args:
        run: an entry of ``running`` in the scheduler's status: `silent_seconds` since its last progress, `pace_seconds`
            between two.
    """
    pace = run.get("pace_seconds")
    return bool(run["silent_seconds"] > (SILENT if pace is None else max(LEAST, PATIENCE * pace)))


def naming_stuck(show: Show, say: Callable[[str], None]) -> Show:
    """`show` that also says which stage makes no progress, once per attempt."""
    said: set[str] = set()

    def note(events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        for run in status["running"]:
            if is_stuck(run) and run["attempt"] not in said:
                said.add(run["attempt"])
                last = _progress(run)
                say(
                    f"{run['key']} on {run['worker']}, node {run['node'][:8]}, has made no progress for "
                    f"{span(run['silent_seconds'])}{f' (its last: {last})' if last else ''}"
                )
        show(events, status)

    return note


def noting(folder: Path, show: Show) -> Show:
    """`show` that also keeps the scheduler's last status in ``folder/status.json``, for `status` in other processes."""
    written = -EVERY

    def note(events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        nonlocal written
        if time.monotonic() - written >= EVERY:
            written = time.monotonic()
            with suppress(OSError):  # a full disk must not end the thread that follows the scheduler
                partial = folder / f".{FILE}.{os.getpid()}"
                partial.write_text(json.dumps({"time": time.time(), "pid": os.getpid(), "scheduler": status}))
                partial.replace(folder / FILE)
        show(events, status)

    return note


def status(home: Path, name: str, store: Store) -> tuple[dict[str, Any], str]:
    """What a study is doing, as plain data and as text.

    The data: `study`, `running` (whether a search of it runs now), `by` (which process), `trials` (state -> number), `target`,
    `spent_seconds`, `spent_stage_seconds` (added up over workers, before the student and from it on), `eta_seconds` and
    `eta_between` (nine times of ten; None while unknown), `stages` (artifacts that the trials rest on: how often `asked`, how
    many are `made`), `now` (what the scheduler does; None if no search runs or it has not begun to compute) and `best`.

    Raises:
        UserError: there is no such study.
    """
    study = read(home, name)
    by = _driver(journal.folder(home, name))
    now = _noted(journal.folder(home, name), by[0]) if by else None
    left = time_left(study, lambda key: store.find(key) is not None) if by else None
    answer: dict[str, Any] = {
        "study": name,
        "running": by is not None,
        "by": by[1] if by else None,
        "trials": {state: sum(trial.state == state for trial in study.trials) for state in STATES},
        "target": study.target,
        # A search notes it twice a minute, so of the first one its begin tells more.
        "spent_seconds": round(max(study.elapsed, time.time() - by[2]) if by else study.elapsed, 1),
        "spent_stage_seconds": {part: round(seconds, 1) for part, seconds in Spending(study.trials).spent._asdict().items()},
        "eta_seconds": left.seconds if left else None,
        "eta_between": [left.low, left.high] if left else None,
        "stages": _stages(study.trials, store),
        "now": now,
        "best": _best(study),
    }
    return answer, _text(answer, {trial.number: trial for trial in study.trials})


def _driver(folder: Path) -> tuple[int, str, float] | None:
    """The process that searches, what it calls itself, and since when; its lock is not tried: that would be in its way."""
    lock = folder / "driver.lock"
    try:
        said, since = lock.read_text().strip(), lock.stat().st_mtime
    except OSError:
        return None
    match = re.fullmatch(r"process (\d+) on (.+)", said)
    if match is None:
        return None
    if match[2] != socket.gethostname():
        fresh = _age(folder) < FRESH  # a home on a shared disk: of another machine only what it notes is known
        return (int(match[1]), said, since) if fresh else None
    with suppress(psutil.Error):
        process = psutil.Process(int(match[1]))
        if process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= since + 1:
            return int(match[1]), said, since
    return None


def _age(folder: Path) -> float:
    try:
        return time.time() - (folder / FILE).stat().st_mtime
    except OSError:
        return float("inf")


def _noted(folder: Path, pid: int) -> dict[str, Any] | None:
    """What this driver's scheduler does: `stages` running, trials `waiting`, the number `queued`, and `workers`."""
    try:
        noted = json.loads((folder / FILE).read_text())
    except (OSError, ValueError):
        return None
    if noted["pid"] != pid:
        return None
    scheduler, age = noted["scheduler"], time.time() - noted["time"]
    running = [{**run, "seconds": round(noted["time"] - run["since"] + age, 1)} for run in scheduler["running"]]
    for run in running:
        run["stuck"] = is_stuck(run)
    places = {run["key"]: _place(run) for run in running} | dict.fromkeys(scheduler["queued"], "queued")
    return {
        "age_seconds": round(age, 1),
        "stages": running,
        "waiting": [
            {
                **wait,
                "state": places.get(wait["key"], "its inputs are missing"),
                "seconds": round(noted["time"] - wait["since"] + age, 1),
            }
            for wait in scheduler["waiting"]
        ],
        "queued": len(scheduler["queued"]),
        "workers": len(scheduler["workers"]),
        "computed": scheduler["computed"],
        "reused": scheduler["reused"],
    }


def _place(run: Mapping[str, Any]) -> str:
    where = f"runs on {run['worker']}, node {run['node'][:8]}"
    return f"{where}, without progress for {span(run['silent_seconds'])}" if run["stuck"] else where


def _progress(run: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in run["progress"].items())


def _stages(trials: Sequence[Trial], store: Store) -> dict[str, dict[str, int]]:
    """Stage -> how many artifacts trials asked for, and how many had to be made for that."""
    asked: Counter[str] = Counter(key for trial in trials if trial.state != "duplicate" for key in trial.artifacts)
    made = [key for key in asked if store.find(key) is not None]
    names = sorted({key.rpartition("-")[0] for key in asked}, key=STAGES.index)
    return {
        name: {
            "asked": sum(count for key, count in asked.items() if key.rpartition("-")[0] == name),
            "made": sum(key.rpartition("-")[0] == name for key in made),
        }
        for name in names
    }


def _best(study: History) -> dict[str, Any] | None:
    ranked = ranking.ranked(study.trials, study.objectives)
    if not ranked:
        return None
    return {"trial": ranked[0].number, "pair": pair_name(ranked[0].pair), "objectives": dict(ranked[0].objectives)}


def _text(answer: Mapping[str, Any], trials: Mapping[int, Trial]) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in answer["trials"].items() if count) or "no trial yet"
    drawn = sum(count for state, count in answer["trials"].items() if state != "duplicate")
    lines = [f"{answer['study']}: {drawn} of {answer['target']} trials ({counts}), {span(answer['spent_seconds'])} so far"]
    if not answer["running"]:
        over = drawn >= answer["target"] and not answer["trials"]["running"] and not answer["trials"]["paused"]
        lines.append("no search of it runs now" + ("" if over else "; the same ktray search goes on from here"))
    else:
        lines.append(f"a search runs now ({answer['by']}), {_left(answer)}")
        lines += _now(answer["now"], trials) if answer["now"] else ["it is starting, or all that it needs is in the store"]
    if answer["best"]:
        values = ", ".join(f"{metric} {value:.4g}" for metric, value in answer["best"]["objectives"].items())
        lines.append(f"best so far: trial {answer['best']['trial']}, {answer['best']['pair']}: {values}")
    shared = [f"{stage} {entry['made']} for {entry['asked']} trials" for stage, entry in answer["stages"].items()]
    return "\n".join([*lines, *([f"artifacts made: {', '.join(shared)}"] if shared else [])])


def _left(answer: Mapping[str, Any]) -> str:
    if answer["eta_seconds"] is None:
        return "too early to say when"
    low, high = answer["eta_between"]
    return f"about {span(answer['eta_seconds'])} left ({span(low)} to {span(high)})"


def _now(now: Mapping[str, Any], trials: Mapping[int, Trial]) -> list[str]:
    lines = []
    if now["age_seconds"] > FRESH:
        lines.append(f"it has said nothing for {span(now['age_seconds'])}")
    for run in now["stages"]:
        helpers = f" and {len(run['helpers'])} more" if run["helpers"] else ""
        line = f"  {run['key']}  {span(run['seconds'])} on {run['worker']}{helpers}, node {run['node'][:8]}  {_progress(run)}"
        if run["stuck"]:
            line += f"  NO PROGRESS for {span(run['silent_seconds'])}"
        lines.append(line.rstrip())
    for wait in now["waiting"]:
        number = wait["waiter"].removeprefix("trial ")
        pair = f" ({pair_name(trials[int(number)].pair)})" if number.isdecimal() and int(number) in trials else ""
        lines.append(f"  {wait['waiter']}{pair} waits for {wait['key']} since {span(wait['seconds'])}: {wait['state']}")
    return [*lines, f"  {now['workers']} workers, {now['queued']} stages queued"]


def span(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
