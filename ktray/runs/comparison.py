"""Compare two students on the images that both were judged on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ktray.errors import UserError
from ktray.plots import label_of, optional_plot
from ktray.runs import uncertainty
from ktray.runs.settings import Settings
from ktray.scoring.per_image import Difference, PerImage
from ktray.search.trial import Trial
from ktray.stores import Store

if TYPE_CHECKING:
    from ktray.images import Images

CORRECT = "top1"
"""Column of results per image that says whether an answer was right; the sheet shows where two students differ in it."""
SHOWN = 8  # images in each row of the sheet


@dataclass(frozen=True)
class Comparison:
    """Two students on the same images.

    Attributes:
        metrics: metric -> value of the first, value of the second, and their difference.
        images: how many both were judged on.
        only_one, only_other: images that only the first, or only the second gets right, in the first evaluation with answers.
        sheet: the file that shows some of them; None if they differ nowhere, or no evaluation has answers.
    """

    metrics: Mapping[str, tuple[float, float, Difference]]
    images: int
    only_one: int
    only_other: int
    sheet: Path | None

    def as_data(self) -> dict[str, Any]:
        """Its stable machine-readable form."""
        rows = [
            {"metric": metric, "one": one, "other": other, **vars(difference), "told_apart": difference.told_apart}
            for metric, (one, other, difference) in self.metrics.items()
        ]
        sheet = None if self.sheet is None else str(self.sheet)
        return {"metrics": rows, "only_one": self.only_one, "only_other": self.only_other, "sheet": sheet}


def compare(one: str, other: str, test: bool, settings: Settings, sheet: Path) -> Comparison:
    """Compare two trials, named as ``STUDY`` (its best) or ``STUDY/7``.

    Args:
        test: on the test split instead of the one that the studies judge on.
        sheet: where the sheet of images is written.

    Raises:
        UserError: there is no such study or completed trial, or they were not judged on the same images; or the sheet cannot
            be written there.
    """
    _refuse_place(sheet)
    store = settings.open_store()
    trials = [_trial(name, settings) for name in (one, other)]
    keys = [_keys(trial, test, settings) for trial in trials]
    found = uncertainty.differences(keys[0], keys[1], store)
    if not found:
        raise UserError(
            f"{one} and {other} have no evaluation that judged both on the same images"
            + (" of the test split" if test else ""),
            instead="Judge each with 'ktray best NAME --test --top N' first."
            if test
            else "Compare pairs of one target data set.",
        )
    values = [_metrics(each, store) for each in keys]
    metrics = {
        name: (values[0][name], values[1][name], difference) for name, difference in found.items() if _known(name, values)
    }
    evaluation = next((name.rpartition("/")[0] for name in found if name.rpartition("/")[2] == CORRECT), None)
    count = max(difference.images for difference in found.values())
    if evaluation is None:
        return Comparison(metrics, count, 0, 0, None)
    results = [uncertainty.results_of(each, evaluation, store) for each in keys]
    assert results[0] is not None
    assert results[1] is not None
    first, second = _differing(results[0][0], results[1][0])
    drawn = _draw(keys[0], evaluation, trials[0], first, second, store, sheet) if first or second else None
    return Comparison(metrics, count, len(first), len(second), drawn)


def _refuse_place(sheet: Path) -> None:
    """Refuse a place that is no file, before it is replaced: of a device, the device itself would be."""
    if not sheet.parent.is_dir():
        raise UserError(f"there is no folder {sheet.parent}", "-o", "Name a file in a folder that exists.")
    if sheet.is_dir() or (sheet.exists() and not sheet.is_file()):
        what = "a folder" if sheet.is_dir() else "no regular file"
        raise UserError(f"{sheet} is {what}", "-o", "Name a file, such as compare.png.")


def _known(metric: str, values: list[dict[str, float]]) -> bool:
    return all(metric in each for each in values)


def _trial(name: str, settings: Settings) -> Trial:
    from ktray.search import ranking
    from ktray.search.history import read_study

    study, _, number = name.partition("/")
    history = read_study(settings.home, study)
    ranked = ranking.ranked(history.trials, history.objectives)
    chosen = [trial for trial in ranked if not number or str(trial.number) == (number.lstrip("0") or "0")]
    if not chosen:
        raise UserError(f"the study {study!r} has no completed trial {number}".rstrip(), instead=f"See ktray show {study}.")
    return chosen[0]


def _keys(trial: Trial, test: bool, settings: Settings) -> Mapping[str, Any]:
    if not test:
        return trial.keys
    from ktray.pipeline import pair_graph
    from ktray.pipeline.identity import data_identity
    from ktray.pipeline.references import with_test_split

    return pair_graph.build(with_test_split(trial.pair), data_identity(settings.cache)).keys


def _metrics(keys: Mapping[str, Any], store: Store) -> dict[str, float]:
    artifacts = {name: store.find(key) for name, key in keys.get("evaluation", {}).items()}
    return {f"{name}/{metric}": value for name, each in artifacts.items() if each for metric, value in each.metrics.items()}


def _differing(one: PerImage, other: PerImage) -> tuple[list[str], list[str]]:
    """Names of the images that only the first gets right, and of those that only the second does."""
    right = dict(zip(other.names, other.columns[CORRECT] > 0.5, strict=True))
    ours = dict(zip(one.names, one.columns[CORRECT] > 0.5, strict=True))
    first = [name for name, value in ours.items() if value and not right[name]]
    return first, [name for name, value in ours.items() if not value and right[name]]


def _draw(
    keys: Mapping[str, Any], evaluation: str, trial: Trial, first: list[str], second: list[str], store: Store, path: Path
) -> Path | None:
    """The sheet: a row of images that only the first student gets right, and one of those that only the second does."""
    from ktray import images
    from ktray.spec import PairSpec

    artifact = store.find(keys["evaluation"][evaluation])
    source = artifact and store.find(artifact.record["inputs"]["images.target"])
    if artifact is None or source is None:
        return None
    data = PairSpec.model_validate(dict(trial.pair)).data.target
    judged = images.open_split(source.directory, artifact.record["spec"]["split"], data)
    path.unlink(missing_ok=True)
    with optional_plot(path):
        _paste(judged, [_rows(judged, first), _rows(judged, second)], path)
    return path if path.exists() else None


def _rows(judged: Images, names: list[str]) -> NDArray[np.int64]:
    """Rows of up to `SHOWN` of the named images, at even steps."""
    place = {name: index for index, name in enumerate(judged.names)} or {str(index): index for index in range(len(judged))}
    rows = np.array([place[name] for name in names if name in place], np.int64)
    return rows[np.linspace(0, len(rows) - 1, min(SHOWN, len(rows))).astype(np.int64)] if len(rows) else rows


def _paste(judged: Images, groups: list[NDArray[np.int64]], path: Path) -> None:
    from PIL import Image, ImageDraw

    side, line = min(max(judged.size, 64), 128), 14
    sheet = Image.new("RGB", (SHOWN * (side + 4), len(groups) * (side + 2 * line + 6)), "white")
    draw = ImageDraw.Draw(sheet)
    for group, (rows, title) in enumerate(zip(groups, ("only the first is right", "only the second is right"), strict=True)):
        top = group * (side + 2 * line + 6)
        draw.text((2, top), title, fill=(0, 0, 0))
        for column, row in enumerate(rows):
            left = column * (side + 4) + 2
            pixels = Image.fromarray(judged.read(np.array([row]))[0])
            sheet.paste(pixels.resize((side, side), Image.Resampling.NEAREST), (left, top + line))
            if judged.labels is not None and judged.classes:
                draw.text((left, top + line + side), label_of(judged.classes[judged.labels[row]])[:12], fill=(0, 0, 0))
    sheet.save(path, format="PNG")
