"""Plots as inline SVG, drawn by hand so that they follow the page's light and dark colours. All text is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from ktray.report.axes import Axis, axis, linear, tick_text
from ktray.report.formatting import measure

WIDTH, HEIGHT = 480, 310
LEFT, RIGHT, TOP, BOTTOM = 66, 462, 14, 264
COLOURS = 8


@dataclass(frozen=True)
class Point:
    """One trial in a scatter: its place, what its number is, and a sentence for the pointer."""

    x: float
    y: float
    name: str
    title: str


@dataclass(frozen=True)
class Line:
    """One trial's curve: (x, y) in the order of x; `style` numbers its colour and dash."""

    points: tuple[tuple[float, float], ...]
    name: str
    style: int


def strip(values: Sequence[float], best: float, references: Mapping[str, float], metric: str) -> Markup:
    """All completed trials as dots on one axis between the references."""
    known = [*values, *references.values()]
    across = axis(known, (16, 704), metric)
    places = [across.at(value) for value in references.values()]
    ticks = Markup("").join(
        Markup('<line class="grid" x1="{0}" x2="{0}" y1="34" y2="62"/><text class="tick" x="{0}" y="80">{1}</text>').format(
            _px(across.at(value)), tick_text(value)
        )
        for value in across.ticks
        if all(abs(across.at(value) - place) > 24 for place in places)  # a reference's line would cross the number
    )
    dots = Markup("").join(
        Markup('<circle class="dot" cx="{}" cy="48" r="5.5"/>').format(_px(across.at(value))) for value in values
    )
    winner = Markup('<circle class="best" cx="{}" cy="48" r="8"/><text class="strong" {} y="24">best {}</text>').format(
        _px(across.at(best)), _inside(across.at(best)), measure(metric, best)
    )
    base = Markup('<line class="axis" x1="16" x2="704" y1="48" y2="48"/>')
    marks, bottom = _strip_references(across, references, metric)
    return _svg(
        ticks + base + marks + dots + winner, f"{metric} of all completed trials and the references", 720, bottom, "strip"
    )


def _strip_references(across: Axis, references: Mapping[str, float], metric: str) -> tuple[Markup, int]:
    """The references' lines and names, and where the plot ends below them."""
    drawn, last, row, bottom = Markup(""), -1000.0, 0, 92
    for name, value in sorted(references.items(), key=lambda entry: entry[1]):
        x = across.at(value)
        row = row + 1 if x - last < 310 else 0  # two names at one place would cover each other
        drawn += Markup(
            '<line class="reference" x1="{0}" x2="{0}" y1="28" y2="{4}"/><text class="note" {1} y="{5}">{2} {3}</text>'
        ).format(_px(x), _inside(x), name, measure(metric, value), 88 + 20 * row, 106 + 20 * row)
        bottom, last = max(bottom, 114 + 20 * row), x
    return drawn, bottom


def scatter(points: Sequence[Point], front: Sequence[Point], labels: tuple[str, str], lines: Mapping[str, float]) -> Markup:
    """Points, those of the Pareto front joined and named, and horizontal lines for the references of the y axis."""
    across = axis([point.x for point in points], (LEFT, RIGHT), labels[0])
    up = axis([*(point.y for point in points), *lines.values()], (BOTTOM, TOP), labels[1])
    dots = Markup("").join(
        Markup('<circle class="dot" cx="{}" cy="{}" r="5"><title>{}</title></circle>').format(
            _px(across.at(point.x)), _px(up.at(point.y)), point.title
        )
        for point in points
        if point not in front
    )
    joined = " ".join(f"{_px(across.at(point.x))},{_px(up.at(point.y))}" for point in sorted(front, key=lambda point: point.x))
    marked = Markup("").join(
        Markup('<circle class="best" cx="{}" cy="{}" r="6.5"><title>{}</title></circle>').format(
            _px(across.at(point.x)), _px(up.at(point.y)), point.title
        )
        for point in front
    )
    names = _names([(across.at(point.x), up.at(point.y) - 10, point.name) for point in front])
    path = Markup('<polyline class="front" points="{}"/>').format(joined)
    title = f"{labels[1]} against {labels[0]}"
    return _svg(_frame(across, up) + _references(up, lines) + path + dots + marked + names, title, WIDTH, HEIGHT, "plot")


def _names(places: Sequence[tuple[float, float, str]]) -> Markup:
    """Names at their places, the first ones first; one that would cover another is left out."""
    shown: list[tuple[float, float]] = []
    drawn = Markup("")
    for x, y, name in places:
        held = min(max(x, LEFT + 14), RIGHT - 14)
        if all(abs(held - other[0]) > 22 or abs(y - other[1]) > 14 for other in shown):
            shown.append((held, y))
            drawn += Markup('<text class="strong" x="{}" y="{}" text-anchor="middle">{}</text>').format(_px(held), _px(y), name)
    return drawn


