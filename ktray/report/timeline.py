"""The timeline of a profile: one HTML file with an SVG in it, no script and no network access. Times run from left to right.

A row per worker with its stages, then a row per GPU and one for the CPUs; lines mark the phases of the command. Hover over a
bar for its stage, key and seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from ktray.text import visible

WIDTH, LEFT, ROW, GAP, CURVE, HEAD = 1180, 150, 20, 4, 56, 34  # pixels
COLOURS = {
    "images": "#8c6d31",
    "teacher": "#3b6fb6",
    "features": "#2a9d8f",
    "clusters": "#8e5ea2",
    "pseudo_labels": "#c0668a",
    "student": "#d98032",
    "evaluation": "#6a994e",
}
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 24px auto; max-width: 1200px; padding: 0 12px; color: #222;
  background: #fff; }
h1 { font-size: 18px; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; display: block; } .scroll { overflow-x: auto; }
svg text { font: 11px system-ui, sans-serif; fill: currentColor; } .grid { stroke: #8884; } .phase { stroke: #c22; }
.phase-name { fill: #c22; } .busy { fill: #3b6fb6; fill-opacity: .55; } .lane { fill: #8881; }
table { border-collapse: collapse; margin: 12px 24px 12px 0; display: inline-block; vertical-align: top; }
td, th { padding: 2px 10px 2px 0; text-align: right; font-variant-numeric: tabular-nums; }
td:first-child, th:first-child { text-align: left; } th { border-bottom: 1px solid #8888; font-weight: 600; }
i { display: inline-block; width: 11px; height: 11px; margin: 0 5px 0 0; vertical-align: -1px; border-radius: 2px; }
.legend span { margin-right: 14px; white-space: nowrap; }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818; } .phase { stroke: #f77; }
  .phase-name { fill: #f77; } .busy { fill: #7aa7e6; } }
"""


def timeline_page(data: Mapping[str, Any], traces: Sequence[str] = ()) -> str:
    """The page as HTML; all text from outside is escaped.

    Args:
        data: as `runs.profile.Profile.data` returns it.
        traces: names of files beside the page, to be linked.
    """
    title = _safe(data["title"])
    legend = "".join(f'<span><i style="background:{colour}"></i>{name}</span>' for name, colour in COLOURS.items())
    links = ", ".join(f'<a href="{_safe(name)}">{_safe(name)}</a>' for name in traces)
    about = f"<p>Traces of single stages, for <code>ui.perfetto.dev</code> or <code>chrome://tracing</code>: {links}</p>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body><h1>{title}</h1>'
        f'<p class="legend">{legend}</p><div class="scroll">{drawing_of_stages(data)}</div>'
        f"{_phases(data)}{_kinds(data)}{_machine(data)}{about if traces else ''}</body></html>\n"
    )


def _safe(text: Any) -> str:
    return escape(visible(str(text)))


def drawing_of_stages(data: Mapping[str, Any]) -> str:
    """The SVG alone, for a page that has styles for its classes."""
    ends = [phase["at"] for phase in data["phases"]] + [entry["ended"] for entry in data["stages"]]
    until = max([1.0, *ends])
    scale = (WIDTH - LEFT - 10) / until

    def x(seconds: float) -> str:
        return f"{LEFT + min(max(0.0, seconds), until) * scale:.1f}"

    parts, y = [], float(HEAD)
    for worker, lanes in _lanes(data).items():
        shape = data["workers"].get(worker, {})
        gpus = f" GPU {','.join(shape['gpu_ids'])}" if shape.get("gpu_ids") else ""
        parts.append(f'<text x="0" y="{y + ROW - 6:.0f}">{_safe(worker)}{_safe(gpus)}</text>')
        for lane in lanes:
            parts.append(f'<rect class="lane" x="{LEFT}" y="{y:.0f}" width="{WIDTH - LEFT - 10}" height="{ROW}"/>')
            for entry in lane:
                seconds = entry["ended"] - entry["began"]
                hint = f"{entry['key']}: {seconds:.2f} s{' (' + entry['outcome'] + ')' if entry['outcome'] else ''}"
                parts.append(
                    f'<rect x="{x(entry["began"])}" y="{y + 1:.0f}" width="{max(1.0, seconds * scale - 0.5):.1f}" '
                    f'height="{ROW - 2}" fill="{COLOURS.get(entry["stage"], "#777")}"><title>{_safe(hint)}</title></rect>'
                )
            y += ROW + GAP
    curves = {f"GPU {index}": [(each[0], each[1]) for each in samples] for index, samples in sorted(data["gpus"].items())}
    curves |= {"CPUs": [(each[0], each[1]) for each in data["cpu"]]} if data["cpu"] else {}
    for name, samples in curves.items():
        y += GAP
        points = " ".join(f"{x(at)},{y + CURVE * (1 - used / 100):.1f}" for at, used in samples if at <= until)
        if points:
            began, ended = points.split()[0].split(",")[0], points.split()[-1].split(",")[0]
            area = f"{began},{y + CURVE:.1f} {points} {ended},{y + CURVE:.1f}"
            parts.append(f'<polygon class="busy" points="{area}"/>')
        parts.append(f'<text x="0" y="{y + CURVE / 2:.0f}">{_safe(name)} busy</text>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 9:.0f}" text-anchor="end">100 %</text>')
        y += CURVE + GAP
    return (
        f'<svg viewBox="0 0 {WIDTH} {y + 24:.0f}" style="min-width:820px" role="img" aria-label="timeline">'
        f"{_axis(until, x, y)}{''.join(parts)}{_marks(data, x, y)}</svg>"
    )


