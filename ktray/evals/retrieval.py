"""Retrieval: how many of the training images nearest to a judged image show its class, and a sheet of them to look at.

Similarity is the cosine of the features.

Source: Manning, Raghavan and Schuetze, "Introduction to Information Retrieval" (2008), section 8.4, for precision at k; the
sheet of nearest neighbours is how Noroozi et al., "Boosting Self-Supervised Learning via Knowledge Transfer" (2018) and others
show what features consider alike.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from ktray import fingerprint
from ktray.classifiers import linear_classifiers, neighbours
from ktray.images import Images
from ktray.plots import label_of, optional_plot
from ktray.scoring import per_image
from ktray.spec import Count, EvaluationFields, Seed

REVISION = 1
TOOLS = (neighbours, linear_classifiers)
NEEDS_LABELS = True
DIRECTION: dict[str, Literal["max", "min"]] = {"precision": "max"}
SHEET = "neighbours.png"


class Spec(EvaluationFields):
    """The training images nearest to each judged one."""

    kind: Literal["retrieval"] = "retrieval"
    k: Annotated[tuple[Count, ...], Field(min_length=1, max_length=50)] = Field(
        default=(1, 5, 10), description="numbers of neighbours; the last gives `precision`"
    )
    queries: int = Field(default=10, ge=0, le=100, description="rows of the sheet, judged images drawn by `seed`")
    shown: int = Field(default=8, ge=1, le=30, description="neighbours in a row of the sheet")
    seed: Seed = 0


def directions(spec: Spec) -> dict[str, Literal["max", "min"]]:
    """The metrics of this spec: `precision`, and `precision_at_5` and so on."""
    return {**DIRECTION, **{f"precision_at_{k}": "max" for k in spec.k}}


def evaluate(
    spec: Spec,
    *,
    features: Callable[[Images], NDArray[np.float32]],
    train: Images,
    judged: Images,
    pseudo_labels: NDArray[np.int64] | None,
    out: Path,
    device: str,
) -> dict[str, float]:
    """`precision_at_5` and so on in [0, 1]: the share of the nearest 5 training images that show the class of a judged one.

    Writes the sheet `neighbours.png`: a judged image in the first column, its neighbours behind it, those of another class
    framed in red; and the precisions of each image to `per_image.parquet`.

    Raises:
        ValueError: labels are missing, `train` or `judged` is empty, or features are not finite.
    """
    if train.labels is None or judged.labels is None or not len(train) or not len(judged):
        raise ValueError("retrieval needs labelled training images and labelled images to judge")
    bank, queries = (
        linear_classifiers.unit(linear_classifiers.on_device(features(images), device)) for images in (train, judged)
    )
    owners, truth = torch.from_numpy(train.labels).to(device), torch.from_numpy(judged.labels).to(device)
    chosen = np.random.default_rng(fingerprint.seed_of(spec.seed, "queries", len(judged))).permutation(len(judged))
    chosen = np.sort(chosen[: spec.queries])
    relevant: list[NDArray[np.bool_]] = []
    nearest_of: dict[int, NDArray[np.int64]] = {}
    for start, _, rows in neighbours.nearest(bank, queries, max(*spec.k, spec.shown)):
        relevant.append((owners[rows] == truth[start : start + len(rows), None]).cpu().numpy())
        here = chosen[(chosen >= start) & (chosen < start + len(rows))]
        nearest_of.update(zip(here.tolist(), rows[torch.from_numpy(here - start).to(device)].cpu().numpy(), strict=True))
    found = np.concatenate(relevant)
    columns = {f"precision_at_{k}": found[:, :k].mean(1) for k in spec.k}
    columns["precision"] = columns[f"precision_at_{spec.k[-1]}"]
    per_image.write(out, judged.names, columns)
    if len(chosen):
        with optional_plot(out / SHEET):
            _draw_sheet(train, judged, {query: rows[: spec.shown] for query, rows in nearest_of.items()}, out / SHEET)
    return {name: float(values.mean()) for name, values in columns.items()}


def _draw_sheet(train: Images, judged: Images, nearest: dict[int, NDArray[np.int64]], path: Path) -> None:
    from PIL import Image, ImageDraw

    assert train.labels is not None
    assert judged.labels is not None
    side, edge, gap = min(max(judged.size, train.size, 48), 96), 3, 12
    cell = side + 2 * edge
    columns = 1 + max(len(rows) for rows in nearest.values())
    sheet = Image.new("RGB", (columns * cell + gap, len(nearest) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (query, rows) in enumerate(nearest.items()):
        pixels = [judged.read(np.array([query]))[0], *train.read(rows)]
        for column, image in enumerate(pixels):
            left, top = column * cell + (gap if column else 0), row * cell
            if column and train.labels[rows[column - 1]] != judged.labels[query]:
                draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=(200, 30, 30))
            sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST), (left + edge, top + edge))
        if judged.classes:
            draw.text((edge + 1, row * cell + edge), label_of(judged.classes[judged.labels[query]]), fill=(255, 255, 0))
    sheet.save(path)