def curves(lines: Sequence[Line], labels: tuple[str, str]) -> Markup:
    """At most eight curves, told apart by colour, dash and the name at their end."""
    last = max(x for line in lines for x, _ in line.points)
    across = linear(0, last, (LEFT, RIGHT - 26), labels[0])
    up = axis([y for line in lines for _, y in line.points], (BOTTOM, TOP), labels[1])
    ends = _apart([up.at(line.points[-1][1]) for line in lines], 13, (TOP, BOTTOM))
    drawn = Markup("")
    for index, line in enumerate(lines):
        places = [(across.at(x), up.at(y)) for x, y in line.points]
        drawn += Markup('<g class="s{}">').format(line.style % COLOURS)
        drawn += Markup('<polyline class="curve" points="{}"/>').format(" ".join(f"{_px(x)},{_px(y)}" for x, y in places))
        if len(places) <= 12:
            drawn += Markup("").join(Markup('<circle cx="{}" cy="{}" r="3"/>').format(_px(x), _px(y)) for x, y in places)
        drawn += Markup('<text x="{}" y="{}">{}</text></g>').format(_px(places[-1][0] + 7), _px(ends[index] + 4), line.name)
    return _svg(_frame(across, up) + drawn, f"{labels[1]} over {labels[0]}", WIDTH, HEIGHT, "plot")


def sizes(counts: Sequence[int]) -> Markup:
    """Cluster sizes, largest first, as bars; above 240 clusters one bar is the mean of its neighbours."""
    ordered = sorted(counts, reverse=True)
    bars = min(len(ordered), 240)
    edges = [index * len(ordered) // bars for index in range(bars + 1)]
    means = [sum(ordered[a:b]) / (b - a) for a, b in pairwise(edges)]
    up = linear(0, 1.05 * ordered[0], (BOTTOM, TOP), "images")
    floor, step = up.at(0), (RIGHT - LEFT) / bars
    rects = Markup("").join(
        Markup('<rect class="bar" x="{}" y="{}" width="{}" height="{}"/>').format(
            _px(LEFT + index * step), _px(up.at(mean)), _px(max(0.8, step * 0.82)), _px(floor - up.at(mean))
        )
        for index, mean in enumerate(means)
    )
    even = up.at(sum(ordered) / len(ordered))
    line = Markup(
        '<line class="reference" x1="{1}" x2="{2}" y1="{0}" y2="{0}"/><text class="note end" x="{2}" y="{3}">mean {4}</text>'
    )
    mean_line = line.format(_px(even), LEFT, RIGHT, _px(even - 5), f"{sum(ordered) / len(ordered):.4g}")
    across = Axis(lambda value: value, (), f"{len(ordered):,} clusters, largest first")
    return _svg(_frame(across, up) + rects + mean_line, "cluster sizes", WIDTH, HEIGHT, "plot")


def _frame(across: Axis, up: Axis) -> Markup:
    horizontal = Markup("").join(
        Markup(
            '<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/><text class="tick end" x="{3}" y="{4}">{5}</text>'
        ).format(LEFT, RIGHT, _px(up.at(tick)), LEFT - 7, _px(up.at(tick) + 4), tick_text(tick))
        for tick in up.ticks
    )
    vertical = Markup("").join(
        Markup('<text class="tick" x="{}" y="{}">{}</text>').format(_px(across.at(tick)), BOTTOM + 18, tick_text(tick))
        for tick in across.ticks
    )
    base = Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, RIGHT, BOTTOM, BOTTOM)
    middle = (TOP + BOTTOM) / 2
    names = Markup('<text class="label" x="{}" y="{}">{}</text>').format((LEFT + RIGHT) / 2, BOTTOM + 39, across.label)
    names += Markup('<text class="label" transform="rotate(-90 11 {0})" x="11" y="{0}">{1}</text>').format(middle, up.label)
    return horizontal + base + vertical + names


def _references(up: Axis, lines: Mapping[str, float]) -> Markup:
    mark = Markup(
        '<line class="reference" x1="{1}" x2="{2}" y1="{0}" y2="{0}"/><text class="note end" x="{2}" y="{3}">{4}</text>'
    )
    return Markup("").join(
        mark.format(_px(up.at(value)), LEFT, RIGHT, _px(up.at(value) - 5), name) for name, value in lines.items()
    )


def _svg(body: Markup, title: str, width: int, height: int, kind: str) -> Markup:
    return Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        kind, width, height, title, body
    )


def _px(value: float) -> str:
    return f"{value:.1f}"


def _inside(x: float) -> Markup:
    """A text centred on `x` in the strip, or held inside its borders."""
    if x < 160:
        return Markup('x="4" text-anchor="start"')
    return Markup('x="716" text-anchor="end"') if x > 560 else Markup('x="{}" text-anchor="middle"').format(_px(x))


def _apart(places: Sequence[float], gap: float, limits: tuple[float, float]) -> list[float]:
    """`places` in the same order, moved down where they would be closer than `gap`, and as a whole up into the limits."""
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = list(places)
    for before, after in pairwise(order):
        moved[after] = max(moved[after], moved[before] + gap)
    for after, before in pairwise(order[::-1]):
        moved[after] = min(moved[after], limits[1])
        moved[before] = min(moved[before], moved[after] - gap)
    return moved
