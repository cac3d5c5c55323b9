"""What the report draws about parameters: the effect of each with its uncertainty, and parallel coordinates of all trials."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from ktray.report.effects import LevelEffect, Results, level_effects, levels_of, results_to_explain
from ktray.report.figures import drawing, linear_axis, pixels, tick_text, value_axis
from ktray.report.formatting import Objective, loss_of, measure, pair_title, param_text, value_of
from ktray.report.trial_tables import varying_params
from ktray.search.trial import Trial
from ktray.text import counted, cut

ROW, NAME_WIDTH, PANEL, HEAD = 20, 250, 300, 30  # pixels
MOST_SENTENCES = 8
MANY_LINES = 100  # from here on lines are thin
MOST_AXES = 12
MOST_MARKED = 5  # values of a number that are marked themselves, evenly spaced
MOST_LABELS = 12  # values of a parameter that are words
AXIS_STEP, LEFT, TOP, BOTTOM = 130, 70, 46, 260
SHADES = 5


def effects_plot(
    trials: Sequence[Trial], objectives: Sequence[Objective], early_stop: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The effects of the levels of each parameter, one panel per result that can be explained; None if none can.

    Returns:
        `plot`; `panels`: (result, trials with it); `found`: sentences about effects that are told apart from none.
    """
    levels = levels_of([trial for trial in trials if trial.state != "duplicate"])
    panels = [
        (name, len(results), level_effects(results, levels)) for name, results in _explained(trials, objectives, early_stop)
    ]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return None
    order = _largest_first(panels)
    rows: list[tuple[str, str | None]] = []  # (parameter, level); a level of None is the parameter's heading
    for name in order:
        labels = dict.fromkeys(effect.label for _, _, found in panels for effect in found.get(name, []))
        rows += [(name, None), *((name, label) for label in labels)]
    height = HEAD + ROW * len(rows) + 30
    body = Markup("")
    for index, (name, label) in enumerate(rows):
        y = HEAD + ROW * index + 14
        kind, x, text = ("strong", 0, name) if label is None else ("tick end", NAME_WIDTH - 12, label)
        body += Markup('<text class="{}" x="{}" y="{}">{}<title>{}</title></text>').format(kind, x, y, cut(text, 38), text)
    for number, (name, _, found) in enumerate(panels):
        left = NAME_WIDTH + number * (PANEL + 48)
        body += _panel(name, found, rows, left, height)
    width = NAME_WIDTH + len(panels) * (PANEL + 48)
    return {
        "plot": drawing(body, "effects of the parameters", width, height, "effects"),
        "width": width,
        "panels": [(name, count) for name, count, _ in panels],
        "found": _sentences(panels),
    }


def _explained(
    trials: Sequence[Trial], objectives: Sequence[Objective], early_stop: Mapping[str, Any] | None
) -> list[tuple[str, Results]]:
    return results_to_explain([trial for trial in trials if trial.state != "duplicate"], objectives, early_stop)


Panel = tuple[str, int, dict[str, list[LevelEffect]]]


def _largest_first(panels: Sequence[Panel]) -> list[str]:
    """The parameters by the largest difference between two levels over its uncertainty, in any panel."""

    def weight(name: str) -> float:
        spans = []
        for _, _, found in panels:
            effects = found.get(name, [])
            if effects:
                widest = max(effect.high - effect.low for effect in effects) or 1.0
                spans.append((max(e.mean for e in effects) - min(e.mean for e in effects)) / widest)
        return max(spans, default=0.0)

    names = dict.fromkeys(name for _, _, found in panels for name in found)
    return sorted(names, key=weight, reverse=True)


