"""Scores of detected boxes: the matching of PASCAL VOC's devkit with its `difficult` objects, and COCO's AP by pycocotools.

Boxes are [x0, y0, x1, y1] in pixels, x1 and y1 exclusive. A box of the devkit, which counts pixels from 1 and includes the
last, is [xmin - 1, ymin - 1, xmax, ymax] here, and its ``+1`` in widths and heights is contained in that.

Source: VOCevaldet.m of the devkits of 2007 and 2012; Lin et al., "Microsoft COCO" (2014), and pycocotools' `COCOeval`.

Legend: N images, C classes, n detections and m objects of one image, k detections of one class in all images.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray.errors import UserError
from ktray.scoring import average_precision, per_image
from ktray.scoring.average_precision import IGNORED, RIGHT, WRONG, Rule, ap_of, precision_recall, ranking
from ktray.scoring.per_image import Columns

IDENTITY, REVISION = "detection_scores", 2
TOOLS = (average_precision,)


@dataclass(frozen=True)
class Objects:
    """The objects of one image.

    Attributes:
        boxes: (m, 4) float64.
        classes: (m,) int64 in [0, C).
        difficult: (m,) bool; a detection of a difficult object counts neither for nor against (VOC).
        crowd: (m,) bool; the box of many objects: any number of detections inside it is ignored (COCO). None for none.
        areas: (m,) pixels of the objects' masks; None for those of the boxes. Only COCO's sizes read them.
    """

    boxes: NDArray[np.float64]
    classes: NDArray[np.int64]
    difficult: NDArray[np.bool_]
    crowd: NDArray[np.bool_] | None = None
    areas: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class Detections:
    """What a detector found in one image.

    Attributes:
        boxes: (n, 4) float64.
        classes: (n,) int64 in [0, C).
        scores: (n,) float64.
    """

    boxes: NDArray[np.float64]
    classes: NDArray[np.int64]
    scores: NDArray[np.float64]


@dataclass(frozen=True)
class Ranked:
    """The detections of one class in all images, best first.

    Attributes:
        results: (k,) RIGHT, WRONG or IGNORED.
        images: (k,) the image of each.
        scores: (k,) descending.
        positives: (N,) objects of the class in each image that are not difficult.
    """

    results: NDArray[np.int8]
    images: NDArray[np.int64]
    scores: NDArray[np.float64]
    positives: NDArray[np.int64]

    def ap(self, rule: Rule) -> float:
        """AP in [0, 1]; NaN if the class has no object that is not difficult."""
        return ap_of(*self.curve(), rule) if self.positives.sum() else float("nan")

    def curve(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Recall (k,) and precision (k,)."""
        return precision_recall(self.results, float(self.positives.sum()))


def overlaps(first: NDArray[np.floating], second: NDArray[np.floating]) -> NDArray[np.float64]:
    """Intersection over union (n, m) of boxes (n, 4) and (m, 4), computed in float64; 0 where they do not overlap."""
    a, b = first[:, None].astype(np.float64), second[None].astype(np.float64)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = np.where((sides > 0).all(-1), sides[..., 0] * sides[..., 1], 0.0)
    union = _areas(a) + _areas(b) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=shared > 0)


