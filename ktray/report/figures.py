"""What the report plots: objectives against each other, and learning curves of the best students."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ktray.pipeline.pair_metrics import learning_curve
from ktray.report.formatting import Objective, counted, measure, pair_title, value_of
from ktray.report.stage_reuse import FindArtifact
from ktray.report.svg_plots import COLOURS, Line, Point, curves, scatter
from ktray.search.ranking import front, ranked

if TYPE_CHECKING:
    from ktray.search.trial import Trial

FRONT_ROWS = 8  # of the table beside the plot


def objectives_plot(
    trials: Sequence[Trial], objectives: Sequence[Objective], references: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Plot the first objective (y) against the second (x); None with one objective or fewer than two points."""
    if len(objectives) < 2:
        return None
    (y_metric, _), (x_metric, _) = objectives[:2]
    pareto_front = front(trials, objectives[:2])
    on_front = {trial.number for trial in pareto_front}
    points = []
    for trial in ranked(trials, objectives):
        x, y = value_of(trial, x_metric), value_of(trial, y_metric)
        if x is not None and y is not None:
            values = f"{y_metric} {measure(y_metric, y)}, {x_metric} {measure(x_metric, x)}"
            title = f"{trial.number}: {pair_title(trial.pair)}, {values}"
            points.append((trial.number, Point(x, y, str(trial.number), title)))
    if len(points) < 2:
        return None
    lines = {
        name: float(value)
        for name, reference in references.items()
        if (value := reference["metrics"].get(y_metric)) is not None and math.isfinite(value)
    }
    marked = [point for number, point in points if number in on_front]
    return {
        "plot": scatter([point for _, point in points], marked, (x_metric, y_metric), lines),
        "front": counted(len(marked), "trial"),
        "rows": [
            {
                "number": trial.number,
                "name": pair_title(trial.pair),
                "cells": [measure(metric, value_of(trial, metric)) for metric in (y_metric, x_metric)],
            }
            for trial in pareto_front[:FRONT_ROWS]
        ],
        "of": len(points),
        "modes": [(metric, "higher" if mode == "max" else "lower") for metric, mode in objectives[:2]],
    }


def learning_curves(trials: Sequence[Trial], objectives: Sequence[Objective], find: FindArtifact) -> dict[str, Any] | None:
    """Plot scores at rungs and student loss per epoch of the best eight completed trials; None if neither was recorded."""
    best = ranked(trials, objectives)[:COLOURS]
    scores = [(trial, _finite(sorted((int(epoch), score) for epoch, score in trial.scores.items()))) for trial in best]
    losses = [(trial, _finite(_loss(trial, find))) for trial in best]
    panels = [_panel(scores, "score at rungs"), _panel(losses, "student loss")]
    if not any(panels):
        return None
    legend = [
        {"number": trial.number, "name": pair_title(trial.pair), "style": f"s{index}"} for index, trial in enumerate(best)
    ]
    return {"scores": panels[0], "losses": panels[1], "legend": legend}


Curve = tuple[tuple[float, float], ...]


def _panel(trial_curves: Sequence[tuple[Trial, Curve]], label: str) -> Markup | None:
    """Plot the curves that have points. A missing one keeps its colour, so that colours mean the same trial in both panels."""
    lines = [Line(points, str(trial.number), index) for index, (trial, points) in enumerate(trial_curves) if points]
    return curves(lines, ("epoch", label)) if lines else None


def _loss(trial: Trial, find: FindArtifact) -> list[tuple[float, float]]:
    key = trial.keys.get("student")
    artifact = find(key) if key else None
    rows = learning_curve(artifact) if artifact else []
    return [(float(row["epoch"]), float(row["loss"])) for row in rows if row.get("loss") is not None]


def _finite(points: Sequence[tuple[float, float]]) -> Curve:
    return tuple((float(x), float(y)) for x, y in points if math.isfinite(y))