def _panel(
    title: str, found: Mapping[str, list[LevelEffect]], rows: Sequence[tuple[str, str | None]], left: int, height: int
) -> Markup:
    ends = [end for effects in found.values() for effect in effects for end in (effect.low, effect.high)]
    low, high = min([*ends, 0.0]), max([*ends, 0.0])
    margin = 0.05 * (high - low) or 1.0
    axis = linear_axis(low - margin, high + margin, (left, left + PANEL), title)
    bottom = height - 26
    body = Markup('<text class="label" x="{}" y="14">{}<title>{}</title></text>').format(
        left + PANEL / 2, cut(title, 44), title
    )
    for tick in axis.ticks:
        body += Markup(
            '<line class="grid" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/><text class="tick" x="{0}" y="{3}">{4}</text>'
        ).format(pixels(axis.at(tick)), HEAD - 6, bottom, bottom + 18, f"{'+' if tick > 0 else ''}{tick_text(tick)}")
    body += Markup('<line class="axis" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(pixels(axis.at(0.0)), HEAD - 6, bottom)
    by_row = {(name, effect.label): effect for name, effects in found.items() for effect in effects}
    for index, row in enumerate(rows):
        effect = by_row.get(row) if row[1] is not None else None  # type: ignore[arg-type]
        if effect is not None:
            body += _interval(row[0], effect, axis.at(effect.low), axis.at(effect.mean), axis.at(effect.high), index)
    return body


def _interval(name: str, effect: LevelEffect, low: float, mean: float, high: float, index: int) -> Markup:
    y = HEAD + ROW * index + 10
    hint = (
        f"{name} {effect.label}: {effect.mean:+.4g} ({effect.low:+.4g} to {effect.high:+.4g}), {counted(effect.count, 'trial')}"
    )
    return Markup(
        '<g class="{}"><line x1="{}" x2="{}" y1="{y}" y2="{y}"/><circle cx="{}" cy="{y}" r="4"/><title>{}</title></g>'
    ).format("effect told" if effect.told_apart else "effect", pixels(low), pixels(high), pixels(mean), hint, y=y)


def _sentences(panels: Sequence[Panel]) -> list[str]:
    found = []
    for title, _, effects in panels:
        for name, levels in effects.items():
            for effect in levels:
                if effect.told_apart:
                    interval = f"{effect.low:+.3g} to {effect.high:+.3g}"
                    found.append(f"{name} = {effect.label}: {effect.mean:+.3g} in {title} (95 % interval {interval})")
    return found[:MOST_SENTENCES]


def parallel_coordinates(trials: Sequence[Trial], objectives: Sequence[Objective]) -> dict[str, Any] | None:
    """A line per trial through its parameters to its objective; None with fewer than two trials or without parameters.

    Trials without the objective end at the last parameter. Parameters that a branch lacks are at the foot of their axis.
    """
    drawn = [trial for trial in trials if trial.state != "duplicate" and trial.params]
    names = varying_params(drawn)
    if len(drawn) < 2 or not names:
        return None
    names, left_out = names[:MOST_AXES], names[MOST_AXES:]
    metric, mode = objectives[0]
    completed = [trial for trial in drawn if trial.state == "completed"]
    values = {trial.number: value for trial in completed if (value := value_of(trial, metric)) is not None}
    axes = [_parameter_axis(name, drawn) for name in names]
    axes += [_value_axis(metric, list(values.values()))] if values else []
    worst_first = sorted(values, key=lambda number: loss_of(mode)(values[number]), reverse=True)
    place = {number: index for index, number in enumerate(worst_first)}
    lines = []
    for trial in sorted(drawn, key=lambda each: place.get(each.number, -1)):  # the best are drawn last, on top
        positions = [axis.at(trial.params.get(axis.name)) for axis in axes[: len(names)]]
        shade, text = "n", str(trial.state)
        if trial.number in values:
            positions.append(axes[-1].at(values[trial.number]))
            shade, text = str(SHADES * place[trial.number] // len(place)), measure(metric, values[trial.number])
        points = " ".join(f"{LEFT + index * AXIS_STEP},{pixels(y)}" for index, y in enumerate(positions))
        title = f"{trial.number}: {pair_title(trial.pair) if trial.pair else 'no valid pair'}, {text}"
        line = Markup('<polyline class="trial q{}" data-t="{}" points="{}"><title>{}</title></polyline>')
        lines.append(line.format(shade, trial.number, points, title))
    frames = Markup("").join(_frame(axis, LEFT + index * AXIS_STEP, index % 2) for index, axis in enumerate(axes))
    kind = "parallel many" if len(lines) > MANY_LINES else "parallel"
    width = 2 * LEFT + (len(axes) - 1) * AXIS_STEP
    plot = drawing(Markup("").join(lines) + frames, "parallel coordinates of all trials", width, BOTTOM + 30, kind)
    return {"plot": plot, "width": width, "left_out": left_out}


@dataclass(frozen=True)
class _ParallelAxis:
    """One axis of parallel coordinates.

    Attributes:
        at: value, or None where a trial has none -> position from above.
        marks: (position, text).
    """

    name: str
    at: Callable[[Any], float]
    marks: tuple[tuple[float, str], ...]


def _parameter_axis(name: str, trials: Sequence[Trial]) -> _ParallelAxis:
    values = [trial.params[name] for trial in trials if name in trial.params]
    low_end = BOTTOM - 22 if len(values) < len(trials) else BOTTOM  # below it is the place of trials without the parameter
    absent = ((float(BOTTOM), "–"),) if len(values) < len(trials) else ()
    numbers = all(type(value) in (int, float) for value in values)
    if numbers and len(set(values)) > MOST_MARKED:
        return _with_absent(_value_axis(name, [float(value) for value in values], low_end), absent)
    values = sorted(values, reverse=True) if numbers else sorted(values, key=str)
    words = list(dict.fromkeys(map(param_text, values)))
    step = (low_end - TOP) / max(1, len(words) - 1)
    places = {word: TOP + index * step if len(words) > 1 else (TOP + low_end) / 2 for index, word in enumerate(words)}
    every = math.ceil(len(words) / MOST_LABELS)
    marks = tuple((place, word) for index, (word, place) in enumerate(places.items()) if index % every == 0)
    return _with_absent(_ParallelAxis(name, lambda value: places[param_text(value)], marks), absent)


def _with_absent(axis: _ParallelAxis, absent: tuple[tuple[float, str], ...]) -> _ParallelAxis:
    return replace(axis, at=lambda value: float(BOTTOM) if value is None else axis.at(value), marks=(*axis.marks, *absent))


def _value_axis(name: str, values: Sequence[float], bottom: float = BOTTOM) -> _ParallelAxis:
    scale = value_axis(values, (bottom, TOP), name)
    return _ParallelAxis(name, scale.at, tuple((scale.at(tick), tick_text(tick)) for tick in scale.ticks))


def _frame(axis: _ParallelAxis, x: float, row: int) -> Markup:
    """The axis with its marks; names of neighbours are in two rows, so that they do not touch."""
    body = Markup('<line class="axis" x1="{0}" x2="{0}" y1="{1}" y2="{2}"/>').format(x, TOP - 6, BOTTOM + 6)
    for y, text in axis.marks:
        body += Markup('<text class="mark" x="{}" y="{}">{}<title>{}</title></text>').format(
            x + 5, pixels(y + 4), cut(text, 16), text
        )
    name = Markup('<text class="label" x="{}" y="{}">{}<title>{}</title></text>')
    return body + name.format(x, 14 + 15 * row, cut(axis.name, 34), axis.name)
