"""Checks of a pair against its data and networks, before anything runs.

They are cheap: at most a few images are decoded, and two random images run through each network and descriptor, to find
errors of shape before a run. Each distinct network, layer, pooling, descriptor and pretext task runs once per process and size
of images, on the CPU. A plugin may help: its `check` rejects a spec, and its `quick` returns one with the same shapes that is
quick to try.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ktray import plugins
from ktray.errors import UserError
from ktray.features import extraction, precomputed
from ktray.fingerprint import canonical
from ktray.images import Images, Source, Splits, Unreadable, split_rows
from ktray.pipeline.identity import checkpoint_sha256, origin, weights_sha256
from ktray.pipeline.pair_graph import generations_with_paths, own_crop_of
from ktray.plugins import PluginSpec
from ktray.spec import (
    AnyTeachers,
    BackboneSpec,
    DataRoles,
    DataSpec,
    DescriptorSpec,
    EvaluationSpec,
    HandcraftedTeacher,
    LoadedTeacher,
    NamedTeacher,
    NetworkTeacher,
    PairSpec,
    Pooling,
    PrecomputedTeacher,
    PretextSpec,
    SeveralTeachers,
    Student,
    StudentTeacher,
    TrainedTeacher,
    taught_by_each,
    teachers_of,
)
from ktray.stages.evaluation_stage import reads_network, reads_pseudo_labels
from ktray.strict import StrictSpec
from ktray.text import counted, visible_name
from ktray.training import loop, optimisers, timm_weights
from ktray.training.pretrained import ARTIFACT, check_weights, checkpoint_path, shapes
from ktray.training.task import make_batch

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


def check_pair(pair: PairSpec, load: Load) -> list[str]:
    """Reject a pair that would fail later or would be evaluated on labels that it was trained on; returns what was assumed.

    Such as: too many clusters, missing labels or splits, unknown layers, images that are too small for a network. What was
    assumed are sentences for people, such as which of several networks in a checkpoint teaches.

    Raises:
        UserError: the first thing that is wrong, with its dotted path.
    """
    if isinstance(pair.teacher, SeveralTeachers):
        return _check_several(pair, pair.teacher, load)
    assumed = []
    if isinstance(pair.teacher, StudentTeacher):
        with _errors_inside("teacher.pair"):
            assumed += check_pair(pair.teacher.pair, load)
    found = {role: _listed(pair, role, load) for role in DataRoles.model_fields}
    _check_transfer(pair, found["cluster"], found["transfer"])
    _check_pretext(pair, found["pretext"])
    _check_labels(pair, found["transfer"], found["target"])
    _check_held_out_images(pair, found["target"], load)
    if isinstance(pair.teacher, LoadedTeacher):
        assumed += _check_checkpoint(pair.teacher)
    if isinstance(pair.teacher, NamedTeacher):
        assumed += check_named(pair.teacher)
    _check_precomputed_features(pair, load)
    _check_evaluations(pair)
    _check_judged_images(pair, found["target"])
    _check_layers(pair)
    _check_schedules(pair)
    try_networks(pair, train_count(found["cluster"], pair.data.cluster))
    return assumed


def _check_several(pair: PairSpec, teachers: SeveralTeachers, load: Load) -> list[str]:
    """Check the pair with one teacher at a time, and that no teacher is there twice."""
    written = [canonical(teacher.model_dump(mode="json")) for teacher in teachers.several]
    twice = next((index for index, text in enumerate(written) if text in written[:index]), None)
    if twice is not None:
        raise UserError(
            f"the teachers {written.index(written[twice])} and {twice} are the same, so the student would learn the same twice",
            f"teacher.several.{twice}",
            "Leave one of them out.",
        )
    assumed: list[str] = []
    for index, single in enumerate(taught_by_each(pair)):
        try:
            assumed += check_pair(single, load)
        except UserError as error:
            step, _, rest = error.where.partition(".")
            where = f"teacher.several.{index}{f'.{rest}' if rest else ''}" if step == "teacher" else error.where
            raise UserError(error.problem, where, error.instead) from error
    return list(dict.fromkeys(assumed))


def _check_checkpoint(teacher: LoadedTeacher) -> list[str]:
    """Reject a checkpoint whose weights are not those of the backbone; returns which of several were taken."""
    if ARTIFACT.fullmatch(teacher.checkpoint):
        for field in ("key", "prefix"):
            if getattr(teacher, field) is not None:
                raise UserError(f"an artifact has no {field}", f"teacher.{field}", "Leave it out.")
        return []
    sha256 = checkpoint_sha256(teacher.checkpoint)
    return list(_compare_weights(teacher.checkpoint, sha256, teacher.backbone, teacher.key, teacher.prefix))


@lru_cache(maxsize=256)
def _compare_weights(
    checkpoint: str, sha256: str, backbone: BackboneSpec, key: str | None, prefix: str | None
) -> tuple[str, ...]:
    """Which weights of several are taken, as sentences. Cached by content, because many pairs load the same ones."""
    with _errors_at("teacher.backbone", f"the {backbone.kind} cannot be made", backbone):
        network = shapes(backbone)
    path = checkpoint_path(checkpoint)
    found, said = check_weights(network, path, key, prefix), []
    if found.others:
        there = "; ".join(map(str, found.others))
        said.append(
            f"{path.name} has several networks: the one at {found.place} is taken. "
            f"To take another, give teacher.key and teacher.prefix: {there}"
        )
    if found.incomplete:
        there = "; ".join(map(str, found.incomplete))
        said.append(f"{path.name} has another network only in part, which cannot be taken: {there}")
    if found.nameless:
        there = "; ".join(map(visible_name, found.nameless))
        said.append(
            f"{path.name} has averaged weights without the network's names ({there}), so those at {found.place} are taken. "
            "To take the averages, load them into the network that trained them and save its state_dict"
        )
    return tuple(said)


def check_named(teacher: NamedTeacher) -> list[str]:
    """Reject a pretrained teacher that is not on this machine or whose weights do not fit; returns its licence as a sentence.

    Raises:
        UserError: also if it has no such layer or tokens.
    """
    network = timm_weights.find(teacher)
    _check_named_weights(network, weights_sha256(network.file))
    names, what = timm_weights.built(network.own_backbone), teacher.tokens
    layer, known = timm_weights.layer_of(teacher), names.layers
    if teacher.layer is not None and teacher.layer not in known:  # type: ignore[operator]
        raise UserError(
            f"{teacher.timm} has no layer {teacher.layer!r}",
            "teacher.layer",
            f"It has {', '.join(known)}.",  # type: ignore[arg-type]
        )
    if layer not in (None, *known, *extraction.token_layers(names)):  # type: ignore[misc]
        of = f"the layers of {teacher.timm}" if teacher.layer else teacher.timm
        lacking = "no class token" if what != "all" else "no other tokens than patches"
        raise UserError(f"{of} has {lacking}", "teacher.tokens", "Write patches, or leave 'tokens' out.")
    return [f"the weights of {network.name} ({network.place}) have the licence: {network.licence}"]


@lru_cache(maxsize=64)
def _check_named_weights(network: timm_weights.NamedNetwork, sha256: str) -> None:
    timm_weights.check(network)


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
    if "labels" in needs:
        _refuse_one_class(transfer, "transfer.kind", f"the transfer {pair.transfer.kind!r}", "data.transfer")
    for index, spec in enumerate(pair.evals):
        where = f"evals.{index}"
        module = plugins.module_of("evaluation", spec)
        if module.NEEDS_LABELS and target.train.labels is None:
            raise UserError(
                f"the evaluation {spec.kind!r} needs labels, and the target data has none",
                where=where,
                instead="Its images show several classes each: judge them with voc07_cls."
                if target.train.presence is not None
                else "Use effective_rank, which needs none, or name the labels: parquet:/p?label=COLUMN, imagefolder:/p.",
            )
        if spec.split not in split_rows(target, pair.data.target.split):
            instead = {"test": "Judge on val.", "val": "Give more images, or a larger share: data.split.val."}
            raise UserError(f"the target data has no {spec.split} split", where=where, instead=instead[spec.split])
        if module.NEEDS_LABELS or getattr(module, "MAY_READ_LABELS", ()):
            read, role = (transfer, "transfer") if reads_pseudo_labels(spec) else (target, "target")
            _refuse_one_class(read, where, f"the evaluation {spec.kind!r}", f"data.{role}")
        judged = split_rows(target, pair.data.target.split)[spec.split][0]
        if module.NEEDS_LABELS and judged.labels is None:
            raise UserError(
                f"the evaluation {spec.kind!r} needs labels, and the {spec.split} split of the target data has none",
                where=where,
                instead="Judge on another split.",
            )
        for what in getattr(module, "NEEDS_ANNOTATIONS", ()):
            for split in dict.fromkeys(("train", spec.split)):
                if getattr(split_rows(target, pair.data.target.split)[split][0], what) is None:
                    name, remedy = _ANNOTATIONS[what]
                    raise UserError(
                        f"the evaluation {spec.kind!r} needs {name}, and the {split} split of the target data has none",
                        where=where,
                        instead=remedy,
                    )
        if spec.of == "teacher" and pair.teacher is None:
            raise UserError("the evaluation judges the teacher, and the pair has none", where=where)


_ANNOTATIONS = {
    "presence": ("several labels per image", "Use a data set that has them, such as voc:/VOCdevkit or coco:/coco."),
    "boxes": ("boxes", "Use a data set that has them, such as voc:/VOCdevkit or coco:/coco."),
    "mask": ("masks", "Use a data set that has them, such as voc:/VOCdevkit?task=segmentation."),
}
"""Attribute of a `Source` that an evaluation may need -> what it is, and what else to use."""


def _refuse_one_class(splits: Splits, where: str, reader: str, data: str) -> None:
    """Refuse labels that say nothing, because all training images have the same one."""
    labels = splits.train.labels
    if labels is None or len(labels) < 2 or (labels != labels[0]).any():
        return
    nested = splits.layout.nested
    instead = (
        f"{nested} looks like the folder of the classes: give it as the path." if nested else "Check the labels of the data"
    )
    raise UserError(
        f"{reader} reads labels, and all training images of {data} have the same class, {splits.train.classes[labels[0]]!r}",
        where=where,
        instead=instead if nested else f"{instead} with 'ktray data check', or use effective_rank, which reads none.",
    )


def _check_held_out_images(pair: PairSpec, judging: Splits, load: Load) -> None:
    """Check that no role that reads labels, in any generation, trains on images that the target holds out."""
    target = pair.data.target
    if judging.val is not None:  # nothing is held out of the training images
        return
    generation_roles = [
        (path, generation, role) for path, generation in generations_with_paths(pair) for role in _roles_with_labels(generation)
    ]
    for prefix, generation, role in generation_roles:
        spec: DataSpec = getattr(generation.data, role)
        if spec == target or origin(spec) != origin(target):
            continue
        held = _names(judging, target, "val")
        seen = held & _names(load(spec), spec, "train")
        if seen:
            raise UserError(
                f"{len(seen)} of {counted(len(held), 'image')} that {'judges' if len(held) == 1 else 'judge'} "
                f"{'is' if len(seen) == 1 else 'are'} among the training images of {role}, which reads their labels",
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
    if "labels" in needs:
        _refuse_one_class(data, "teacher.pretext.kind", f"the pretext task {kind!r}", "data.pretext")
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
        if reads_pseudo_labels(spec) and getattr(plugins.module_of("transfer", pair.transfer), "READS_MAPS", False):
            raise UserError(
                f"{spec.kind} judges the pseudo-labels of images, and {pair.transfer.kind!r} makes those of positions",
                where=f"evals.{index}",
                instead="Leave it out.",
            )
        run_plugin_check(f"evals.{index}", "evaluation", spec)
        teacher = pair.teacher
        if (
            spec.of == "teacher"
            and any(map(own_crop_of, teachers_of(pair)))
            and getattr(plugins.module_of("evaluation", spec), "FITS_MASKS", False)
        ):
            raise UserError(
                f"{spec.kind} compares masks with squares of the data, and the teacher crops each image as its weights expect",
                where=f"evals.{index}.of",
                instead="Let it see the squares, teacher.input: data, or judge the student.",
            )
        if spec.of != "teacher" or not isinstance(teacher, HandcraftedTeacher | PrecomputedTeacher):
            continue
        what = "a file of features"
        if isinstance(teacher, HandcraftedTeacher):
            what = f"the descriptor {teacher.descriptor.kind}"
        if reads_network(spec):
            raise UserError(
                f"{spec.kind} needs a network, and the teacher is {what}",
                where=f"evals.{index}.of",
                instead="Judge the student: of: student.",
            )
        if isinstance(teacher, PrecomputedTeacher) and getattr(plugins.module_of("evaluation", spec), "READS_PIXELS", False):
            raise UserError(
                f"{spec.kind} changes the pixels of the images, and the teacher is {what}, which does not follow",
                where=f"evals.{index}.of",
                instead="Judge the student: of: student.",
            )
        if spec.layer is not None:
            raise UserError(
                f"the teacher is {what}, which has no layer {spec.layer!r}",
                where=f"evals.{index}.layer",
                instead="Leave 'layer' out.",
            )
        if getattr(spec, "network_precision", None) is not None:
            raise UserError(
                f"the teacher is {what}, whose features have no network_precision",
                where=f"evals.{index}.network_precision",
                instead="Leave it out.",
            )


@dataclass(frozen=True)
class _Network:
    """A network of a pair, and what it shows of images of which size.

    Attributes:
        image_size: side of the images in pixels; None for that of the data.
    """

    backbone: BackboneSpec
    layer: str | None
    pool: Pooling
    image_size: int | None

    def size(self, of_data: int) -> int:
        """The size of the images that it sees, for data of a size."""
        return self.image_size or of_data


def _network_of(owner: Student | AnyTeachers | None) -> _Network | None:
    """The network of a student or teacher; None for a descriptor and for precomputed features."""
    if isinstance(owner, Student):
        return _Network(owner.backbone, None, Pooling(), owner.image_size)
    if isinstance(owner, NamedTeacher):
        found = timm_weights.find(owner)
        return _Network(found.backbone, timm_weights.layer_of(owner), owner.pool, found.preprocessing.size)
    if isinstance(owner, NetworkTeacher):
        return _Network(owner.backbone, owner.layer, owner.pool, owner.image_size)
    return None


def _check_schedules(pair: PairSpec) -> None:
    """Check that optimisers are installed, and that layer-wise decay finds the layers of its network."""
    student, teacher = pair.student, pair.teacher
    trained = [("student", student.schedule, student.backbone, student.image_size or pair.data.transfer.size)]
    if isinstance(teacher, TrainedTeacher):
        trained.append(("teacher", teacher.schedule, teacher.backbone, teacher.image_size or pair.data.pretext.size))
    for owner, schedule, backbone, size in trained:
        with _errors_inside(owner):
            optimisers.check(schedule)
        if schedule.layer_decay != 1:
            with _errors_at(f"{owner}.schedule.layer_decay", f"the layers of the {backbone.kind} cannot be numbered"):
                _number_layers(backbone, size)


@lru_cache(maxsize=256)
def _number_layers(backbone: BackboneSpec, size: int) -> None:
    optimisers.layer_numbers(loop.untrained_backbone(backbone, 0), size)


def _check_judged_images(pair: PairSpec, target: Splits) -> None:
    """Let evaluations that read more of images than the data have, such as proposals, refuse images without it."""
    parts = split_rows(target, pair.data.target.split)
    for index, spec in enumerate(pair.evals):
        check = getattr(plugins.module_of("evaluation", spec), "check_images", None)
        if check is not None:
            read = [parts[name] for name in ("train", spec.split) if name in parts]
            names = [source.names[row] for source, rows in read for row in rows.tolist()]
            with _errors_at(f"evals.{index}", f"the evaluation {spec.kind} cannot judge these images", spec):
                check(spec, names)


def _check_layers(pair: PairSpec) -> None:
    student, teacher = _network_of(pair.student), _network_of(pair.teacher)
    networks: list[tuple[str, str, _Network | None, str | None]] = []
    if teacher is not None:
        networks.append(("teacher.layer", "teacher", teacher, teacher.layer))
    for index, spec in enumerate(pair.evals):
        networks.append((f"evals.{index}.layer", spec.of, student if spec.of == "student" else teacher, spec.layer))
    for where, owner, network, layer in networks:
        if network is None:
            continue
        with _errors_at(f"{owner}.backbone", f"the {network.backbone.kind} cannot be made"):
            names, others = _layer_names(network.backbone)
        if layer is not None and layer not in (*names, *others):
            raise UserError(
                f"the backbone {network.backbone.kind} has no layer {layer!r}",
                where=where,
                instead=f"It has {', '.join(names)}.",
            )


@lru_cache(maxsize=256)
def _layer_names(backbone: BackboneSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers of a network, and its outputs with other tokens than patches."""
    # Not on torch's meta device, where the first random draw imports torch's compiler, which takes seconds.
    network = timm_weights.built(backbone)
    return tuple(network.layers), extraction.token_layers(network)  # type: ignore[arg-type]


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
            f"{counted(len(both), 'path is', 'paths are')} in data.{first[0]} and in data.{second[0]}, such as {min(both)!r}",
            precomputed.WHERE,
            "Put both data sets below one folder, so that each image has a path of its own.",
        )


