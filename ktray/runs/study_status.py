"""How far a study is and what it does now: its journal, and the status that a running search writes beside it."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ktray.artifact import kind_of
from ktray.checksums import json_text, read_json
from ktray.cost_model.stage_costs import INTERVAL, RELATIVE_ERROR
from ktray.pipeline.naming import pair_name
from ktray.scheduler.resources import STAGES
from ktray.search import journal, ranking
from ktray.search.budget import HOUR, Spending
from ktray.search.history import STATUS_FILE, StudySnapshot, driver_of_study, read_study
from ktray.search.trial import STATES, State, Trial
from ktray.stores import Store
from ktray.stores.locks import FRESH_SECONDS
from ktray.text import counted, first_few

WRITE_SECONDS = 2.0
STUCK_SECONDS = 180.0  # without progress, for a stage that has not reported any yet
STUCK_FACTOR = 10  # times the usual interval between a stage's reports, which come after each epoch and in longer loops
LEAST_STUCK_SECONDS = 30.0  # for stages with short epochs; a worker that stalls is replaced after half of that
ShowWork = Callable[[list[dict[str, Any]], Mapping[str, Any]], None]


def is_stuck(run: Mapping[str, Any]) -> bool:
    """Whether a stage that runs has made no progress for many times its usual pace, or for minutes if it has none.

    Args:
        run: an entry of ``running`` in the scheduler's status: `silent_seconds` since its last progress, `pace_seconds`
            between two.
    """
    pace = run.get("pace_seconds")
    return bool(run["silent_seconds"] > (STUCK_SECONDS if pace is None else max(LEAST_STUCK_SECONDS, STUCK_FACTOR * pace)))


def with_stuck_warnings(show: ShowWork, say: Callable[[str], None]) -> ShowWork:
    """`show`, preceded by a warning about each stage that makes no progress, once per attempt."""
    warned: set[str] = set()

    def show_and_warn(events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        for run in status["running"]:
            if is_stuck(run) and run["attempt"] not in warned:
                warned.add(run["attempt"])
                last = _progress(run)
                say(
                    f"{run['key']} on {run['worker']}, node {run['node'][:8]}, has made no progress for "
                    f"{span(run['silent_seconds'])}{f' (its last: {last})' if last else ''}"
                )
        show(events, status)

    return show_and_warn


def with_status_file(folder: Path, show: ShowWork) -> ShowWork:
    """`show`, after writing the scheduler's status to ``folder/status.json``, for `status` in other processes."""
    written = -WRITE_SECONDS

    def write_and_show(events: list[dict[str, Any]], status: Mapping[str, Any]) -> None:
        nonlocal written
        if time.monotonic() - written >= WRITE_SECONDS:
            written = time.monotonic()
            with suppress(OSError):  # a full disk must not end the event follower's thread
                partial = folder / f".{STATUS_FILE}.{os.getpid()}"
                partial.write_text(json_text({"time": time.time(), "pid": os.getpid(), "scheduler": status}))
                partial.replace(folder / STATUS_FILE)
        show(events, status)

    return write_and_show


def status(home: Path, name: str, store: Store) -> tuple[dict[str, Any], str]:
    """What a study is doing, as plain data and as text.

    The data: `study`, `running` (whether a search of it runs now), `by` (which process), `trials` (state -> number), `target`,
    `spent_seconds`, `spent_stage_seconds` (summed over workers, before the student and from it on), `eta_seconds` and
    `eta_between` (a 90% interval; None while unknown), `stages` (artifacts that the trials rest on: how often `asked`, how
    many `made`), `now` (what the scheduler does; None if no search runs or it has not begun to compute) and `best`.

    Raises:
        UserError: there is no such study.
    """
    study = read_study(home, name)
    driver = driver_of_study(home, name)
    now = _scheduler_status(journal.study_folder(home, name), driver.pid) if driver else None
    left = time_left(study, lambda key: store.find(key) is not None) if driver else None
    answer: dict[str, Any] = {
        "study": name,
        "running": driver is not None,
        "by": driver.name if driver else None,
        "trials": {state: sum(trial.state == state for trial in study.trials) for state in STATES},
        "target": study.target,
        # A search writes the time spent twice a minute; before that, the time since its start is closer.
        "spent_seconds": round(max(study.elapsed, time.time() - driver.since) if driver else study.elapsed, 1),
        "spent_stage_seconds": {part: round(seconds, 1) for part, seconds in Spending(study.trials).spent._asdict().items()},
        "eta_seconds": left[0] if left else None,
        "eta_between": list(left[1:]) if left else None,
        "stages": _stages(study.trials, store),
        "now": now,
        "best": _best(study),
    }
    return answer, _text(answer, {trial.number: trial for trial in study.trials})


