"""Objectives against each other, and learning curves of the best students."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ktray.pipeline.pair_metrics import curve
from ktray.report.formatting import counted, measure, title_of
from ktray.report.metric_values import Objective, value_of
from ktray.report.plots import COLOURS, Line, Point, curves, scatter
from ktray.report.stage_reuse import Find
from ktray.search.ranking import front, ranked

if TYPE_CHECKING:
    from ktray.search.trial import Trial

SHOWN = 8  # rows of the front's table beside the plot


def objectives_plot(
    trials: Sequence[Trial], objectives: Sequence[Objective], references: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The first objective (up) against the second (across); None with one objective or fewer than two points."""
    if len(objectives) < 2:
        return None
    (up, _), (across, _) = objectives[:2]
    best = front(trials, objectives[:2])
    numbers = {trial.number for trial in best}
    points = []
    for trial in ranked(trials, objectives):
        x, y = value_of(trial, across), value_of(trial, up)
        if x is not None and y is not None:
            title = f"{trial.number}: {title_of(trial.pair)}, {up} {measure(up, y)}, {across} {measure(across, x)}"
            points.append((trial.number, Point(x, y, str(trial.number), title)))
    if len(points) < 2:
        return None
    lines = {
        name: float(value)
        for name, reference in references.items()
        if (value := reference["metrics"].get(up)) is not None and math.isfinite(value)
    }
    marked = [point for number, point in points if number in numbers]
    return {
        "plot": scatter([point for _, point in points], marked, (across, up), lines),
        "front": counted(len(marked), "trial"),
        "rows": [
            {
                "number": trial.number,
                "name": title_of(trial.pair),
                "cells": [measure(metric, value_of(trial, metric)) for metric in (up, across)],
            }
            for trial in best[:SHOWN]
        ],
        "of": len(points),
        "modes": [(metric, "higher" if mode == "max" else "lower") for metric, mode in objectives[:2]],
    }


def learning_curves(trials: Sequence[Trial], objectives: Sequence[Objective], find: Find) -> dict[str, Any] | None:
    """Scores at rungs and student loss per epoch of the best eight completed trials; None if neither was recorded."""
    best = ranked(trials, objectives)[:COLOURS]
    scores = [(trial, _finite(sorted((int(epoch), score) for epoch, score in trial.scores.items()))) for trial in best]
    losses = [(trial, _finite(_loss(trial, find))) for trial in best]
    panels = [_panel(scores, "score at rungs"), _panel(losses, "student loss")]
    if not any(panels):
        return None
    legend = [{"number": trial.number, "name": title_of(trial.pair), "style": f"s{index}"} for index, trial in enumerate(best)]
    return {"scores": panels[0], "losses": panels[1], "legend": legend}


Curve = tuple[tuple[float, float], ...]


def _panel(found: Sequence[tuple[Trial, Curve]], label: str) -> Markup | None:
    """A plot of the curves that have points; an absent one keeps its place, so that colours mean the same in both panels."""
    lines = [Line(points, str(trial.number), index) for index, (trial, points) in enumerate(found) if points]
    return curves(lines, ("epoch", label)) if lines else None


def _loss(trial: Trial, find: Find) -> list[tuple[float, float]]:
    key = trial.keys.get("student")
    artifact = find(key) if key else None
    rows = curve(artifact) if artifact else []
    return [(float(row["epoch"]), float(row["loss"])) for row in rows if row.get("loss") is not None]


def _finite(points: Sequence[tuple[float, float]]) -> Curve:
    return tuple((float(x), float(y)) for x, y in points if math.isfinite(y))