_COUNT = 2  # images; batch norm cannot be trained on fewer


def try_networks(pair: PairSpec, cluster_images: int) -> None:
    """Run the networks, descriptors and tasks of a pair on two images.

    Args:
        cluster_images: number of images that a descriptor is fitted to.

    Raises:
        UserError: the first thing that fails, with its dotted path.
    """
    with _one_thread():
        _try(pair, cluster_images)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Two images are too few for several threads, which would mostly wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _try(pair: PairSpec, cluster_images: int) -> None:
    data, teacher, student = pair.data, pair.teacher, pair.student
    sizes = {role: getattr(data, role).size for role in ("pretext", "cluster", "transfer", "target")}
    judged = sizes["target"]
    taught_by, learner = _network_of(teacher), _network_of(student)
    assert learner is not None
    if isinstance(teacher, HandcraftedTeacher):
        _try_descriptor(teacher.descriptor, sizes, cluster_images)
    elif taught_by is not None:
        _try_teacher(teacher, taught_by, sizes)
    if "clusters" in plugins.module_of("transfer", pair.transfer).NEEDS:
        _same_width(teacher, sizes)
    seen = learner.size(sizes["transfer"])
    with _errors_at("student.backbone", f"the {student.backbone.kind} cannot take images of {seen} px"):
        _extract(student.backbone, None, Pooling(), seen)
    shown = None if taught_by is None else (taught_by.layer, taught_by.pool)
    _try_transfer(pair.transfer, shown, student.backbone, seen)
    for index, spec in enumerate(pair.evals):
        if reads_pseudo_labels(spec):
            continue
        network = learner if spec.of == "student" else taught_by
        if network is None:
            continue  # a descriptor, which `_try_descriptor` has tried, or precomputed features
        layer, pool, size = spec.layer, spec.pool, network.size(judged)
        if spec.of == "teacher" and layer is None:
            layer, pool = network.layer, network.pool
        with _errors_at(f"evals.{index}", f"the {network.backbone.kind} cannot take images of {size} px"):
            _extract(network.backbone, layer, pool, size)
        _try_training(index, spec, network.backbone, size)


