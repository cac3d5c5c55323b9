"""What a pair's spec says about data and layers that only the data and the networks can confirm. Cheap: nothing is decoded."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from ktray import plugins
from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.images import Splits
from ktray.pipeline.graph import evaluation_name
from ktray.spec import HandcraftedTeacher, PairSpec, Spec

Load = Callable[[Spec], Splits]


def data_loader() -> Load:
    """A function data spec -> its Splits that lists every data set once."""
    known: dict[str, Splits] = {}

    def load(spec: Spec) -> Splits:
        name = canonical(spec.model_dump())
        if name not in known:
            known[name] = plugins.module_of("dataset", spec).load(spec)
        return known[name]

    return load


def check_pair(pair: PairSpec, load: Load) -> None:
    """Refuse what would fail later: too many clusters, missing labels or splits, layers that a backbone lacks.

    Raises:
        UserError: the first thing that is wrong, with its dotted path.
    """
    _clusters(pair, load)
    _labels(pair, load)
    _layers(pair)


def train_count(splits: Splits, spec: Any) -> int:
    """Number of training images of a data set after its validation part is taken out."""
    count = len(splits.train.names)
    return count if splits.val is not None else count - round(count * spec.split.val)


def _clusters(pair: PairSpec, load: Load) -> None:
    k = getattr(pair.transfer, "k", None)
    if k is None:
        return
    count = train_count(load(pair.data.cluster), pair.data.cluster)
    if k > count:
        raise UserError(
            f"k={k} clusters cannot be made of {count} images",
            where="transfer.k",
            instead=f"Use at most {count}, better a hundredth of it.",
        )


def _labels(pair: PairSpec, load: Load) -> None:
    needs = plugins.module_of("transfer", pair.transfer).NEEDS
    if "labels" in needs and load(pair.data.transfer).train.labels is None:
        raise UserError("this transfer needs labels, and the data has none", where="data.transfer")
    target = load(pair.data.target)
    for index, spec in enumerate(pair.evals):
        where = f"evals[{index}] ({evaluation_name(spec)})"  # type: ignore[arg-type]
        module = plugins.module_of("evaluation", spec)
        if module.NEEDS_LABELS and target.train.labels is None:
            raise UserError(
                "this evaluation needs labels, and the target data has none",
                where=where,
                instead="Use effective_rank, which needs none.",
            )
        if spec.split == "test" and target.test is None:  # type: ignore[attr-defined]
            raise UserError("the target data has no test split", where=where, instead="Judge on val.")
        if spec.of == "teacher" and pair.teacher is None:  # type: ignore[attr-defined]
            raise UserError("it judges the teacher, and the pair has none", where=where)


def _layers(pair: PairSpec) -> None:
    networks: list[tuple[str, Any, str | None]] = []
    teacher: Any = pair.teacher
    if teacher is not None and not isinstance(teacher, HandcraftedTeacher):
        networks.append(("teacher.layer", teacher.backbone, teacher.layer))
    for index, spec in enumerate(pair.evals):
        if spec.of == "student":  # type: ignore[attr-defined]
            networks.append((f"evals[{index}].layer", pair.student.backbone, spec.layer))  # type: ignore[attr-defined]
        elif teacher is not None and not isinstance(teacher, HandcraftedTeacher):
            networks.append((f"evals[{index}].layer", teacher.backbone, spec.layer))  # type: ignore[attr-defined]
    for where, backbone, layer in networks:
        names = _layer_names(backbone)
        if layer is not None and layer not in names:
            raise UserError(
                f"the backbone {backbone.kind} has no layer {layer!r}", where=where, instead=f"It has {', '.join(names)}."
            )


@lru_cache(maxsize=256)
def _layer_names(backbone: Any) -> tuple[str, ...]:
    with torch.device("meta"):
        return tuple(plugins.module_of("backbone", backbone).build(backbone).layers)