def _scheduler_status(folder: Path, pid: int) -> dict[str, Any] | None:
    """What the scheduler of this driver does: `stages` running, trials `waiting`, the number `queued`, and `workers`."""
    try:
        written = read_json(folder / STATUS_FILE)
    except (OSError, ValueError):
        return None
    if written["pid"] != pid:
        return None
    scheduler, age = written["scheduler"], time.time() - written["time"]
    running = [{**run, "seconds": round(written["time"] - run["since"] + age, 1)} for run in scheduler["running"]]
    for run in running:
        run["stuck"] = is_stuck(run)
    states = {run["key"]: _run_state(run) for run in running} | dict.fromkeys(scheduler["queued"], "queued")
    return {
        "age_seconds": round(age, 1),
        "stages": running,
        "waiting": [
            {
                **wait,
                "state": states.get(wait["key"], "its inputs are missing"),
                "seconds": round(written["time"] - wait["since"] + age, 1),
            }
            for wait in scheduler["waiting"]
        ],
        "queued": len(scheduler["queued"]),
        "workers": len(scheduler["workers"]),
        "computed": scheduler["computed"],
        "reused": scheduler["reused"],
    }


def _run_state(run: Mapping[str, Any]) -> str:
    where = f"runs on {run['worker']}, node {run['node'][:8]}"
    return f"{where}, without progress for {span(run['silent_seconds'])}" if run["stuck"] else where


def _progress(run: Mapping[str, Any]) -> str:
    return " ".join(f"{name} {value:.4g}" for name, value in run["progress"].items())


def _stages(trials: Sequence[Trial], store: Store) -> dict[str, dict[str, int]]:
    """Stage -> how many artifacts trials asked for, and how many had to be made for that."""
    asked: Counter[str] = Counter(key for trial in trials if trial.state != "duplicate" for key in trial.artifact_keys)
    made = [key for key in asked if store.find(key) is not None]
    names = sorted({kind_of(key) for key in asked}, key=STAGES.index)
    return {
        name: {
            "asked": sum(count for key, count in asked.items() if kind_of(key) == name),
            "made": sum(kind_of(key) == name for key in made),
        }
        for name in names
    }


def _best(study: StudySnapshot) -> dict[str, Any] | None:
    ranked = ranking.ranked(study.trials, study.objectives)
    if not ranked:
        return None
    return {"trial": ranked[0].number, "pair": pair_name(ranked[0].pair), "objectives": dict(ranked[0].objectives)}


def _text(answer: Mapping[str, Any], trials: Mapping[int, Trial]) -> str:
    counts = ", ".join(f"{count} {state}" for state, count in answer["trials"].items() if count) or "no trial yet"
    drawn = sum(count for state, count in answer["trials"].items() if state != "duplicate")
    shown = progress_of([trial for trial in trials.values() if trial.state != "duplicate"], answer["target"])
    lines = [f"{answer['study']}: {shown} ({counts}), {span(answer['spent_seconds'])} so far"]
    if not answer["running"]:
        finished = drawn >= answer["target"] and not answer["trials"]["interrupted"] and not answer["trials"]["paused"]
        lines.append("no search of it runs now" + ("" if finished else "; the same ktray search goes on from here"))
    else:
        lines.append(f"a search runs now ({answer['by']}), {_time_left(answer)}")
        lines += _now(answer["now"], trials) if answer["now"] else ["it is starting, or all that it needs is in the store"]
    if answer["best"]:
        values = ", ".join(f"{metric} {value:.4g}" for metric, value in answer["best"]["objectives"].items())
        lines.append(f"best so far: trial {answer['best']['trial']}, {answer['best']['pair']}: {values}")
    shared = [f"{stage} {entry['made']} for {counted(entry['asked'], 'trial')}" for stage, entry in answer["stages"].items()]
    return "\n".join([*lines, *([f"artifacts made: {', '.join(shared)}"] if shared else [])])


def _time_left(answer: Mapping[str, Any]) -> str:
    if answer["eta_seconds"] is None:
        return "too early to say when"
    return time_left_text(answer["eta_seconds"], *answer["eta_between"])


def time_left_text(seconds: float, low: float, high: float) -> str:
    """``about 3 min left (2 min to 5 min)``."""
    return f"about {span(seconds)} left ({span(low)} to {span(high)})"


