"""What the report plots: objectives against each other, and learning curves of the best students."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from ktray.pipeline.pair_metrics import learning_curve
from ktray.report.formatting import Objective, loss_of, measure, pair_title, reference_values, value_of
from ktray.report.stage_reuse import FindArtifact
from ktray.search.ranking import pareto_front, ranked
from ktray.text import counted

if TYPE_CHECKING:
    from ktray.search.trial import Trial

WIDTH, HEIGHT = 480, 310
LEFT, RIGHT, TOP, BOTTOM = 66, 462, 14, 264
WIDE_RIGHT = 942  # of a plot as wide as the page
COLOURS = 8  # styles s0 to s7 of the style sheet


@dataclass(frozen=True)
class _Point:
    """One trial in a scatter plot: its coordinates, its label, and its tooltip."""

    x: float
    y: float
    name: str  # number of the trial
    title: str


@dataclass(frozen=True)
class _Line:
    """One trial's curve: (x, y) by increasing x. `style` selects its colour and dash pattern."""

    points: tuple[tuple[float, float], ...]
    name: str
    style: int


def strip(values: Sequence[float], best: float, references: Mapping[str, float], metric: str) -> Markup:
    """Draw all completed trials as dots on one axis, with the best and the references marked."""
    x_axis = value_axis([*values, *references.values()], (16, 704), metric)
    positions = [x_axis.at(value) for value in references.values()]
    ticks = Markup("").join(
        Markup('<line class="grid" x1="{0}" x2="{0}" y1="34" y2="62"/><text class="tick" x="{0}" y="80">{1}</text>').format(
            pixels(x_axis.at(value)), tick_text(value)
        )
        for value in x_axis.ticks
        if all(abs(x_axis.at(value) - position) > 24 for position in positions)  # else a reference's line crosses the number
    )
    dots = Markup("").join(
        Markup('<circle class="dot" cx="{}" cy="48" r="5.5"/>').format(pixels(x_axis.at(value))) for value in values
    )
    winner = Markup('<circle class="best" cx="{}" cy="48" r="8"/><text class="strong" {} y="24">best {}</text>').format(
        pixels(x_axis.at(best)), _text_anchor(x_axis.at(best)), measure(metric, best)
    )
    base = Markup('<line class="axis" x1="16" x2="704" y1="48" y2="48"/>')
    marks, bottom = _strip_references(x_axis, references, metric)
    return drawing(
        ticks + base + marks + dots + winner, f"{metric} of all completed trials and the references", 720, bottom, "strip"
    )


def _strip_references(x_axis: _Axis, references: Mapping[str, float], metric: str) -> tuple[Markup, int]:
    """Draw the references' lines and names; also return the height of the plot, which grows with the rows of names."""
    drawn, last, row, bottom = Markup(""), -1000.0, 0, 92
    for name, value in sorted(references.items(), key=lambda entry: entry[1]):
        x = x_axis.at(value)
        row = row + 1 if x - last < 310 else 0  # names that would overlap go to separate rows
        drawn += Markup(
            '<line class="reference" x1="{0}" x2="{0}" y1="28" y2="{4}"/><text class="note" {1} y="{5}">{2} {3}</text>'
        ).format(pixels(x), _text_anchor(x), name, measure(metric, value), 88 + 20 * row, 106 + 20 * row)
        bottom, last = max(bottom, 114 + 20 * row), x
    return drawn, bottom


def scatter(points: Sequence[_Point], front: Sequence[_Point], labels: tuple[str, str], lines: Mapping[str, float]) -> Markup:
    """Draw points, those of the Pareto front joined and labelled, and a horizontal line per reference value."""
    x_axis = value_axis([point.x for point in points], (LEFT, RIGHT), labels[0])
    y_axis = value_axis([*(point.y for point in points), *lines.values()], (BOTTOM, TOP), labels[1])
    dots = Markup("").join(
        Markup('<circle class="dot" data-t="{}" cx="{}" cy="{}" r="5"><title>{}</title></circle>').format(
            point.name, pixels(x_axis.at(point.x)), pixels(y_axis.at(point.y)), point.title
        )
        for point in points
        if point not in front
    )
    joined = " ".join(
        f"{pixels(x_axis.at(point.x))},{pixels(y_axis.at(point.y))}" for point in sorted(front, key=lambda point: point.x)
    )
    marked = Markup("").join(
        Markup('<circle class="best" data-t="{}" cx="{}" cy="{}" r="6.5"><title>{}</title></circle>').format(
            point.name, pixels(x_axis.at(point.x)), pixels(y_axis.at(point.y)), point.title
        )
        for point in front
    )
    names = _labels([(x_axis.at(point.x), y_axis.at(point.y) - 10, point.name) for point in front])
    path = Markup('<polyline class="front" points="{}"/>').format(joined)
    title = f"{labels[1]} against {labels[0]}"
    return drawing(
        _frame(x_axis, y_axis) + _reference_lines(y_axis, lines) + path + dots + marked + names, title, WIDTH, HEIGHT, "plot"
    )


