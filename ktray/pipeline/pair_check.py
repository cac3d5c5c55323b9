"""What a pair's spec says about data and layers that only the data and the networks can confirm.

Cheap: at most a few images are decoded, and two made-up ones run through each network.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from ktray import plugins
from ktray.errors import UserError
from ktray.features import precomputed
from ktray.fingerprint import canonical
from ktray.images import Source, Splits, Unreadable, split_rows
from ktray.pipeline.identity import checkpoint_sha256, origin
from ktray.pipeline.pair_graph import generations
from ktray.pipeline.shape_check import run_plugin_check, try_networks
from ktray.spec import (
    BackboneSpec,
    DataRoles,
    DataSpec,
    HandcraftedTeacher,
    LoadedTeacher,
    NetworkTeacher,
    PairSpec,
    PrecomputedTeacher,
    StudentTeacher,
    TrainedTeacher,
)
from ktray.stages.evaluation_stage import reads_pseudo_labels
from ktray.training import loop
from ktray.training.pretrained import ARTIFACT, require_readable

Load = Callable[[DataSpec], Splits]


def data_loader() -> Load:
    """A function data spec -> its Splits that lists every data set once."""
    known: dict[str, Splits] = {}

    def load(spec: DataSpec) -> Splits:
        name = canonical(spec.model_dump())
        if name not in known:
            known[name] = plugins.module_of("dataset", spec).load(spec)
        return known[name]

    return load


def check_pair(pair: PairSpec, load: Load) -> None:
    """Refuse what would fail later, or would judge by labels that were learned from.

    That is: too many clusters, missing labels or splits, layers that a backbone lacks, images too small for a network.

    Raises:
        UserError: the first thing that is wrong, with its dotted path.
    """
    if isinstance(pair.teacher, StudentTeacher):
        with _inside("teacher.pair"):
            check_pair(pair.teacher.pair, load)
    found = {role: _listed(pair, role, load) for role in DataRoles.model_fields}
    _transfer(pair, found["cluster"], found["transfer"])
    _pretext(pair, found["pretext"])
    _labels(pair, found["transfer"], found["target"])
    _judged_labels_stay_unseen(pair, found["target"], load)
    if isinstance(pair.teacher, LoadedTeacher) and not ARTIFACT.fullmatch(pair.teacher.checkpoint):
        _readable(pair.teacher.checkpoint, checkpoint_sha256(pair.teacher.checkpoint))
    _precomputed_features(pair, load)
    _evaluations(pair)
    _layers(pair)
    try_networks(pair, train_count(found["cluster"], pair.data.cluster))


@lru_cache(maxsize=256)
def _readable(checkpoint: str, sha256: str) -> None:
    """Refuse weights that no stage could read; those of one content are looked at once, however many draws load them."""
    require_readable(Path(checkpoint))


@contextlib.contextmanager
def _inside(place: str) -> Iterator[None]:
    """Say what is wrong with a part of the pair with the path of that part."""
    try:
        yield
    except UserError as error:
        raise UserError(error.problem, f"{place}.{error.where}".rstrip("."), error.instead) from error


def _listed(pair: PairSpec, role: str, load: Load) -> Splits:
    """The data of one role; what is wrong with it is said with the field that names it."""
    specs = [getattr(pair.data, each) for each in DataRoles.model_fields]
    place = "data" if all(spec == specs[0] for spec in specs) else f"data.{role}"
    try:
        return load(getattr(pair.data, role))
    except UserError as error:
        field = error.where.removeprefix("data").removeprefix(".")
        raise UserError(error.problem, f"{place}.{field}".rstrip("."), error.instead) from error


def train_count(splits: Splits, spec: DataSpec) -> int:
    """Number of training images of a data set after its validation part is taken out."""
    return len(split_rows(splits, spec.split)["train"][1])


def _transfer(pair: PairSpec, cluster: Splits, transfer: Splits) -> None:
    """Whether there are images enough for what the transfer makes of them."""
    count = train_count(transfer, pair.data.transfer)
    clustered = "clusters" in plugins.module_of("transfer", pair.transfer).NEEDS
    run_plugin_check("transfer", "transfer", pair.transfer, count, train_count(cluster, pair.data.cluster) if clustered else 0)


def _labels(pair: PairSpec, transfer: Splits, target: Splits) -> None:
    needs = plugins.module_of("transfer", pair.transfer).NEEDS
    if "labels" in needs and transfer.train.labels is None:
        raise UserError(
            f"the transfer {pair.transfer.kind!r} needs labels, and its data has none",
            where="transfer.kind",
            instead="Use clusters, or name the labels: parquet:/p?label=COLUMN, imagefolder:/p.",
        )
    for index, spec in enumerate(pair.evals):
        where = f"evals.{index}"
        module = plugins.module_of("evaluation", spec)
        if module.NEEDS_LABELS and target.train.labels is None:
            raise UserError(
                f"the evaluation {spec.kind!r} needs labels, and the target data has none",
                where=where,
                instead="Use effective_rank, which needs none, or name the labels: parquet:/p?label=COLUMN, imagefolder:/p.",
            )
        if spec.split not in split_rows(target, pair.data.target.split):
            instead = {"test": "Judge on val.", "val": "Give more images, or a larger share: data.split.val."}
            raise UserError(f"the target data has no {spec.split} split", where=where, instead=instead[spec.split])
        if spec.of == "teacher" and pair.teacher is None:
            raise UserError("the evaluation judges the teacher, and the pair has none", where=where)


def _judged_labels_stay_unseen(pair: PairSpec, judging: Splits, load: Load) -> None:
    """No role that reads labels, in any generation, trains on images that the target holds out; roles without labels may."""
    target = pair.data.target
    if judging.val is not None:  # nothing is held out of the training images
        return
    roles = [("teacher.pair." * place, each, role) for place, each in enumerate(generations(pair)) for role in _reading(each)]
    for above, each, role in roles:
        spec: DataSpec = getattr(each.data, role)
        if spec == target or origin(spec) != origin(target):
            continue
        held = _names(judging, target, "val")
        seen = held & _names(load(spec), spec, "train")
        if seen:
            raise UserError(
                f"{len(seen)} of the {len(held)} images that judge are training images of {role}, which reads their labels",
                where=f"{above}data.{role}.split",
                instead=f"Write the target's: {{val: {target.split.val}, seed: {target.split.seed}}}.",
            )


def _reading(pair: PairSpec) -> list[str]:
    """The roles whose training images are seen together with their labels."""
    teacher = pair.teacher
    of_pretext = isinstance(teacher, TrainedTeacher) and "labels" in getattr(
        plugins.module_of("pretext", teacher.pretext), "NEEDS", ()
    )
    of_transfer = "labels" in plugins.module_of("transfer", pair.transfer).NEEDS
    return ["pretext"] * of_pretext + ["transfer"] * of_transfer


def _names(splits: Splits, spec: DataSpec, split: str) -> set[str]:
    images, rows = split_rows(splits, spec.split).get(split, (splits.train, np.arange(0)))
    return {images.names[row] for row in rows}


def _pretext(pair: PairSpec, data: Splits) -> None:
    """What a pretext task looks for in its data, as its module says by NEEDS."""
    if not isinstance(pair.teacher, TrainedTeacher):
        return
    kind = pair.teacher.pretext.kind
    needs = getattr(plugins.module_of("pretext", pair.teacher.pretext), "NEEDS", ())
    if "labels" in needs and data.train.labels is None:
        raise UserError(
            f"the pretext task {kind!r} needs labels, and its data has none",
            where="teacher.pretext.kind",
            instead="Use a task that needs none, or name the labels: parquet:/p?label=COLUMN, imagefolder:/p.",
        )
    if "colours" in needs and _grey(data.train):
        raise UserError(
            f"the pretext task {kind!r} needs colours, and the images of its data are grey",
            where="teacher.pretext.kind",
            instead="Use a task that needs none, such as rotation, or other images for data.pretext.",
        )


def _grey(images: Source) -> bool:
    """Whether a few images from all over the data are grey, as far as they can be read."""
    few = min(8, len(images.names))
    found = []
    for place in range(few):
        with contextlib.suppress(Unreadable):
            found.append(bool((np.ptp(images.read(place * len(images.names) // few), axis=-1) == 0).all()))
    return bool(found) and all(found)


def _evaluations(pair: PairSpec) -> None:
    """What an evaluation reads that the pair does not make."""
    needs = plugins.module_of("transfer", pair.transfer).NEEDS
    for index, spec in enumerate(pair.evals):
        if reads_pseudo_labels(spec) and "pseudo_labels" not in needs:
            raise UserError(
                f"{spec.kind} judges pseudo-labels, and the transfer {pair.transfer.kind!r} makes none",
                where=f"evals.{index}",
                instead="Leave it out, or transfer by clusters.",
            )
        teacher = pair.teacher
        if spec.of == "teacher" and spec.layer is not None and isinstance(teacher, HandcraftedTeacher | PrecomputedTeacher):
            what = "a file of features"
            if isinstance(teacher, HandcraftedTeacher):
                what = f"the descriptor {teacher.descriptor.kind}"
            raise UserError(
                f"the teacher is {what}, which has no layer {spec.layer!r}",
                where=f"evals.{index}.layer",
                instead="Leave 'layer' out.",
            )


def _layers(pair: PairSpec) -> None:
    networks: list[tuple[str, BackboneSpec, str | None]] = []
    teacher = pair.teacher
    if isinstance(teacher, NetworkTeacher):
        networks.append(("teacher.layer", teacher.backbone, teacher.layer))
    for index, spec in enumerate(pair.evals):
        if spec.of == "student":
            networks.append((f"evals.{index}.layer", pair.student.backbone, spec.layer))
        elif isinstance(teacher, NetworkTeacher):
            networks.append((f"evals.{index}.layer", teacher.backbone, spec.layer))
    for where, backbone, layer in networks:
        names = _layer_names(backbone)
        if layer is not None and layer not in names:
            raise UserError(
                f"the backbone {backbone.kind} has no layer {layer!r}", where=where, instead=f"It has {', '.join(names)}."
            )


@lru_cache(maxsize=256)
def _layer_names(backbone: BackboneSpec) -> tuple[str, ...]:
    # Not on torch's meta device: its first random draw imports torch's compiler, which takes seconds.
    return tuple(loop.untrained_backbone(backbone, 0).layers)  # type: ignore[arg-type]


def _precomputed_features(pair: PairSpec, load: Load) -> None:
    """Refuse features whose rows are not those of the images; whether their numbers are finite, only the run sees.

    Raises:
        UserError: the first thing that is wrong, with its dotted path.
    """
    teacher = pair.teacher
    if not isinstance(teacher, PrecomputedTeacher):
        return
    read = list(_images_read(pair, load))
    for (one, _, of_one), (other, _, of_other) in combinations(read, 2):
        _refuse_ambiguous(teacher, (one, getattr(pair.data, one), of_one), (other, getattr(pair.data, other), of_other))
    rows: Any = None
    for role, split, names in read:
        if rows is None:  # of one data set, where rows belong to one
            rows = precomputed.row_numbers(teacher, load(getattr(pair.data, role)).train.names)
        precomputed.refuse_missing(rows, names, f"{split} images of data.{role}")


def _images_read(pair: PairSpec, load: Load) -> Iterator[tuple[str, str, list[str]]]:
    """(role, split, paths) of the images whose features the pair reads."""
    needs = plugins.module_of("transfer", pair.transfer).NEEDS
    read = [("cluster", "train")] if "clusters" in needs else []
    if {"clusters", "features"} & needs.keys():
        read += [("transfer", "train")]
    for entry in pair.evals:
        if entry.of == "teacher" and not reads_pseudo_labels(entry):
            read += [("target", "train"), ("target", entry.split)]
    for role, split in dict.fromkeys(read):
        spec: DataSpec = getattr(pair.data, role)
        source, rows = split_rows(load(spec), spec.split)[split]
        yield role, split, [source.names[row] for row in rows]


RoleImages = tuple[str, DataSpec, list[str]]  # role, data spec, paths


def _refuse_ambiguous(teacher: PrecomputedTeacher, one: RoleImages, other: RoleImages) -> None:
    """One row cannot belong to two images."""
    if origin(one[1]) == origin(other[1]):
        return
    if precomputed.matched_by_row(teacher):
        raise UserError(
            f"features without paths belong to one data set, and data.{one[0]} and data.{other[0]} are two",
            precomputed.WHERE,
            "Give a file of 'names'.",
        )
    both = set(one[2]) & set(other[2])
    if both:
        raise UserError(
            f"{len(both)} paths are in data.{one[0]} and in data.{other[0]}, such as {min(both)!r}",
            precomputed.WHERE,
            "Put both data sets below one folder, so that each image has a path of its own.",
        )
