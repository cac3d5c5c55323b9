"""The stages of a pair in dependency order, and which stage reads which. Each stage itself is defined in `stages/`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from ktray import images, plugins
from ktray.artifact import Stage, kind_and_index, numbered
from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.pipeline.identity import checkpoint_sha256, evaluation_files, features_identity, weights_sha256
from ktray.pipeline.naming import lineage
from ktray.spec import (
    BackboneSpec,
    DataSpec,
    EvaluationSpec,
    HandcraftedTeacher,
    LoadedTeacher,
    NamedTeacher,
    PairSpec,
    PrecomputedTeacher,
    Schedule,
    SeveralTeachers,
    StudentTeacher,
    TeacherSpec,
    TrainedTeacher,
    taught_by_each,
    teachers_of,
)
from ktray.stages import (
    clusters_stage,
    evaluation_stage,
    features_stage,
    images_stage,
    pseudo_labels_stage,
    student_stage,
    teacher_stage,
)
from ktray.training import pretrained, timm_weights

Identity = Callable[[DataSpec], str]
"""Data spec -> sha256 of the data's content."""
MAX_RESUME_KEYS = 400  # of one snapshot; a longer training can resume from fewer epochs
MAX_CACHED_CHAINS = 300
_chain_cache: dict[tuple[str, str], list[Stage]] = {}


@dataclass(frozen=True)
class Graph:
    """The stages of a pair and their keys.

    Attributes:
        stages: every stage once, each after its inputs.
        keys: ``{"teacher": key, ..., "evaluation": {name: key}}``; stages that the pair lacks are absent. Of several
            clusterings the first has ``clusters`` and ``pseudo_labels``, the next ``clusters_2`` and ``pseudo_labels_2``, ...
            With several teachers those of the first come first, and the second has ``teacher_2`` and ``features_2``.
    """

    stages: tuple[Stage, ...]
    keys: Mapping[str, Any]

    def up_to(self, evaluation: str) -> Graph:
        """The stages that one evaluation needs. One that judges the teacher needs neither clusters nor a student."""
        key = self.keys["evaluation"][evaluation]
        kept = {key}
        for stage in reversed(self.stages):
            if stage.key in kept:
                kept |= {*stage.inputs.values(), *stage.resume_from}
        named = {name: own for name, own in self.keys.items() if isinstance(own, str) and own in kept}
        return Graph(tuple(s for s in self.stages if s.key in kept), {**named, "evaluation": {evaluation: key}})

    def student_keys(self) -> set[str]:
        """Keys of the student, of its earlier snapshots in this graph, and of all that reads any of these.

        All other stages come before the student, also those of a student that teaches this one. A search accounts for the cost
        of the two parts separately.
        """
        student = next((stage for stage in self.stages if stage.key == self.keys.get("student")), None)
        found = {student.key, *student.resume_from} & {stage.key for stage in self.stages} if student else set()
        for stage in self.stages:
            if not found.isdisjoint(stage.inputs.values()):
                found.add(stage.key)
        return found

    def metric_prefixes(self) -> dict[str, str]:
        """Key -> prefix of its metrics in the pair: the stage's name, or the evaluation's."""
        prefixes = {key: stage for stage, key in self.keys.items() if isinstance(key, str)}
        return prefixes | {key: name for name, key in self.keys.get("evaluation", {}).items()}


@dataclass
class _Builder:
    pair: PairSpec
    identity: Identity
    milestones: Mapping[str, Sequence[int]]
    generation: str = ""
    teacher_name: str = "teacher"
    stages: dict[str, Stage] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)

    def add(self, stage: Stage) -> str:
        self.stages.setdefault(stage.key, stage)
        return stage.key

    def images(self, role: str, own: images.OwnCrop | None = None) -> str:
        data: DataSpec = getattr(self.pair.data, role)
        return self.add(images_stage.stage_of(data, self.identity(data), own))

    def images_of_teacher(self, role: str) -> str:
        """The images of a role as the teacher takes them: its own crops, if it is one by its name."""
        return self.images(role, own_crop_of(_teacher_of(self.pair) if self.pair.teacher else None))

    def locations(self, role: str) -> dict[str, Any]:
        return images.location_fields(getattr(self.pair.data, role))

    def teacher_input(self) -> dict[str, str]:
        return {"teacher": self.keys["teacher"]} if "teacher" in self.keys else {}


