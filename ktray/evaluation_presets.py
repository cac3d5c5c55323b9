"""Presets of evaluations: ``evals: paper`` stands for a list that fits the data at hand, each with the source of its values.

A preset is expanded when a pair is read, so the pair, its keys and every record have the full list. An entry is taken if the
target data are said to have what it needs (labels, several labels, boxes, masks), and an entry per layer once for each layer of
the student. No file of the data is looked at: whether they have what they should is for `plan` to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ktray import plugins
from ktray.plugins import PluginSpec
from ktray.text import near_word, shown

ANNOTATIONS = {"labels": "labels", "presence": "several labels per image", "boxes": "boxes", "mask": "masks"}
"""What data may have, by its attribute of a data set's `Source`, and how messages call it."""


@dataclass(frozen=True)
class Entry:
    """One evaluation of a preset.

    Attributes:
        spec: its kind, and the fields that differ from its defaults.
        source: where these values come from.
        per_layer: whether it judges each layer of the student; its metrics are then called ``linear_probe/conv1``.
    """

    spec: Mapping[str, Any]
    source: str
    per_layer: bool = False


_PAPER = "Noroozi et al. (2018)"
PRESETS: dict[str, tuple[Entry, ...]] = {
    "paper": (
        Entry(
            {"kind": "voc07_cls_finetune"}, f"{_PAPER}, Table 3: VOC 2007 classification; values of Krähenbühl et al. (2016)"
        ),
        Entry(
            {"kind": "voc_det"}, f"{_PAPER}, Table 3: detection, Fast R-CNN, 150,000 steps, rate 0.001, a tenth every 50,000"
        ),
        Entry({"kind": "voc12_seg"}, f"{_PAPER}, Table 3: segmentation of VOC 2012 by an FCN"),
        Entry(
            {"kind": "linear_probe", "pool": {"kind": "max", "grid": "under_9000"}},
            f"{_PAPER}, Tables 4 and 5: a linear classifier per layer on fewer than 9,000 features (Zhang et al. 2017)",
            per_layer=True,
        ),
        Entry(
            {"kind": "nonlinear_probe"}, f"{_PAPER}, Table 6: frozen up to a layer, the rest trained; 10 crops", per_layer=True
        ),
    ),
    "quick": (
        Entry({"kind": "knn", "k": 20, "temperature": 0.07}, "DINO (2021), section 4.1: no training at all"),
        Entry(
            {"kind": "linear_probe", "l2": 0.01, "iterations": 50, "name": "quick_probe"},
            "ktray: one strong penalty, whose fit takes few steps",
        ),
        Entry({"kind": "effective_rank"}, "RankMe (2023): needs no labels"),
    ),
    "dinov2": (
        Entry(
            {"kind": "knn", "k": (20, 10, 100, 200), "temperature": 0.07},
            "dinov2/eval/knn.py: k 10, 20, 100, 200, temperature 0.07",
        ),
        Entry(
            {
                "kind": "linear_probe",
                "l2": "dinov2",
                "held_out": 0.1,
                "scaling": "none",
                "precision": "float64",
                "iterations": 1000,
            },
            "dinov2/eval/log_regression.py: 45 values of C from 1e-6 to 1e5, a tenth held out, float64, 1,000 iterations",
        ),
    ),
    "vissl": (
        Entry(
            {
                "kind": "voc07_cls",
                "folds": 3,
                "normalize": True,
                "positive_weight": 2.0,
                "iterations": 2000,
            },
            "vissl/utils/svm_utils and its VOC07 configuration: 11 costs, three folds, length 1, squared hinge, 2,000 steps",
        ),
        Entry(
            {"kind": "low_shot", "shots": (1, 2, 4, 8, 16, 32, 64, 96), "draws": 5},
            "vissl's low-shot configuration: k 1 to 96, 5 samples; its choice of C on the judged images is not taken over",
        ),
    ),
}


def needs(kind: str) -> tuple[str, ...]:
    """What an evaluation needs of its data, of the keys of `ANNOTATIONS`."""
    module = plugins.module("evaluation", kind)
    return (*(("labels",) if module.NEEDS_LABELS else ()), *getattr(module, "NEEDS_ANNOTATIONS", ()))


def refuse_unknown(value: str) -> None:
    """Refuse a text in place of a list of evaluations that is no preset.

    Raises:
        ValueError: it is none.
    """
    if value in PRESETS:
        return
    near = near_word(value, PRESETS)
    instead = f"; write [{value}]" if value in plugins.kinds("evaluation") else f"; did you mean {near!r}?" if near else ""
    raise ValueError(f"evals is {shown(value)}, which is neither a list nor a preset ({', '.join(PRESETS)}){instead}")


def expanded(value: Any, target: PluginSpec, backbone: PluginSpec | None) -> Any:
    """`evals` as a user writes it, with each preset replaced by its entries.

    Args:
        value: a preset's name, or a list in which presets may stand beside kinds and specs; anything else is returned as it is.
        target: the data that are judged on.
        backbone: of the student; None leaves out what is judged per layer.

    Raises:
        ValueError: the data have nothing that a preset's entries need.
    """
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list | tuple) or not any(isinstance(each, str) and each in PRESETS for each in entries):
        return value
    found: list[Any] = []
    for each in entries:
        found += _entries(each, target, backbone) if isinstance(each, str) and each in PRESETS else [each]
    return found


def _entries(name: str, target: PluginSpec, backbone: PluginSpec | None) -> list[dict[str, Any]]:
    present = _annotations(target)
    found: list[dict[str, Any]] = []
    for entry in PRESETS[name]:
        kind = str(entry.spec["kind"])
        if not present.issuperset(needs(kind)):
            continue
        if not entry.per_layer:
            found.append(dict(entry.spec))
        elif backbone is not None:
            found += [{**entry.spec, "layer": layer, "name": f"{kind}/{layer}"} for layer in _layers(backbone)]
    if not found:
        wanted = dict.fromkeys(ANNOTATIONS[need] for entry in PRESETS[name] for need in needs(str(entry.spec["kind"])))
        has = ", ".join(ANNOTATIONS[each] for each in ANNOTATIONS if each in present) or "none of these"
        raise ValueError(f"the preset {shown(name)} needs {' or '.join(wanted)}, and the target data have {has}")
    return found


def _annotations(target: PluginSpec) -> frozenset[str]:
    """What the data should have, by `annotations_of` of their kind; labels where it does not say."""
    stated = getattr(plugins.module_of("dataset", target), "annotations_of", None)
    return frozenset(stated(target) if stated is not None else ("labels",))


@lru_cache(maxsize=64)  # for every draw of a space
def _layers(backbone: PluginSpec) -> tuple[str, ...]:
    import torch

    with torch.device("meta"):  # a network without weights
        return tuple(plugins.module_of("backbone", backbone).build(backbone).layers)