def _lanes(data: Mapping[str, Any]) -> dict[str, list[list[Mapping[str, Any]]]]:
    """Worker -> rows of stages that do not overlap; stages that one run makes together do. Workers with GPUs come first."""
    found: dict[str, list[list[Mapping[str, Any]]]] = {}
    names = dict.fromkeys([*data["workers"], *(entry["worker"] for entry in data["stages"])])

    def rank(name: str) -> tuple[bool, int, str]:
        return not data["workers"].get(name, {}).get("gpus"), len(name), name

    for name in sorted(names, key=rank):
        lanes: list[list[Mapping[str, Any]]] = []
        for entry in [each for each in data["stages"] if each["worker"] == name]:
            free = next((lane for lane in lanes if lane[-1]["ended"] <= entry["began"] + 0.05), None)
            if free is None:
                lanes.append([entry])
            else:
                free.append(entry)
        found[name] = lanes or [[]]
    return found


def _axis(until: float, x: Callable[[float], str], bottom: float) -> str:
    step = next(each * 10**power for power in range(-1, 9) for each in (1, 2, 5) if until / (each * 10**power) <= 12)
    ticks = [step * number for number in range(math.floor(until / step) + 1)]
    return "".join(
        f'<line class="grid" x1="{x(tick)}" x2="{x(tick)}" y1="{HEAD - 4}" y2="{bottom:.0f}"/>'
        f'<text x="{x(tick)}" y="{bottom + 16:.0f}" text-anchor="middle">{tick:g} s</text>'
        for tick in ticks
    )


def _marks(data: Mapping[str, Any], x: Callable[[float], str], bottom: float) -> str:
    """The phases: a line each, their names in two rows so that neighbours do not touch, left of the line at the right edge."""
    parts = []
    for number, phase in enumerate(data["phases"]):
        place, row = x(phase["at"]), 12 * (number % 2)
        at_edge = float(place) > WIDTH - 120
        parts.append(
            f'<line class="phase" x1="{place}" x2="{place}" y1="{12 + row}" y2="{bottom:.0f}"/>'
            f'<text class="phase-name" x="{place}" y="{10 + row}" dx="{-2 if at_edge else 2}" '
            f'text-anchor="{"end" if at_edge else "start"}">{_safe(phase["name"])}</text>'
        )
    return "".join(parts)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>{body}</table>" if rows else ""


def _phases(data: Mapping[str, Any]) -> str:
    moments = [phase["at"] for phase in data["phases"]]
    spans = [after - before for before, after in zip([0.0, *moments], moments, strict=False)]
    rows = [
        [_safe(phase["name"]), f"{phase['at']:.1f}", f"{span:.1f}"] for phase, span in zip(data["phases"], spans, strict=True)
    ]
    return _table(["phase ends", "at s", "took s"], rows)


def _kinds(data: Mapping[str, Any]) -> str:
    kinds = data["summary"]["stages"].items()
    rows = [[_safe(kind), f"{row['stages']:.0f}", f"{row['seconds']:.1f}", f"{row['longest']:.1f}"] for kind, row in kinds]
    return _table(["stage", "runs", "sum s", "longest s"], rows)


def _machine(data: Mapping[str, Any]) -> str:
    found = data["summary"]
    rows = [
        [f"GPU {_safe(index)}", f"{percent:.0f} %", f"{found['gpu_idle_samples'][index]} of {found['gpu_samples'][index]}"]
        for index, percent in found["gpu_percent"].items()
    ]
    return _table(["first to last stage", "mean busy", "idle samples"], rows)