def build(
    pair: PairSpec,
    identity: Identity,
    *,
    epoch: int | None = None,
    evaluations: Sequence[str] | None = None,
    milestones: Mapping[str, Sequence[int]] | None = None,
) -> Graph:
    """The stages of `pair`.

    Args:
        identity: data spec -> sha256 of its content.
        epoch: of the student that is evaluated; None for the last.
        evaluations: names of the evaluations to run; None for all.
        milestones: ``{"teacher": [20, 40], "student": [5, 13]}``: epochs at which training is cut into segments, because other
            trials may share these snapshots. Cuts change no result and no key. ``pair.teacher`` and ``pair.student`` belong to
            the pair whose student teaches, ``pair.pair.student`` to the generation before it, ``teacher_2`` to the second of
            several teachers and ``teacher_2.pair.student`` to a pair whose student that is.
    """
    builder = _Builder(pair, identity, milestones or {})
    _up_to_student(builder, epoch)
    for spec in pair.evals:
        name = evaluation_name(spec)
        if evaluations is None or name in evaluations:
            builder.keys.setdefault("evaluation", {})[name] = _evaluation(builder, spec)
    _share_passes(builder)
    return Graph(tuple(builder.stages.values()), builder.keys)


def own_crop_of(teacher: TeacherSpec | None) -> images.OwnCrop | None:
    """How a pretrained teacher's images are cropped from the originals; None for a teacher that sees those of the data."""
    if not isinstance(teacher, NamedTeacher) or teacher.input == "data":
        return None
    return timm_weights.find(teacher).preprocessing.crop()


def _up_to_student(builder: _Builder, epoch: int | None) -> None:
    """Add all stages up to the student."""
    transfer = plugins.module_of("transfer", builder.pair.transfer)
    counts: dict[str, int] = {}
    for index, each in enumerate(taught_by_each(builder.pair)):
        part = replace(builder, pair=each, teacher_name=numbered("teacher", index), keys={})
        _taught_by_one(part, transfer.NEEDS)
        for name, key in part.keys.items():  # a teacher without a stage of its own leaves out its number
            kind, place = kind_and_index(name)
            first = counts.get(kind, 0) if kind in ("clusters", "pseudo_labels") else index
            builder.keys[numbered(kind, first + place)] = key
        for kind in ("clusters", "pseudo_labels"):
            counts[kind] = sum(kind_and_index(name)[0] == kind for name in builder.keys)
    _student(builder, transfer.NEEDS, epoch)


def _taught_by_one(builder: _Builder, needs: Mapping[str, tuple[str, ...]]) -> None:
    """Add the stages before the student of a pair with one teacher or none."""
    if builder.pair.teacher is not None:
        _teacher(builder, _teacher_of(builder.pair))
    if "clusters" in needs:
        _pseudo_labels(builder)
    elif "features" in needs:
        builder.keys["features"] = _features(builder, "transfer")


def generations(pair: PairSpec) -> tuple[PairSpec, ...]:
    """`pair`, the pairs whose students teach it, and so on to the first."""
    return tuple(each for _, each in generations_with_paths(pair))


def generations_with_paths(pair: PairSpec, path: str = "") -> Iterator[tuple[str, PairSpec]]:
    """The pairs of `generations` with what comes before the names of their fields, such as ``teacher.pair.``."""
    yield path, pair
    several = isinstance(pair.teacher, SeveralTeachers)
    for index, teacher in enumerate(teachers_of(pair)):
        if isinstance(teacher, StudentTeacher):
            yield from generations_with_paths(teacher.pair, f"{path}teacher.{f'several.{index}.' if several else ''}pair.")


def milestone_prefix(path: str) -> str:
    """How `milestones` of `build` name the trainings of a generation: its path of `generations_with_paths`, shortened."""
    steps = path.replace("teacher.several.", "several.").replace("teacher.", "")
    return re.sub(r"several\.(\d+)\.", lambda found: _of_teacher(int(found[1])), steps)


def _of_teacher(index: int) -> str:
    return "" if index == 0 else f"{numbered('teacher', index)}."


def evaluation_name(spec: EvaluationSpec) -> str:
    """The prefix of an evaluation's metrics: its `name`, or its kind."""
    return str(spec.name or spec.kind)


