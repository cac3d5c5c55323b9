"""Every trial: by its teacher, transfer and student with the best scores at each rung, and one by one with its spec."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ktray.fingerprint import flat
from ktray.report.formatting import Objective, anonymised, anonymised_data, duration, loss_of, measure, param_text, value_of
from ktray.search.ranking import component_names
from ktray.search.trial import STATES, Trial
from ktray.text import visible

MOST_VALUES = 4  # of a parameter, listed in a row of the table of pairs


def judged_rungs(trials: Sequence[Trial], early_stop: Mapping[str, Any] | None) -> list[tuple[int, str, str]]:
    """(epoch, metric, ``max`` or ``min``) of each rung at which a trial was judged; at epoch 0 its teacher was."""
    stop = early_stop or {}
    epochs = {epoch for trial in trials for epoch in trial.scores}
    teacher = stop.get("teacher") or {}
    first = [(0, str(teacher.get("metric", "teacher")), str(teacher.get("mode") or "max"))]
    metric, mode = str(stop.get("metric", "score")), str(stop.get("mode") or "max")
    own = any(trial.teacher_score is not None for trial in trials)
    return [*(first if own else []), *((epoch, metric, mode) for epoch in sorted(epochs))]


def score_at(trial: Trial, epoch: int) -> float | None:
    """A trial's finite score at a rung; None if it was not judged there."""
    score = trial.scores.get(epoch) if epoch else trial.teacher_score
    return score if score is not None and math.isfinite(score) else None


def varying_params(trials: Sequence[Trial]) -> list[str]:
    """The parameters that differ between these trials, or that only some of them have, in the order of the space."""
    names = dict.fromkeys(name for trial in trials for name in trial.params)
    return [name for name in names if len({str(trial.params.get(name)) for trial in trials}) > 1]