def progress_of(trials: Sequence[Trial], target: int) -> str:
    """``9 finished, 3 paused, 2 running of 16 trials``; trials are without duplicates."""
    counts = Counter(trial.state for trial in trials)
    open_states: tuple[State, ...] = ("paused", "interrupted", "running")
    finished = len(trials) - sum(counts[state] for state in open_states)
    parts = [f"{finished} finished", *(f"{counts[state]} {state}" for state in open_states if counts[state])]
    return f"{', '.join(parts)} of {counted(target, 'trial')}"


def _now(now: Mapping[str, Any], trials: Mapping[int, Trial]) -> list[str]:
    lines = []
    if now["age_seconds"] > FRESH_SECONDS:
        lines.append(f"it has said nothing for {span(now['age_seconds'])}")
    names = ranking.names_by_difference([trial for trial in trials.values() if trial.state != "duplicate"])
    waiters: dict[str, list[str]] = {}
    for wait in now["waiting"]:
        waiters.setdefault(wait["key"], []).append(wait["waiter"])
    for run in now["stages"]:
        helpers = f" and {len(run['helpers'])} more" if run["helpers"] else ""
        what = f"{first_few(waiters.get(run['key'], ['a trial to come']), 3)}: {kind_of(run['key']).replace('_', '-')}"
        where = f"{run['worker']}{helpers}, node {run['node'][:8]}"
        line = f"  {what}  {_progress(run)}  {span(run['seconds'])} on {where} ({run['key']})"
        if run["stuck"]:
            line += f"  NO PROGRESS for {span(run['silent_seconds'])}"
        lines.append(line.rstrip())
    for wait in now["waiting"]:
        number = wait["waiter"].removeprefix("trial ")
        pair = f" ({names[int(number)]})" if number.isdecimal() and int(number) in names else ""
        stage = kind_of(wait["key"]).replace("_", "-")
        lines.append(f"  {wait['waiter']}{pair} waits for {stage} since {span(wait['seconds'])}: {wait['state']}")
    return [*lines, f"  {counted(now['workers'], 'worker')}, {counted(now['queued'], 'stage')} queued"]


def span(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


MIN_SETTLED = 2  # trials that must have ended or paused before there is an estimate


def time_left(study: StudySnapshot, made: Callable[[str], bool]) -> tuple[float, float, float] | None:
    """Seconds until a running search reaches its target or a limit of its budget; None while it is too early to estimate.

    A trial costs what the cost model expects of its stages, and what was recorded once they are made. Each further draw is
    expected to cost the mean of the draws so far, which includes promotions and shared stages.

    Args:
        made: whether the artifact of a key exists.

    Returns:
        Expected seconds, and the ends of an interval that holds 90 % of outcomes: (seconds, low, high).
    """
    drawn = [trial for trial in study.trials if trial.state != "duplicate"]
    running = [trial for trial in drawn if trial.state == "running"]
    if len(drawn) - len(running) < MIN_SETTLED or not study.elapsed:
        return None
    costs = [sum(sum(part.values()) for part in trial.attributed_costs.values()) for trial in drawn]
    ordered = [part[key] for trial in running for part in trial.attributed_costs.values() for key in part if not made(key)]
    if sum(costs) <= sum(ordered):  # nothing is computed yet, or no costs are known: count every trial as equally expensive
        costs, ordered = [1.0] * len(drawn), [1.0] * len(running)
    computed = sum(costs) - sum(ordered)
    at_once = computed / study.elapsed
    to_draw = max(0, study.target - len(drawn))
    work = sum(ordered) + to_draw * statistics.mean(costs)
    scatter = statistics.pstdev(costs)
    variance = to_draw * scatter**2 + (to_draw * scatter) ** 2 / len(costs)
    variance += sum((RELATIVE_ERROR * seconds) ** 2 for seconds in ordered)
    error = INTERVAL * math.sqrt(variance)
    limit = _limit(study, computed, at_once)
    seconds, low, high = (round(min(limit, max(0.0, amount) / at_once), 1) for amount in (work, work - error, work + error))
    return seconds, low, high


def _limit(study: StudySnapshot, computed: float, at_once: float) -> float:
    """Seconds until the budget ends the search."""
    budget = study.space.budget
    until_stop = math.inf if budget.stop_after is None else budget.stop_after - study.elapsed
    until_spent = math.inf if budget.hours is None else (budget.hours * HOUR - computed) / at_once
    return max(0.0, min(until_stop, until_spent))