def final_epoch(pair: PairSpec) -> int:
    """The last epoch of the student; 0 for a transfer that trains nothing."""
    trains = hasattr(plugins.module_of("transfer", pair.transfer), "task")
    return pair.student.schedule.epochs if trains else 0


def _training(builder: _Builder, name: str, stage_at: Callable[[int], Stage], schedule: Schedule, last: int) -> str:
    """Add the segments of a training up to epoch `last`, one per milestone before it and the last; the key of the last."""
    milestones = builder.milestones.get(f"{builder.generation}{name}", ())
    cuts = sorted({epoch for epoch in milestones if 0 < epoch < last} | {last})
    # Trials share teachers, and hashing the keys of all their epochs is most of the work of building a graph, so chains are
    # cached. The last stage and the schedule determine all earlier stages.
    end = stage_at(last)
    known = (end.sha256, canonical([end.local, end.about, schedule.model_dump(mode="json"), cuts]))
    if known not in _chain_cache:
        while len(_chain_cache) >= MAX_CACHED_CHAINS:
            del _chain_cache[next(iter(_chain_cache))]
        _chain_cache[known] = _chain(stage_at, cuts)
    return [builder.add(each) for each in _chain_cache[known]][-1]


def _chain(stage_at: Callable[[int], Stage], cuts: Sequence[int]) -> list[Stage]:
    cached_at = lru_cache(maxsize=None)(stage_at)
    chain = []
    for cut in cuts:
        stride = max(1, -(-cut // MAX_RESUME_KEYS))
        earlier = sorted({*range(stride, cut, stride), *(c for c in cuts if c < cut)}, reverse=True)
        chain.append(replace(cached_at(cut), resume_from=tuple(cached_at(epoch).key for epoch in earlier)))
    return chain


def _teacher(builder: _Builder, teacher: TeacherSpec) -> None:
    if isinstance(teacher, TrainedTeacher):
        stage_at = teacher_stage.trained(teacher, builder.images("pretext"), builder.locations("pretext"))
        builder.keys["teacher"] = _training(builder, builder.teacher_name, stage_at, teacher.schedule, teacher.schedule.epochs)
    elif isinstance(teacher, LoadedTeacher):
        in_store = pretrained.ARTIFACT.fullmatch(teacher.checkpoint)
        sha256 = None if in_store else checkpoint_sha256(teacher.checkpoint)
        taken = "" if sha256 is None else _taken(teacher.checkpoint, sha256, teacher.backbone, teacher.key, teacher.prefix)
        builder.keys["teacher"] = builder.add(teacher_stage.loaded(teacher, sha256, taken))
    elif isinstance(teacher, NamedTeacher):
        network = timm_weights.find(teacher)
        builder.keys["teacher"] = builder.add(teacher_stage.named(network, weights_sha256(network.file)))
    elif isinstance(teacher, StudentTeacher):
        several = "" if builder.teacher_name == "teacher" else f"{builder.teacher_name}."
        generation = f"{builder.generation}{several}pair."
        inner = _Builder(teacher.pair, builder.identity, builder.milestones, generation, stages=builder.stages)
        _up_to_student(inner, None)
        builder.keys["teacher"] = inner.keys["student"]
    elif isinstance(teacher, HandcraftedTeacher) and hasattr(plugins.module_of("descriptor", teacher.descriptor), "fit"):
        stage = teacher_stage.fitted(teacher, builder.images("cluster"), builder.locations("cluster"))
        builder.keys["teacher"] = builder.add(stage)


@lru_cache(maxsize=256)
def _taken(checkpoint: str, sha256: str, backbone: BackboneSpec, key: str | None, prefix: str | None) -> str:
    """What a loaded teacher takes from its file, for the record; empty if that fails, which its stage will report."""
    try:
        network, path = pretrained.shapes(backbone), pretrained.checkpoint_path(checkpoint)
        return pretrained.find_weights(network, path, key, prefix).summary()
    except UserError:
        return ""


def _features(builder: _Builder, role: str) -> str:
    inputs = {"images": builder.images_of_teacher(role), **builder.teacher_input()}
    teacher = _teacher_of(builder.pair)
    return builder.add(features_stage.stage_of(teacher, inputs, builder.locations(role), _precomputed_identity(teacher)))


def _teacher_of(pair: PairSpec) -> TeacherSpec:
    if pair.teacher is None or isinstance(pair.teacher, SeveralTeachers):
        raise ValueError(f"one of the stages reads the features of one teacher, and the pair has {len(teachers_of(pair))}")
    return pair.teacher


def _precomputed_identity(teacher: TeacherSpec) -> dict[str, Any] | None:
    return features_identity(teacher) if isinstance(teacher, PrecomputedTeacher) else None


def _pseudo_labels(builder: _Builder) -> None:
    """Add clusters and pseudo-labels for each k, as separate stages that other transfers with the same k share."""
    transfer, keys = builder.pair.transfer, builder.keys
    keys["features"] = _features(builder, "cluster")
    for index, clustering in enumerate(clusters_stage.clusterings(transfer)):
        clusters = builder.add(clusters_stage.stage_of(transfer, clustering, keys["features"]))
        inputs = {
            "features": _features(builder, "transfer"),
            "clusters": clusters,
            "images.transfer": builder.images("transfer"),
        }
        keys[numbered("clusters", index)] = clusters
        stage = pseudo_labels_stage.stage_of(transfer, clustering, inputs, builder.locations("transfer"))
        keys[numbered("pseudo_labels", index)] = builder.add(stage)


def _student(builder: _Builder, needs: Mapping[str, tuple[str, ...]], epoch: int | None) -> None:
    pair, student = builder.pair, builder.pair.student
    last = final_epoch(pair) if epoch is None else min(epoch, final_epoch(pair))
    if last == 0:
        builder.keys["student"] = builder.add(student_stage.untrained(student))
        return
    inputs = {"images.transfer": builder.images("transfer")}
    inputs |= {name: key for name, key in builder.keys.items() if name.startswith(("clusters", "pseudo_labels"))}
    if "features" in needs:
        inputs["features"] = _features(builder, "transfer")
    stage_at = student_stage.trained(student, pair.transfer, inputs, builder.locations("transfer"), lineage(pair.model_dump()))
    builder.keys["student"] = _training(builder, "student", stage_at, student.schedule, last)


def _share_passes(builder: _Builder) -> None:
    """Tell each evaluation which views of the same network the others read, so that one pass can extract them all."""
    found = [(stage, judged) for stage in builder.stages.values() if (judged := _judged_network(stage))]
    groups: dict[str, dict[str, Any]] = {}
    for stage, judged in found:
        view = stage.spec[evaluation_stage.JUDGED]
        groups.setdefault(judged, {})[canonical(view)] = view
    for stage, judged in found:
        own = canonical(stage.spec[evaluation_stage.JUDGED])
        others = tuple(view for name, view in groups[judged].items() if name != own)
        if others:
            builder.stages[stage.key] = replace(stage, other_views=others)


def _judged_network(stage: Stage) -> str:
    """What the views of two evaluations must have in common for one pass to extract both; empty if no network is judged."""
    view = stage.spec[evaluation_stage.JUDGED] if stage.name == "evaluation" else None
    if not view or "backbone" not in view:
        return ""
    common = {name: value for name, value in view.items() if name not in ("layer", "pool")}
    return canonical([stage.inputs, common])


def _evaluation(builder: _Builder, spec: EvaluationSpec) -> str:
    pair, keys = builder.pair, builder.keys
    of_teacher = spec.of == "teacher" and not evaluation_stage.reads_pseudo_labels(spec)
    inputs = {"images.target": builder.images_of_teacher("target") if of_teacher else builder.images("target")}
    locations = {"images.target": builder.locations("target")}
    if evaluation_stage.reads_pseudo_labels(spec):
        if "pseudo_labels" in keys:
            inputs |= {"pseudo_labels": keys["pseudo_labels"], "images.transfer": builder.images("transfer")}
            locations["images.transfer"] = builder.locations("transfer")
        else:
            inputs["student"] = keys["student"]
        return builder.add(evaluation_stage.stage_of(spec, None, inputs, locations, None))
    if of_teacher:
        inputs |= builder.teacher_input()
        teacher = _teacher_of(pair)
        identity = _precomputed_identity(teacher)
        return builder.add(evaluation_stage.stage_of(spec, teacher, inputs, locations, identity, evaluation_files(spec)))
    inputs["student"] = keys["student"]
    return builder.add(evaluation_stage.stage_of(spec, pair.student, inputs, locations, None, evaluation_files(spec)))