def _labels(positions: Sequence[tuple[float, float, str]]) -> Markup:
    """Draw names at (x, y), in the given order; a name that would overlap an earlier one is left out."""
    shown: list[tuple[float, float]] = []
    drawn = Markup("")
    for x, y, name in positions:
        inside = min(max(x, LEFT + 14), RIGHT - 14)
        if all(abs(inside - other[0]) > 22 or abs(y - other[1]) > 14 for other in shown):
            shown.append((inside, y))
            drawn += Markup('<text class="strong" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                pixels(inside), pixels(y), name
            )
    return drawn


def curves(lines: Sequence[_Line], labels: tuple[str, str]) -> Markup:
    """Draw at most eight curves, distinguished by colour, dash pattern and the name at their end."""
    last = max(x for line in lines for x, _ in line.points)
    x_axis = linear_axis(0, last, (LEFT, RIGHT - 26), labels[0])
    y_axis = value_axis([y for line in lines for _, y in line.points], (BOTTOM, TOP), labels[1])
    ends = _spread([y_axis.at(line.points[-1][1]) for line in lines], 13, (TOP, BOTTOM))
    drawn = Markup("")
    for index, line in enumerate(lines):
        positions = [(x_axis.at(x), y_axis.at(y)) for x, y in line.points]
        drawn += Markup('<g class="s{}">').format(line.style % COLOURS)
        drawn += Markup('<polyline class="curve" points="{}"/>').format(
            " ".join(f"{pixels(x)},{pixels(y)}" for x, y in positions)
        )
        if len(positions) <= 12:
            drawn += Markup("").join(
                Markup('<circle cx="{}" cy="{}" r="3"/>').format(pixels(x), pixels(y)) for x, y in positions
            )
        drawn += Markup('<text x="{}" y="{}">{}</text></g>').format(
            pixels(positions[-1][0] + 7), pixels(ends[index] + 4), line.name
        )
    return drawing(_frame(x_axis, y_axis) + drawn, f"{labels[1]} over {labels[0]}", WIDTH, HEIGHT, "plot")


def size_bars(counts: Sequence[int]) -> Markup:
    """Draw cluster sizes as bars, largest first; with more than 240 clusters, a bar is the mean of several neighbours."""
    ordered = sorted(counts, reverse=True)
    bars = min(len(ordered), 240)
    edges = [index * len(ordered) // bars for index in range(bars + 1)]
    means = [sum(ordered[a:b]) / (b - a) for a, b in pairwise(edges)]
    y_axis = linear_axis(0, 1.05 * ordered[0], (BOTTOM, TOP), "images")
    floor, step = y_axis.at(0), (RIGHT - LEFT) / bars
    rects = Markup("").join(
        Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"/>').format(
            pixels(LEFT + index * step),
            pixels(y_axis.at(mean)),
            pixels(max(0.8, step * 0.82)),
            pixels(floor - y_axis.at(mean)),
        )
        for index, mean in enumerate(means)
    )
    even = y_axis.at(sum(ordered) / len(ordered))
    line = Markup(
        '<line class="reference" x1="{1}" x2="{2}" y1="{0}" y2="{0}"/><text class="note end" x="{2}" y="{3}">mean {4}</text>'
    )
    mean_line = line.format(pixels(even), LEFT, RIGHT, pixels(even - 5), f"{sum(ordered) / len(ordered):.4g}")
    x_axis = _Axis(lambda value: value, (), f"{counted(len(ordered), 'cluster')}, largest first")
    return drawing(_frame(x_axis, y_axis) + rects + mean_line, "cluster sizes", WIDTH, HEIGHT, "plot")