def _areas(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def rank_class(truth: Sequence[Objects], detected: Sequence[Detections], class_: int, *, overlap: float = 0.5) -> Ranked:
    """The detections of one class by the devkit's rules: each is compared with the object that it overlaps most.

    If that overlap is `overlap` or more, the detection is right, unless the object is difficult (ignored) or an earlier
    detection had it (wrong, even if it overlaps a second object enough). Of equal overlaps the first object counts, of equal
    scores the first detection.

    Args:
        truth: the objects of each image.
        detected: the detections in each image, in the same order.

    Raises:
        ValueError: other numbers of images, or scores or boxes that are not numbers.
    """
    if len(truth) != len(detected):
        raise ValueError(f"there are objects of {len(truth)} images and detections of {len(detected)}")
    parts: list[tuple[NDArray[Any], ...]] = []
    positives, before = np.zeros(len(truth), np.int64), 0
    for image, (objects, found) in enumerate(zip(truth, detected, strict=True)):
        here = objects.classes == class_
        boxes, difficult = objects.boxes[here], objects.difficult[here]
        positives[image] = int((~difficult).sum())
        chosen = found.classes == class_
        if np.isnan(found.boxes[chosen]).any():
            raise ValueError(f"a detection in image {image} has a box that is not of numbers")
        shared = overlaps(found.boxes[chosen], boxes)
        nearest = shared.argmax(1) if len(boxes) else np.zeros(int(chosen.sum()), np.int64)
        touched = shared.max(1, initial=-np.inf) >= overlap
        ignored = touched & (difficult[nearest] if len(boxes) else False)
        parts.append((found.scores[chosen], np.full(len(nearest), image), before + nearest, touched, ignored))
        before += len(boxes)
    scores, images, objects_hit, touched, ignored = (np.concatenate(each) for each in zip(*parts, strict=True))
    order = ranking(scores)
    results = np.full(len(order), WRONG, np.int8)
    results[ignored[order]] = IGNORED
    candidates = np.flatnonzero((touched & ~ignored)[order])
    results[candidates[np.unique(objects_hit[order][candidates], return_index=True)[1]]] = RIGHT
    return Ranked(results, images[order].astype(np.int64), scores[order], positives)


def rank_all(truth: Sequence[Objects], detected: Sequence[Detections], classes: int, *, overlap: float = 0.5) -> list[Ranked]:
    """`rank_class` of every class. Without images, one entry per class without detections."""
    if not truth and not detected:
        nothing = np.zeros(0)
        return [Ranked(nothing.astype(np.int8), nothing.astype(np.int64), nothing, nothing.astype(np.int64))] * classes
    return [rank_class(truth, detected, class_, overlap=overlap) for class_ in range(classes)]


def columns_of(ranked: Sequence[Ranked]) -> Columns:
    """The detections of each of N images, their classes, scores and results, and `positives` (N, C), for `per_image.write`."""
    classes = np.concatenate([np.full(len(each.results), class_) for class_, each in enumerate(ranked)])
    images, scores, results = (np.concatenate([getattr(r, name) for r in ranked]) for name in ("images", "scores", "results"))
    order = np.argsort(images, kind="stable")
    ends = np.searchsorted(images[order], np.arange(1, len(ranked[0].positives)))
    kept = {"classes": classes, "scores": scores, "results": results}
    positives = np.stack([each.positives for each in ranked], 1)
    return {**{name: per_image.lists(np.split(each[order], ends)) for name, each in kept.items()}, "positives": positives}


def ranked_again(columns: Columns, rows: NDArray[np.int64]) -> list[Ranked]:
    """What `rank_all` finds in some of the images, from their `columns_of`; an image that occurs twice counts as two."""
    chosen = {name: columns[name][rows] for name in ("classes", "scores", "results")}
    classes, scores, results = (np.concatenate(each) for each in chosen.values())
    images = np.repeat(np.arange(len(rows)), [len(each) for each in chosen["scores"]])
    order, positives = ranking(scores), columns["positives"][rows]
    found = []
    for class_ in range(positives.shape[1]):
        own = order[classes[order] == class_]
        found.append(Ranked(results[own], images[own], scores[own], positives[:, class_]))
    return found


def require_pycocotools() -> None:
    """Raise unless pycocotools is installed.

    Raises:
        UserError: it is not.
    """
    if find_spec("pycocotools") is None:
        raise UserError("COCO's scores need pycocotools", instead="Install it: pip install 'ktray[detection]'.")


def coco_scores(truth: Sequence[Objects], detected: Sequence[Detections], classes: int) -> dict[str, float]:
    """COCO's figures in [0, 1], those named in `COCO_METRICS`; one that is not defined is left out, as no object has its size.

    Args:
        truth: the objects of each image. `difficult` objects, which are not trained on, are ignored as crowds are.
        detected: the detections in each image, in the same order; the best 100 of an image count.

    Raises:
        UserError: pycocotools is not installed.
    """
    return coco_judgement(truth, detected, classes)[0]


def coco_judgement(truth: Sequence[Objects], detected: Sequence[Detections], classes: int) -> tuple[dict[str, float], Columns]:
    """`coco_scores`, and for `per_image.write` the detections of each image: classes, scores, and `outcomes`, 40 of each.

    An outcome is RIGHT, WRONG or IGNORED for one of four sizes of objects (all, small, medium, large) and one of ten overlaps
    (0.5 to 0.95). `positives` (N, C * 4) are the objects of a class and size that count.

    Raises:
        UserError: pycocotools is not installed.
    """
    require_pycocotools()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it reports to the screen what it does
        known, results = COCO(), COCO()
        known.dataset = _coco_truth(truth, classes)
        known.createIndex()
        found = [
            {"image_id": image, "category_id": int(class_) + 1, "bbox": _corner_and_size(box), "score": float(score)}
            for image, each in enumerate(detected)
            for box, class_, score in zip(each.boxes, each.classes, each.scores, strict=True)
        ]
        if found:
            results = known.loadRes(found)
        else:  # which `loadRes` does not take
            results.dataset = {**known.dataset, "annotations": []}
            results.createIndex()
        judged = COCOeval(known, results, "bbox")
        judged.evaluate()
        judged.accumulate()
        judged.summarize()
    scores = {name: float(judged.stats[index]) for name, index in COCO_METRICS.items() if judged.stats[index] >= 0}
    return scores, _coco_columns(judged.evalImgs, len(truth), classes)


_SIZES, _OVERLAPS = 4, 10  # of COCO: all, small, medium and large; 0.5 to 0.95
_LEVELS = np.linspace(0.0, 1.0, 101)  # of recall, at which COCO reads the precision


def _coco_columns(judged: Sequence[dict[str, Any] | None], count: int, classes: int) -> Columns:
    """`coco_judgement`'s columns, from what `COCOeval` found for each class, size and image, in this order."""
    positives = np.zeros((count, classes * _SIZES), np.int64)
    parts: list[list[tuple[NDArray[Any], ...]]] = [[] for _ in range(count)]
    for image in range(count):
        for class_ in range(classes):
            of_sizes = [judged[(class_ * _SIZES + size) * count + image] for size in range(_SIZES)]
            known = [each for each in of_sizes if each is not None]
            if len(known) < _SIZES:  # neither an object nor a detection
                continue
            positives[image, class_ * _SIZES : (class_ + 1) * _SIZES] = [(np.asarray(e["gtIgnore"]) == 0).sum() for e in known]
            scores = np.asarray(known[0]["dtScores"], np.float64)
            outcomes = [
                np.where(e["dtIgnore"], IGNORED, np.where(np.asarray(e["dtMatches"]) > 0, RIGHT, WRONG)).astype(np.int8).T
                for e in known
            ]
            parts[image].append((np.full(len(scores), class_), scores, np.concatenate(outcomes, 1)))
    empty = (np.zeros(0, np.int64), np.zeros(0), np.zeros((0, _SIZES * _OVERLAPS), np.int8))
    joined = [[np.concatenate(each) for each in zip(empty, *of_image, strict=True)] for of_image in parts]
    lists = {
        name: per_image.lists([each[place].ravel() for each in joined])
        for place, name in enumerate(("classes", "scores", "outcomes"))
    }
    return {**lists, "positives": positives}


def coco_scores_again(columns: Columns, rows: NDArray[np.int64]) -> dict[str, float]:
    """COCO's figures of some of the images, from the columns of `coco_judgement`; NaN for one that is not defined.

    It is what `COCOeval.accumulate` and `summarize` do, for an image that occurs twice as for two images.
    """
    chosen = {name: columns[name][rows] for name in ("classes", "scores", "outcomes")}
    classes, scores, outcomes = (np.concatenate(each) for each in chosen.values())
    outcomes = outcomes.reshape(len(scores), _SIZES, _OVERLAPS)
    positives = columns["positives"][rows].sum(0).reshape(-1, _SIZES)
    order = ranking(scores)
    precisions: list[list[NDArray[np.float64]]] = [[] for _ in range(_SIZES)]  # of each size and class (overlap, level)
    recalls: list[NDArray[np.float64]] = []  # of each class (overlap,)
    for class_ in range(len(positives)):
        own = outcomes[order[classes[order] == class_]]
        right, wrong = np.cumsum(own == RIGHT, 0), np.cumsum(own == WRONG, 0)
        for size in np.flatnonzero(positives[class_]):
            recall = right[:, size] / positives[class_, size]
            precision = right[:, size] / (right[:, size] + wrong[:, size] + np.spacing(1))
            best = np.maximum.accumulate(precision[::-1], 0)[::-1]
            best = np.concatenate([best, np.zeros((1, _OVERLAPS))])
            first = [np.searchsorted(recall[:, overlap], _LEVELS) for overlap in range(_OVERLAPS)]
            precisions[size].append(np.stack([best[at, overlap] for overlap, at in enumerate(first)]))
            if size == 0:
                recalls.append(recall[-1] if len(recall) else np.zeros(_OVERLAPS))
    values = [np.stack(each) if each else np.full((1, _OVERLAPS, 1), np.nan) for each in precisions]
    return {
        "map": float(values[0].mean()),
        "ap50": float(values[0][:, 0].mean()),
        "ap75": float(values[0][:, 5].mean()),
        "ap_small": float(values[1].mean()),
        "ap_medium": float(values[2].mean()),
        "ap_large": float(values[3].mean()),
        "ar100": float(np.mean(recalls)) if recalls else float("nan"),
    }


COCO_METRICS = {"map": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5, "ar100": 8}
"""Name of each figure -> its position in the `stats` of pycocotools."""


def _coco_truth(truth: Sequence[Objects], classes: int) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image, objects in enumerate(truth):
        crowd = objects.difficult if objects.crowd is None else objects.difficult | objects.crowd
        areas = _areas(objects.boxes) if objects.areas is None else objects.areas
        annotations += [
            {
                "id": len(annotations) + index + 1,
                "image_id": image,
                "category_id": int(objects.classes[index]) + 1,
                "bbox": _corner_and_size(objects.boxes[index]),
                "area": float(areas[index]),
                "iscrowd": int(crowd[index]),
            }
            for index in range(len(objects.boxes))
        ]
    return {
        "images": [{"id": image} for image in range(len(truth))],
        "categories": [{"id": class_ + 1} for class_ in range(classes)],
        "annotations": annotations,
    }


def _corner_and_size(box: NDArray[np.floating]) -> list[float]:
    return [float(box[0]), float(box[1]), float(box[2] - box[0]), float(box[3] - box[1])]
