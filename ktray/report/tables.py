"""The leaderboard, teachers against students, and failures, as rows of text for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ktray.pipeline.naming import student_name, teacher_name
from ktray.report.formatting import Objective, anonymised, cause_without_keys, duration, loss_of, measure, value_of
from ktray.search.ranking import component_names, distinguishing_params, ranked

if TYPE_CHECKING:
    from ktray.search.trial import Trial

LEADERBOARD_ROWS = 20
FAILED_TRIALS_SHOWN = 12  # numbers of trials per cause


def leaderboard(
    trials: Sequence[Trial],
    objectives: Sequence[Objective],
    references: Mapping[str, Mapping[str, Any]],
    level: Collection[int] = (),
) -> dict[str, Any] | None:
    """Return the best completed trials, and each reference as a row at its rank; None without completed trials.

    Args:
        level: numbers of the trials that cannot be told apart from the best; they are marked.
    """
    metric, mode = objectives[0]
    completed = ranked(trials, objectives)
    if not completed:
        return None
    shown = completed[:LEADERBOARD_ROWS]
    differences = distinguishing_params(shown)
    rows = []
    for trial in shown:
        extra = [differences[trial.number]] if differences else []
        row = _trial_row(trial, objectives, extra)
        row["name"] += " ~" if trial.number in level else ""
        rows.append((value_of(trial, metric), row))
    loss = loss_of(mode)
    for name, reference in references.items():
        value = reference["metrics"].get(metric)
        better = [index for index, (other, _) in enumerate(rows) if value is None or other is None or loss(other) > loss(value)]
        place = len(rows) if value is None or not better else better[0]
        rows.insert(place, (value, _reference_row(name, reference["metrics"], objectives)))
    text_columns = ["teacher", "transfer", "student", *(["differs in"] if differences else [])]
    return {
        "head": [*text_columns, *(name for name, _ in objectives), *_cost_columns(objectives)],
        "words": len(text_columns),
        "rows": [row for _, row in rows],
        "more": max(0, len(completed) - LEADERBOARD_ROWS),
        "level": any(trial.number in level for trial in shown),
    }


def seeds_table(spreads: Sequence[Mapping[str, Any]], metric: str) -> list[dict[str, str]]:
    """Return a row for each pair that completed under several seeds: its trials, mean, deviation and interval."""
    return [
        {
            "trials": ", ".join(map(str, spread["trials"])),
            "mean": measure(metric, spread["mean"]),
            "deviation": measure(metric, spread["deviation"]),
            "interval": f"{measure(metric, spread['low'])} to {measure(metric, spread['high'])}",
        }
        for spread in spreads
    ]


def _cost_columns(objectives: Sequence[Objective]) -> list[str]:
    shown = {metric for metric, _ in objectives}
    return [name for name in ("cost/seconds", "cost/marginal_seconds") if name not in shown]


def _trial_row(trial: Trial, objectives: Sequence[Objective], more: list[str]) -> dict[str, Any]:
    costs = [duration(trial.cost.get(name.removeprefix("cost/"))) for name in _cost_columns(objectives)]
    values = [measure(metric, value_of(trial, metric)) for metric, _ in objectives]
    teacher, transfer, student = component_names(trial)
    words = [anonymised(teacher) or "–", transfer, student, *map(anonymised, more)]
    return {"name": f"{trial.number}", "words": words, "numbers": [*values, *costs], "reference": False}


def _reference_row(name: str, metrics: Mapping[str, float], objectives: Sequence[Objective]) -> dict[str, Any]:
    columns = [*(metric for metric, _ in objectives), *_cost_columns(objectives)]
    values = [measure(column, metrics.get(column)) for column in columns]
    return {"name": name, "words": [], "numbers": values, "reference": True}


def heat_table(trials: Sequence[Trial], objectives: Sequence[Objective]) -> dict[str, Any] | None:
    """Return the best value per teacher (rows) and student (columns), best first; None with fewer than two cells to compare."""
    metric, mode = objectives[0]
    best: dict[tuple[str, str], Trial] = {}
    for trial in ranked(trials, objectives):
        if value_of(trial, metric) is not None:
            best.setdefault(_teacher_and_student(trial), trial)
    pruned = Counter(
        combination for trial in trials if trial.state == "pruned" and (combination := _teacher_and_student(trial)) not in best
    )
    if len(best) < 2:
        return None
    values = {cell: value_of(trial, metric) or 0.0 for cell, trial in best.items()}
    low, high = min(values.values()), max(values.values())
    worst = max(values.values(), key=loss_of(mode))
    students = list(dict.fromkeys(student for _, student in [*best, *pruned]))

    def cell(teacher: str, student: str) -> dict[str, Any] | None:
        trial = best.get((teacher, student))
        if trial is None:
            return {"pruned": pruned[teacher, student]} if pruned[teacher, student] else None
        heat = abs(values[teacher, student] - worst) / (high - low) if high > low else 0.0
        value = measure(metric, values[teacher, student])
        return {"value": value, "trial": trial.number, "heat": round(100 * heat), "pruned": 0}

    rows = [
        {"name": teacher, "cells": [cell(teacher, student) for student in students]}
        for teacher in dict.fromkeys(teacher for teacher, _ in [*best, *pruned])
    ]
    return {"students": students, "rows": rows, "pruned": bool(pruned)}


def _teacher_and_student(trial: Trial) -> tuple[str, str]:
    return anonymised(teacher_name(trial.pair)) or "none", student_name(trial.pair)


def failures(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return each cause of failure once, the most frequent first, with the numbers of the failed trials."""
    causes: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.state == "failed":
            causes.setdefault(cause_without_keys(trial.cause or "no cause was recorded"), []).append(trial)
    return [
        {
            "cause": cause if len(cause) <= 400 else f"{cause[:400]}…",
            "count": len(failed),
            "numbers": [trial.number for trial in failed[:FAILED_TRIALS_SHOWN]],
            "more": max(0, len(failed) - FAILED_TRIALS_SHOWN),
        }
        for cause, failed in sorted(causes.items(), key=lambda entry: -len(entry[1]))
    ]