def _frame(x_axis: _Axis, y_axis: _Axis, right: float = RIGHT) -> Markup:
    horizontal = Markup("").join(
        Markup(
            '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/><text class="tick end" x="{3}" y="{4}">{5}</text>'
        ).format(LEFT, right, pixels(y_axis.at(tick)), LEFT - 7, pixels(y_axis.at(tick) + 4), tick_text(tick))
        for tick in y_axis.ticks
    )
    vertical = Markup("").join(
        Markup('<text class="tick" x="{}" y="{}">{}</text>').format(pixels(x_axis.at(tick)), BOTTOM + 18, tick_text(tick))
        for tick in x_axis.ticks
    )
    base = Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, right, BOTTOM, BOTTOM)
    middle = (TOP + BOTTOM) / 2
    names = Markup('<text class="label" x="{}" y="{}">{}</text>').format((LEFT + right) / 2, BOTTOM + 39, x_axis.label)
    names += Markup('<text class="label" transform="rotate(-90 11 {0})" x="11" y="{0}">{1}</text>').format(middle, y_axis.label)
    return horizontal + base + vertical + names


def _reference_lines(y_axis: _Axis, lines: Mapping[str, float], right: float = RIGHT) -> Markup:
    mark = Markup(
        '<line class="reference" x1="{1}" x2="{2}" y1="{0}" y2="{0}"/><text class="note end" x="{2}" y="{3}">{4}</text>'
    )
    return Markup("").join(
        mark.format(pixels(y_axis.at(value)), LEFT, right, pixels(y_axis.at(value) - 5), name) for name, value in lines.items()
    )


def drawing(body: Markup, title: str, width: float, height: float, kind: str) -> Markup:
    """An SVG of this content, of a class of the style sheet."""
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        kind, width, height, title, body
    )


def pixels(value: float) -> str:
    """A position in a drawing, to a tenth of a pixel."""
    return f"{value:.1f}"


def _text_anchor(x: float) -> Markup:
    """Return the attributes that centre a text on `x` in the strip plot, or align it with the border that it would cross."""
    if x < 160:
        return Markup('x="4" text-anchor="start"')
    return Markup('x="716" text-anchor="end"') if x > 560 else Markup('x="{}" text-anchor="middle"').format(pixels(x))


def _spread(positions: Sequence[float], gap: float, limits: tuple[float, float]) -> list[float]:
    """Return `positions` in the same order, moved so that they are at least `gap` apart and end within the limits."""
    order = sorted(range(len(positions)), key=positions.__getitem__)
    moved = list(positions)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    for after, before in pairwise(order[::-1]):
        moved[after] = min(moved[after], limits[1])
        moved[before] = min(moved[before], moved[after] - gap)
    return moved


# --- axes


@dataclass(frozen=True)
class _Axis:
    """One axis of a plot.

    Attributes:
        at: value -> position in the drawing.
        ticks: values that get a grid line and a number.
        label: quantity, with its unit.
    """

    at: Callable[[float], float]
    ticks: tuple[float, ...]
    label: str


def value_axis(values: Sequence[float], extent: tuple[float, float], label: str) -> _Axis:
    """Return a linear axis over `values` with a margin; logarithmic if they span more than a factor of 30 and exceed 1."""
    low, high = min(values), max(values)
    if low > 0 and high > 1 and high / low > 30:  # accuracies and fractions in [0, 1] stay linear
        return _logarithmic_axis(low, high, extent, f"{label} (logarithmic)")
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    return linear_axis(low - margin, high + margin, extent, label)


def linear_axis(low: float, high: float, extent: tuple[float, float], label: str) -> _Axis:
    """Return a linear axis from `low` to `high`, without a margin."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step)
    ticks = tuple(index * step for index in range(first, math.floor(high / step) + 1))
    return _Axis(lambda value: extent[0] + (value - low) / (high - low) * (extent[1] - extent[0]), ticks, label)


def _logarithmic_axis(low: float, high: float, extent: tuple[float, float], label: str) -> _Axis:
    low, high = low / 1.3, high * 1.3
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 300 else (1,)
    ticks = tuple(step * 10.0**power for power in powers for step in steps if low <= step * 10.0**power <= high)
    span = math.log(high / low)
    return _Axis(lambda value: extent[0] + math.log(value / low) / span * (extent[1] - extent[0]), ticks, label)


def tick_text(value: float) -> str:
    """Format the number of a tick: ``0.35``, ``120``, ``5k``, ``1M``."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= factor:
            return f"{value / factor:.4g}{unit}"
    return f"{round(value, 10):.4g}"