@lru_cache(maxsize=256)
def _try_transfer(transfer: PluginSpec, teacher: tuple[str | None, Pooling] | None, backbone: BackboneSpec, size: int) -> None:
    """Check that a transfer goes with the teacher and the student, where its module says how (`check_networks`)."""
    check = getattr(plugins.module_of("transfer", transfer), "check_networks", None)
    if check:
        with _errors_at("transfer", f"the transfer {transfer.kind} does not go with these networks", transfer):
            check(transfer, teacher, loop.untrained_backbone(backbone, 0), size)


@lru_cache(maxsize=256)
def _try_training(index: int, spec: EvaluationSpec, backbone: BackboneSpec, size: int) -> None:
    """Check that an evaluation can train on a network, which its `check_network` says."""
    check = getattr(plugins.module_of("evaluation", spec), "check_network", None)
    if check:
        with _errors_at(f"evals.{index}", f"{spec.kind} cannot train the {backbone.kind}"):
            check(spec, loop.untrained_backbone(backbone, 0).eval(), size)


def _try_teacher(teacher: AnyTeachers | None, network: _Network, sizes: dict[str, int]) -> None:
    kind, size = network.backbone.kind, network.size(sizes["pretext"])
    if isinstance(teacher, TrainedTeacher):
        run_plugin_check("teacher.pretext", "pretext", teacher.pretext)
        with _errors_at("teacher.backbone", f"the {kind} cannot learn {teacher.pretext.kind} from images of {size} px"):
            divisible = _learn(teacher.pretext, teacher.backbone, size)
        if teacher.schedule.micro_batch is not None and not divisible:
            raise UserError(
                f"{teacher.pretext.kind} compares all images of a batch with each other, so a batch cannot be cut into "
                f"micro-batches of {teacher.schedule.micro_batch}",
                "teacher.schedule.micro_batch",
                "Leave it out, and use a smaller batch_size.",
            )
    for role in ("cluster", "transfer"):
        size = network.size(sizes[role])
        with _errors_at("teacher", f"the {kind} cannot take images of {size} px"):
            _extract(network.backbone, network.layer, network.pool, size)


