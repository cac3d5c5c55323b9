"""Checks of a pair against its data and networks, before anything runs.

They are cheap: at most a few images are decoded, and two random images run through each network.
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
    """A function data spec -> its Splits; each data set is listed once."""
    known: dict[str, Splits] = {}

    def load(spec: DataSpec) -> Splits:
        name = canonical(spec.model_dump())
        if name not in known:
            known[name] = plugins.module_of("dataset", spec).load(spec)
        return known[name]

    return load


def check_pair(pair: PairSpec, load: Load) -> None:
    """Reject a pair that would fail later or would be evaluated on labels that it was trained on.

    Such as: too many clusters, missing labels or splits, unknown layers, images that are too small for a network.

    Raises:
        UserError: the first thing that is wrong, with its dotted path.
    """
    if isinstance(pair.teacher, StudentTeacher):
        with _errors_inside("teacher.pair"):
            check_pair(pair.teacher.pair, load)
    found = {role: _listed(pair, role, load) for role in DataRoles.model_fields}
    _check_transfer(pair, found["cluster"], found["transfer"])
    _check_pretext(pair, found["pretext"])
    _check_labels(pair, found["transfer"], found["target"])
    _check_held_out_images(pair, found["target"], load)
    if isinstance(pair.teacher, LoadedTeacher) and not ARTIFACT.fullmatch(pair.teacher.checkpoint):
        _check_checkpoint(pair.teacher.checkpoint, checkpoint_sha256(pair.teacher.checkpoint))
    _check_precomputed_features(pair, load)
    _check_evaluations(pair)
    _check_layers(pair)
    try_networks(pair, train_count(found["cluster"], pair.data.cluster))


@lru_cache(maxsize=256)
def _check_checkpoint(checkpoint: str, sha256: str) -> None:
    """Reject a checkpoint that cannot be loaded. Cached by content, because many pairs of a search load the same one."""
    require_readable(Path(checkpoint))


@contextlib.contextmanager
def _errors_inside(path: str) -> Iterator[None]:
    """Prefix the dotted path of a UserError with the path of a part of the pair."""
    try:
        yield
    except UserError as error:
        raise UserError(error.problem, f"{path}.{error.where}".rstrip("."), error.instead) from error


def _listed(pair: PairSpec, role: str, load: Load) -> Splits:
    """The data of one role. An error names the field of the pair that states these data."""
    specs = [getattr(pair.data, each) for each in DataRoles.model_fields]
    path = "data" if all(spec == specs[0] for spec in specs) else f"data.{role}"
    try:
        return load(getattr(pair.data, role))
    except UserError as error:
        field = error.where.removeprefix("data").removeprefix(".")
        raise UserError(error.problem, f"{path}.{field}".rstrip("."), error.instead) from error


def train_count(splits: Splits, spec: DataSpec) -> int:
    """Number of training images of a data set, without its val split."""
    return len(split_rows(splits, spec.split)["train"][1])


def _check_transfer(pair: PairSpec, cluster: Splits, transfer: Splits) -> None:
    """Check that the transfer has enough images."""
    count = train_count(transfer, pair.data.transfer)
    clustered = "clusters" in plugins.module_of("transfer", pair.transfer).NEEDS
    run_plugin_check("transfer", "transfer", pair.transfer, count, train_count(cluster, pair.data.cluster) if clustered else 0)


def _check_labels(pair: PairSpec, transfer: Splits, target: Splits) -> None:
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


def _check_held_out_images(pair: PairSpec, judging: Splits, load: Load) -> None:
    """Check that no role that reads labels, in any generation, trains on images that the target holds out."""
    target = pair.data.target
    if judging.val is not None:  # nothing is held out of the training images
        return
    generation_roles = [
        ("teacher.pair." * index, generation, role)
        for index, generation in enumerate(generations(pair))
        for role in _roles_with_labels(generation)
    ]
    for prefix, generation, role in generation_roles:
        spec: DataSpec = getattr(generation.data, role)
        if spec == target or origin(spec) != origin(target):
            continue
        held = _names(judging, target, "val")
        seen = held & _names(load(spec), spec, "train")
        if seen:
            raise UserError(
                f"{len(seen)} of the {len(held)} images that judge are training images of {role}, which reads their labels",
                where=f"{prefix}data.{role}.split",
                instead=f"Write the target's: {{val: {target.split.val}, seed: {target.split.seed}}}.",
            )


def _roles_with_labels(pair: PairSpec) -> list[str]:
    """The roles whose training reads the labels of the images."""
    teacher = pair.teacher
    of_pretext = isinstance(teacher, TrainedTeacher) and "labels" in getattr(
        plugins.module_of("pretext", teacher.pretext), "NEEDS", ()
    )
    of_transfer = "labels" in plugins.module_of("transfer", pair.transfer).NEEDS
    return ["pretext"] * of_pretext + ["transfer"] * of_transfer


def _names(splits: Splits, spec: DataSpec, split: str) -> set[str]:
    images, rows = split_rows(splits, spec.split).get(split, (splits.train, np.arange(0)))
    return {images.names[row] for row in rows}


def _check_pretext(pair: PairSpec, data: Splits) -> None:
    """Check that the data have what the pretext task NEEDS."""
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
    """Whether all of a few images, spread over the data set, are grey; unreadable images are skipped."""
    count = min(8, len(images.names))
    found = []
    for index in range(count):
        with contextlib.suppress(Unreadable):
            found.append(bool((np.ptp(images.read(index * len(images.names) // count), axis=-1) == 0).all()))
    return bool(found) and all(found)


def _check_evaluations(pair: PairSpec) -> None:
    """Check that the pair makes what each evaluation reads."""
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


def _check_layers(pair: PairSpec) -> None:
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
    # Not on torch's meta device, where the first random draw imports torch's compiler, which takes seconds.
    return tuple(loop.untrained_backbone(backbone, 0).layers)  # type: ignore[arg-type]


def _check_precomputed_features(pair: PairSpec, load: Load) -> None:
    """Reject features whose rows do not match the images. Whether all values are finite is checked during the run.

    Raises:
        UserError: the first thing that is wrong, with its dotted path.
    """
    teacher = pair.teacher
    if not isinstance(teacher, PrecomputedTeacher):
        return
    read = list(_images_read(pair, load))
    images = [(role, getattr(pair.data, role), names) for role, _, names in read]
    for first, second in combinations(images, 2):
        _refuse_ambiguous(teacher, first, second)
    rows: Any = None
    for role, split, names in read:
        if rows is None:  # features matched by row belong to one data set, so any role gives the same
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


def _refuse_ambiguous(teacher: PrecomputedTeacher, first: RoleImages, second: RoleImages) -> None:
    """Reject features of which one row would belong to images of two data sets."""
    if origin(first[1]) == origin(second[1]):
        return
    if precomputed.matched_by_row(teacher):
        raise UserError(
            f"features without paths belong to one data set, and data.{first[0]} and data.{second[0]} are two",
            precomputed.WHERE,
            "Give a file of 'names'.",
        )
    both = set(first[2]) & set(second[2])
    if both:
        raise UserError(
            f"{len(both)} paths are in data.{first[0]} and in data.{second[0]}, such as {min(both)!r}",
            precomputed.WHERE,
            "Put both data sets below one folder, so that each image has a path of its own.",
        )
