"""What a detector found, as plots and a table: AP of each class with its interval, precision and recall, boxes on images."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ktray.fine_tuning.detector_training import Annotated
from ktray.plots import label_of, optional_plot
from ktray.scoring.average_precision import bootstrap_draws, interval, resampled_aps
from ktray.scoring.detection_scores import Detections, Ranked

RESAMPLES = 200
SHEET = (3, 4)  # rows and columns of images
MOST_CURVES = 20  # classes with a curve of their own: as many as there are colours
SHOWN = 0.5  # least score of a box that is drawn


def draw_all(
    out: Path, classes: Sequence[str], ranked: Sequence[Ranked], images: Annotated, found: Sequence[Detections]
) -> None:
    """Write `per_class.json`, `average_precision.png`, `precision_recall.png` and `detections.png` into `out`.

    Args:
        ranked: the detections of each class, as `rank_all` makes them.
        images: what was judged.
        found: the detections in each image.
    """
    rows = per_class(classes, ranked)
    (out / "per_class.json").write_text(json.dumps(rows, indent=1))
    drawings: dict[str, Callable[[Path], None]] = {
        "average_precision.png": lambda path: draw_bars(path, rows),
        "precision_recall.png": lambda path: draw_curves(path, classes, ranked),
        "detections.png": lambda path: draw_sheet(path, classes, images, found),
    }
    for name, draw in drawings.items():
        with optional_plot(out / name):
            from matplotlib import style

            with style.context("default"):  # not that of the user's own matplotlibrc
                draw(out / name)


def per_class(classes: Sequence[str], ranked: Sequence[Ranked]) -> list[dict[str, Any]]:
    """For each class its AP ("voc07") with a 95 % interval over resampled images, and its number of objects.

    AP and interval are None for a class without an object to find.
    """
    draws = bootstrap_draws(len(ranked[0].positives), RESAMPLES, seed=0)
    rows = []
    for name, each in zip(classes, ranked, strict=True):
        ap, low, high = each.ap("voc07"), math.nan, math.nan
        if not math.isnan(ap):
            low, high = interval(resampled_aps(each.results, each.images, each.positives, "voc07", draws=draws))
        values = {"ap": ap, "low": low, "high": high}
        known = {key: None if math.isnan(value) else value for key, value in values.items()}
        rows.append({"class": name, "objects": int(each.positives.sum()), **known})
    return rows


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100, metadata={"Software": None})


def draw_bars(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """AP of each class as a bar with its interval, best first."""
    known = sorted((row for row in rows if row["ap"] is not None), key=lambda row: row["ap"])
    figure = _figure(7, 1.2 + 0.28 * len(known))
    axes = figure.add_subplot()
    values = np.array([row["ap"] for row in known])
    reach = np.array([[row["ap"] - row["low"], row["high"] - row["ap"]] for row in known]).clip(min=0).T
    axes.barh(range(len(known)), values, xerr=reach, color="#4878a8", ecolor="#222222", capsize=2)
    axes.set_yticks(range(len(known)), [f"{label_of(row['class'])} ({row['objects']})" for row in known], parse_math=False)
    axes.axvline(float(values.mean()), color="#b04030", linewidth=1, linestyle="--")
    axes.set(xlim=(0, 1), xlabel="average precision, 95 % interval over images", title=f"mAP {values.mean():.3f} (dashed)")
    _save(figure, path)


def draw_curves(path: Path, classes: Sequence[str], ranked: Sequence[Ranked]) -> None:
    """Precision against recall of each class."""
    from matplotlib import colormaps

    figure = _figure(8, 5)
    axes = figure.add_subplot()
    drawn = [(name, each) for name, each in zip(classes, ranked, strict=True) if each.positives.sum()]
    for index, (name, each) in enumerate(drawn[:MOST_CURVES]):
        recall, precision = each.curve()
        colour = colormaps["tab20"](index)
        axes.plot(recall, precision, color=colour, linewidth=1.2, label=f"{label_of(name)} {each.ap('voc07'):.2f}")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel="recall", ylabel="precision", title="with the AP of each class")
    if drawn:
        legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=7)
        for text in legend.get_texts():
            text.set_parse_math(False)
    _save(figure, path)


def draw_sheet(path: Path, classes: Sequence[str], images: Annotated, found: Sequence[Detections]) -> None:
    """Objects (green, dashed if difficult) and detections above a score of `SHOWN` (red) on images, evenly spaced ones."""
    from matplotlib.patches import Rectangle

    count = min(SHEET[0] * SHEET[1], len(images))
    figure = _figure(3 * SHEET[1], 2.6 * -(-count // SHEET[1]))
    for place, index in enumerate(np.linspace(0, len(images) - 1, count).astype(int)):
        axes = figure.add_subplot(-(-count // SHEET[1]), SHEET[1], place + 1)
        pixels = images.reader.read(int(index))
        axes.imshow(pixels)
        axes.set_axis_off()
        truth, seen = images.objects[index], found[index]
        for box, hard in zip(truth.boxes, truth.difficult, strict=True):
            style = "--" if hard else "-"
            axes.add_patch(Rectangle(box[:2], *(box[2:] - box[:2]), fill=False, edgecolor="#30c030", linestyle=style))
        strong = seen.scores >= SHOWN
        for box, class_, score in zip(seen.boxes[strong], seen.classes[strong], seen.scores[strong], strict=True):
            axes.add_patch(Rectangle(box[:2], *(box[2:] - box[:2]), fill=False, edgecolor="#e02020"))
            text = f"{label_of(classes[class_])} {score:.2f}"
            at = (max(0.0, float(box[0])), max(0.0, float(box[1])))
            filled = {"facecolor": "#e02020", "edgecolor": "none", "pad": 0.6}
            axes.text(*at, text, fontsize=6, color="white", bbox=filled, va="bottom", clip_on=True, parse_math=False)
    _save(figure, path)