def _same_width(teacher: AnyTeachers | None, sizes: dict[str, int]) -> None:
    """Check that clusters are applied to features of the same width as those that they were made of."""
    widths, network = {}, _network_of(teacher)
    for role in ("cluster", "transfer"):
        if isinstance(teacher, HandcraftedTeacher):
            widths[role] = _describe(teacher.descriptor, sizes[role])
        elif network is not None:
            widths[role] = _extract(network.backbone, network.layer, network.pool, network.size(sizes[role]))
    if len(set(widths.values())) > 1:
        raise UserError(
            f"images of {sizes['cluster']} px have {widths['cluster']} features each and those of {sizes['transfer']} px "
            f"{widths['transfer']}, so the clusters of data.cluster cannot be applied to data.transfer",
            "data.transfer.size",
            f"Use {sizes['cluster']} px for both, or a teacher whose features are pooled.",
        )


def _try_descriptor(descriptor: DescriptorSpec, sizes: dict[str, int], count: int) -> None:
    for size in sorted({sizes[role] for role in ("cluster", "transfer", "target")}):
        with _errors_at("teacher.descriptor", f"the descriptor {descriptor.kind} cannot take images of {size} px", descriptor):
            _describe(descriptor, size)
    run_plugin_check("teacher.descriptor", "descriptor", descriptor, sizes["cluster"], count)