def pairs_table(
    trials: Sequence[Trial], objectives: Sequence[Objective], early_stop: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """A row per teacher, transfer and student, the best first, with its best score at each rung; None for a single row.

    Pruned trials count like all others; duplicates are left out. What varies within a row is listed in its last cell.
    """
    groups: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        if trial.state != "duplicate" and trial.pair:
            groups.setdefault(component_names(trial), []).append(trial)
    if len(groups) < 2:
        return None
    rungs, (metric, mode) = judged_rungs(trials, early_stop), objectives[0]
    best = {names: _best_values(group, rungs, (metric, mode)) for names, group in groups.items()}
    modes = [mode, *(each for _, _, each in reversed(rungs))]

    def rank(names: tuple[str, str, str]) -> list[float]:
        values = [best[names][-1], *best[names][-2::-1]]
        return [math.inf if found is None else loss_of(of)(found[0]) for found, of in zip(values, modes, strict=True)]

    columns = [*rungs, (-1, metric, mode)]
    extremes = [_extremes([best[names][index] for names in groups], of) for index, (_, _, of) in enumerate(columns)]
    rows = [
        {
            "words": [anonymised(name) or "–" for name in names],
            "counts": _counted_states(groups[names]),
            "cells": [
                _cell(found, column, extreme) for found, column, extreme in zip(best[names], columns, extremes, strict=True)
            ],
            "varies": _varied(groups[names]),
        }
        for names in sorted(groups, key=rank)
    ]
    heads = [f"{of} of the teacher" if epoch == 0 else f"{of} at epoch {epoch}" for epoch, of, _ in rungs]
    return {"heads": [*heads, metric], "rows": rows, "varies": any(row["varies"] for row in rows)}


Found = tuple[float, int] | None
"""(value, number of the trial)."""


def _best_values(group: Sequence[Trial], rungs: Sequence[tuple[int, str, str]], objective: Objective) -> list[Found]:
    found = []
    for epoch, _, mode in rungs:
        scores = [(score, trial.number) for trial in group if (score := score_at(trial, epoch)) is not None]
        found.append(_best_of(scores, mode))
    completed = [trial for trial in group if trial.state == "completed"]
    values = [(value, trial.number) for trial in completed if (value := value_of(trial, objective[0])) is not None]
    return [*found, _best_of(values, objective[1])]


def _best_of(values: Sequence[tuple[float, int]], mode: str) -> Found:
    loss = loss_of(mode)
    return min(values, key=lambda entry: loss(entry[0]), default=None)


def _extremes(found: Sequence[Found], mode: str) -> tuple[float, float]:
    """(worst, best) of a column."""
    values = [entry[0] for entry in found if entry is not None] or [0.0]
    low, high = min(values), max(values)
    return (low, high) if mode == "max" else (high, low)


def _cell(found: Found, column: tuple[int, str, str], extremes: tuple[float, float]) -> dict[str, Any] | None:
    if found is None:
        return None
    worst, best = extremes
    heat = round(100 * (found[0] - worst) / (best - worst)) if best != worst else 0
    return {"value": measure(column[1], found[0]), "sort": found[0], "trial": found[1], "heat": heat}


def _counted_states(group: Sequence[Trial]) -> list[str]:
    counts = Counter(trial.state for trial in group)
    return [f"{counts[state]} {state}" for state in STATES if counts[state]]


def _varied(group: Sequence[Trial]) -> str:
    """What the trials of a row differ in: ``student.schedule.lr 0.012 to 0.165; teacher.hog.cell 4, 7``."""
    parts = []
    for name in varying_params(group):
        values = {trial.params[name] for trial in group if name in trial.params}
        if all(type(value) in (int, float) for value in values) and len(values) > MOST_VALUES:
            parts.append(f"{name} {min(values):.3g} to {max(values):.3g}")
        else:
            short = {param_text(float(f"{value:.3g}") if isinstance(value, float) else value) for value in values}
            texts = sorted(short if len(short) == len(values) else map(param_text, values))
            more = f" and {len(texts) - MOST_VALUES} more" if len(texts) > MOST_VALUES else ""
            parts.append(f"{name} {', '.join(texts[:MOST_VALUES])}{more}")
    return anonymised("; ".join(parts))


def trials_table(
    trials: Sequence[Trial], objectives: Sequence[Objective], early_stop: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """A row per trial in the order of their draws, with every parameter that varies, every rung and every objective.

    None without a trial.
    """
    if not trials:
        return None
    names, rungs = varying_params(trials), judged_rungs(trials, early_stop)
    scores = [f"{metric} of the teacher" if epoch == 0 else f"{metric} at epoch {epoch}" for epoch, metric, _ in rungs]
    heads = [("state", False), ("teacher", False), ("transfer", False), ("student", False)]
    heads += [(_heading(name), all(type(trial.params.get(name, 0)) in (int, float) for trial in trials)) for name in names]
    heads += [(name, True) for name in [*scores, *(metric for metric, _ in objectives), "added seconds"]]
    return {"heads": heads, "rows": [_trial_row(trial, names, rungs, objectives) for trial in trials]}


def _heading(name: str) -> str:
    """A parameter's column; the choice of a branch must not look like the column of the name."""
    return f"{name} (branch)" if name in ("teacher", "transfer", "student") else name


def _trial_row(
    trial: Trial, names: Sequence[str], rungs: Sequence[tuple[int, str, str]], objectives: Sequence[Objective]
) -> dict[str, Any]:
    words = [anonymised(name) or "–" for name in component_names(trial)] if trial.pair else ["–"] * 3
    cells: list[tuple[str, Any]] = [(trial.state, None), *((word, None) for word in words)]
    for name in names:
        value = trial.params.get(name)
        cells.append(("–" if value is None else param_text(value), value if type(value) in (int, float) else None))
    cells += [(measure(metric, score_at(trial, epoch)), score_at(trial, epoch)) for epoch, metric, _ in rungs]
    cells += [(measure(metric, value_of(trial, metric)), value_of(trial, metric)) for metric, _ in objectives]
    added = trial.cost.get("marginal_seconds")
    return {"number": trial.number, "cells": [*cells, (duration(added), added)]}


def specs(trials: Sequence[Trial], base: Trial | None) -> Markup:
    """The specs of all trials as JSON for the page's script: those of one trial, and how each other one differs from it.

    No character in it can end the script element that holds it, and none turns the direction of text.
    """
    whole = _flat_spec(base) if base is not None else {}
    different = {}
    for trial in trials:
        own = _flat_spec(trial)
        different[trial.number] = {
            "set": {name: value for name, value in own.items() if whole.get(name, _ABSENT) != value},
            "without": [name for name in whole if name not in own],
        }
    text = json.dumps({"base": whole, "trials": different}, separators=(",", ":"), allow_nan=False, default=str)
    for char in "<>&":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return Markup(text)


_ABSENT = object()


def _flat_spec(trial: Trial) -> dict[str, str]:
    """Dotted path -> value as JSON writes it."""
    plain = flat(anonymised_data(trial.pair)) if trial.pair else {}
    return {visible(name): visible(value if isinstance(value, str) else json.dumps(value)) for name, value in plain.items()}
