"""Leaderboard, teachers against students, failures: rows of text, ready for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ktray.pipeline.naming import student_name, teacher_name
from ktray.report.formatting import duration, kind_of_cause, measure, without_places
from ktray.report.metric_values import Objective, losses, value_of
from ktray.search.ranking import ranked
from ktray.search.trial_differences import names, told_apart

if TYPE_CHECKING:
    from ktray.search.trial import Trial

SHOWN = 20
SHOWN_NUMBERS = 12


def leaderboard(
    trials: Sequence[Trial], objectives: Sequence[Objective], references: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The best completed trials, with each reference as a row where its value belongs; None without completed trials."""
    metric, mode = objectives[0]
    completed = ranked(trials, objectives)
    if not completed:
        return None
    shown = completed[:SHOWN]
    apart = told_apart(shown)
    rows = [(value_of(each, metric), _trial_row(each, objectives, [apart[each.number]] if apart else [])) for each in shown]
    loss = losses(mode)
    for name, reference in references.items():
        value = reference["metrics"].get(metric)
        better = [index for index, (other, _) in enumerate(rows) if value is None or other is None or loss(other) > loss(value)]
        place = len(rows) if value is None or not better else better[0]
        rows.insert(place, (value, _reference_row(name, reference["metrics"], objectives)))
    words = ["teacher", "transfer", "student", *(["differs in"] if apart else [])]
    return {
        "head": [*words, *(name for name, _ in objectives), *_cost_head(objectives)],
        "words": len(words),
        "rows": [row for _, row in rows],
        "more": max(0, len(completed) - SHOWN),
    }


def _cost_head(objectives: Sequence[Objective]) -> list[str]:
    known = {metric for metric, _ in objectives}
    return [name for name in ("cost/seconds", "cost/marginal_seconds") if name not in known]


def _trial_row(trial: Trial, objectives: Sequence[Objective], more: list[str]) -> dict[str, Any]:
    costs = [duration(trial.cost.get(name.removeprefix("cost/"))) for name in _cost_head(objectives)]
    values = [measure(metric, value_of(trial, metric)) for metric, _ in objectives]
    teacher, transfer, student = names(trial)
    words = [without_places(teacher) or "–", transfer, student, *map(without_places, more)]
    return {"name": f"{trial.number}", "words": words, "numbers": [*values, *costs], "reference": False}


def _reference_row(name: str, metrics: Mapping[str, float], objectives: Sequence[Objective]) -> dict[str, Any]:
    columns = [*(metric for metric, _ in objectives), *_cost_head(objectives)]
    values = [measure(column, metrics.get(column)) for column in columns]
    return {"name": name, "words": [], "numbers": values, "reference": True}


def heat_table(trials: Sequence[Trial], objectives: Sequence[Objective]) -> dict[str, Any] | None:
    """Best value per teacher (rows) and student (columns), both best first; None unless there is something to compare."""
    metric, mode = objectives[0]
    best: dict[tuple[str, str], Trial] = {}
    for trial in ranked(trials, objectives):
        if value_of(trial, metric) is not None:
            best.setdefault(_teacher_and_student(trial), trial)
    pruned = Counter(
        place for trial in trials if trial.state == "pruned" and (place := _teacher_and_student(trial)) not in best
    )
    if len(best) < 2:
        return None
    values = {cell: value_of(trial, metric) or 0.0 for cell, trial in best.items()}
    low, high = min(values.values()), max(values.values())
    worst = max(values.values(), key=losses(mode))
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
    return without_places(teacher_name(trial.pair)) or "none", student_name(trial.pair)


def failures(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Each cause once, the most frequent first, with the numbers of its trials."""
    causes: dict[str, list[Trial]] = {}
    for trial in trials:
        if trial.state == "failed":
            causes.setdefault(kind_of_cause(trial.cause or "no cause was recorded"), []).append(trial)
    return [
        {
            "cause": cause if len(cause) <= 400 else f"{cause[:400]}…",
            "count": len(failed),
            "numbers": [trial.number for trial in failed[:SHOWN_NUMBERS]],
            "more": max(0, len(failed) - SHOWN_NUMBERS),
        }
        for cause, failed in sorted(causes.items(), key=lambda entry: -len(entry[1]))
    ]