def run_plugin_check(path: str, group: str, spec: PluginSpec, *data: int) -> None:
    """Run a plugin's `check` on its spec, if it has one.

    Args:
        path: dotted path of the spec in the pair.
        data: further arguments of `check`, as documented in the group's `__init__`.

    Raises:
        UserError: the plugin rejects its spec.
    """
    check = getattr(plugins.module_of(group, spec), "check", None)
    if check:
        with _errors_at(path, f"the {group} {spec.kind} cannot be made", spec):
            check(spec, *data)


@contextlib.contextmanager
def _errors_at(path: str, failed: str, spec: PluginSpec | None = None) -> Iterator[None]:
    """Turn any error into a UserError with a dotted path; `spec` is that of the plugin that may raise."""
    try:
        yield
    except UserError as error:
        field = error.where.removeprefix("descriptor.")
        parent = _parent_of(spec, field.split(".")[0]) if spec else ""
        where = f"{path.removesuffix('.backbone')}.{parent}{field}" if field else path
        raise UserError(error.problem, where, error.instead) from error
    except Exception as error:  # torch and plugins may raise anything for a pair that does not fit
        message = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{failed}: {message}", path, "Use other images, such as larger ones (data.size), or another form."
        ) from error


def _parent_of(spec: PluginSpec, field: str) -> str:
    """Prefix of `field`, such as ``hog.``, if it belongs to a spec inside the descriptor's; otherwise empty."""
    own = type(spec).model_fields if isinstance(spec, StrictSpec) else {}
    specs = ((name, getattr(spec, name)) for name in own)
    inner = (name for name, part in specs if isinstance(part, StrictSpec) and field in type(part).model_fields)
    return "" if field in own else "".join(f"{name}." for name in list(inner)[:1])