def history_plot(
    trials: Sequence[Trial], objectives: Sequence[Objective], references: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The first objective of each completed trial in the order of the draws, and the best so far; None with fewer than two."""
    metric, mode = objectives[0]
    completed = [trial for trial in trials if trial.state == "completed"]
    points = [(trial, value) for trial in completed if (value := value_of(trial, metric)) is not None]
    if len(points) < 2:
        return None
    lines = reference_values(references, metric)
    x_axis = linear_axis(-0.5, max(trial.number for trial in trials) + 0.5, (LEFT, WIDE_RIGHT), "trial")
    x_axis = replace(x_axis, ticks=tuple(tick for tick in x_axis.ticks if tick == int(tick)))
    y_axis = value_axis([*(value for _, value in points), *lines.values()], (BOTTOM, TOP), metric)
    best, steps = points[0][1], []
    for trial, value in points:
        best = min(best, value, key=loss_of(mode))
        steps.append((x_axis.at(trial.number), y_axis.at(best)))
    corners = [steps[0], *(corner for (_, before), after in pairwise(steps) for corner in ((after[0], before), after))]
    corners.append((WIDE_RIGHT, steps[-1][1]))
    path = Markup('<polyline class="front" points="{}"/>').format(" ".join(f"{pixels(x)},{pixels(y)}" for x, y in corners))
    ticks = Markup("").join(
        Markup('<line class="rug" data-t="{0}" x1="{1}" x2="{1}" y1="{2}" y2="{3}"><title>{4}</title></line>').format(
            trial.number, pixels(x_axis.at(trial.number)), BOTTOM - 7, BOTTOM, f"{trial.number}: {trial.state}"
        )
        for trial in trials
        if trial.state in ("pruned", "failed", "paused")
    )
    dots = Markup("").join(
        Markup('<circle class="dot" data-t="{}" cx="{}" cy="{}" r="{}"><title>{}</title></circle>').format(
            trial.number,
            pixels(x_axis.at(trial.number)),
            pixels(y_axis.at(value)),
            5 if len(points) < 200 else 3,
            f"{trial.number}: {pair_title(trial.pair)}, {metric} {measure(metric, value)}",
        )
        for trial, value in points
    )
    frame = _frame(x_axis, y_axis, WIDE_RIGHT) + _reference_lines(y_axis, lines, WIDE_RIGHT)
    plot = drawing(frame + ticks + path + dots, f"{metric} over the trials", WIDE_RIGHT + 18, HEIGHT, "plot wide-plot")
    return {"plot": plot, "metric": metric, "stopped": bool(ticks)}


FRONT_ROWS = 8  # of the table beside the plot


def objectives_plot(
    trials: Sequence[Trial], objectives: Sequence[Objective], references: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Plot the first objective (y) against the second (x); None with one objective or fewer than two points."""
    if len(objectives) < 2:
        return None
    (y_metric, _), (x_metric, _) = objectives[:2]
    front = pareto_front(trials, objectives[:2])
    on_front = {trial.number for trial in front}
    points = []
    for trial in ranked(trials, objectives):
        x, y = value_of(trial, x_metric), value_of(trial, y_metric)
        if x is not None and y is not None:
            values = f"{y_metric} {measure(y_metric, y)}, {x_metric} {measure(x_metric, x)}"
            title = f"{trial.number}: {pair_title(trial.pair)}, {values}"
            points.append((trial.number, _Point(x, y, str(trial.number), title)))
    if len(points) < 2:
        return None
    lines = reference_values(references, y_metric)
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
            for trial in front[:FRONT_ROWS]
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
    lines = [_Line(points, str(trial.number), index) for index, (trial, points) in enumerate(trial_curves) if points]
    return curves(lines, ("epoch", label)) if lines else None


def _loss(trial: Trial, find: FindArtifact) -> list[tuple[float, float]]:
    key = trial.keys.get("student")
    artifact = find(key) if key else None
    rows = learning_curve(artifact) if artifact else []
    return [(float(row["epoch"]), float(row["loss"])) for row in rows if row.get("loss") is not None]


def _finite(points: Sequence[tuple[float, float]]) -> Curve:
    return tuple((float(x), float(y)) for x, y in points if math.isfinite(y))