def _pixels(size: int) -> Tensor:
    """Random pixels, (2, size, size, 3) uint8."""
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (_COUNT, size, size, 3), dtype=np.uint8))


def _images(size: int) -> Images:
    pixels = _pixels(size).numpy()
    return Images(_COUNT, size, lambda rows: pixels[rows % _COUNT], np.arange(_COUNT), ("0", "1"), ("0", "1"))


@lru_cache(maxsize=1024)
def _extract(backbone: BackboneSpec, layer: str | None, pool: Pooling, size: int) -> int:
    """Number of features of an image."""
    return _network(backbone, layer, pool)(_pixels(size)).shape[1]


@lru_cache(maxsize=2)  # the sizes for one network are tried in succession
def _network(backbone: BackboneSpec, layer: str | None, pool: Pooling) -> Callable[[Tensor], Tensor]:
    return extraction.layer_extractor(timm_weights.built(backbone), layer, pool)


@lru_cache(maxsize=1024)
def _describe(descriptor: DescriptorSpec, size: int) -> int | None:
    """Number of features of an image; None for a fitted descriptor, where it depends on the fit."""
    module = plugins.module_of("descriptor", descriptor)
    state = None
    if hasattr(module, "fit"):
        if not hasattr(module, "quick"):
            return None  # it may need more than two images
        descriptor = module.quick(descriptor)
        state = module.fit(descriptor, _images(size))
    described = module.describe(descriptor, state, _pixels(size))
    if not bool(torch.isfinite(described).all()):
        raise ValueError("its features are not finite")
    return None if state else int(described.shape[1])


@lru_cache(maxsize=1024)
def _learn(pretext: PretextSpec, backbone: BackboneSpec, size: int) -> bool:
    """One forward pass of the task's model, and its loss; whether its batches can be cut into parts."""
    module = plugins.module_of("pretext", pretext)
    pretext = module.quick(pretext) if hasattr(module, "quick") else pretext
    task = module.task(pretext, size, _images(size)) if hasattr(module, "NEEDS") else module.task(pretext, size)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        network: Any = copy.deepcopy(timm_weights.built(backbone))
        model = nn.ModuleDict({"backbone": network, "head": task.head(network.feature_dim)}).train()
        if task.prepare:
            task.prepare(model)
        inputs, targets = make_batch(task, _pixels(size), torch.arange(_COUNT), torch.Generator().manual_seed(0))
        outputs = task.forward(model, inputs) if task.forward else model["head"](network(inputs))
        task.loss(outputs, targets)
    return bool(task.mean_over_images)
