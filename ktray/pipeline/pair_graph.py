"""The stages of a pair, in dependency order, each with the slice of the spec that determines it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from ktray import images, plugins
from ktray.artifact import Stage, numbered
from ktray.clustering import kmeans, projection, pseudo_labelling
from ktray.features import extraction, precomputed
from ktray.fingerprint import canonical
from ktray.ops import augmentation
from ktray.pipeline.identity import checkpoint_sha256, features_identity
from ktray.pipeline.naming import lineage
from ktray.spec import (
    HandcraftedTeacher,
    LoadedTeacher,
    PairSpec,
    PrecomputedTeacher,
    Schedule,
    StudentTeacher,
    TrainedTeacher,
)
from ktray.stages import MODULES
from ktray.strict import StrictSpec
from ktray.training import loop, pretrained

Identity = Callable[[StrictSpec], str]
"""Data spec -> sha256 of the data's content."""
MOST_STARTS = 400
MOST_CHAINS = 300
_chains: dict[tuple[str, str], list[Stage]] = {}
_PLAIN_LABELS = {"min_size": 1, "small": "drop", "neighbours": 0}  # of a transfer that has no such field


@dataclass(frozen=True)
class Graph:
    """What has to exist before a pair is judged.

    Attributes:
        stages: every stage once, inputs before those who read them.
        keys: ``{"teacher": key, ..., "evaluation": {name: key}}``; stages that the pair lacks are absent. Of several
            clusterings the first has ``clusters`` and ``pseudo_labels``, the next ``clusters_2`` and ``pseudo_labels_2``, ...
    """

    stages: tuple[Stage, ...]
    keys: Mapping[str, Any]

    def up_to(self, evaluation: str) -> Graph:
        """The part of it that one evaluation rests on: of one that judges the teacher neither clusters nor a student."""
        key = self.keys["evaluation"][evaluation]
        kept = {key}
        for stage in reversed(self.stages):
            if stage.key in kept:
                kept |= {*stage.inputs.values(), *stage.starts}
        named = {name: own for name, own in self.keys.items() if isinstance(own, str) and own in kept}
        return Graph(tuple(s for s in self.stages if s.key in kept), {**named, "evaluation": {evaluation: key}})

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
    stages: dict[str, Stage] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)

    def add(self, stage: Stage) -> str:
        self.stages.setdefault(stage.key, stage)
        return stage.key

    def data(self, *roles: str) -> dict[str, Any]:
        return {role: images.located(getattr(self.pair.data, role)).model_dump() for role in roles}

    def images(self, role: str) -> str:
        return self.add(images_stage(getattr(self.pair.data, role), self.identity))


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
        epoch: the student is wanted at the end of this epoch; None for its last.
        evaluations: names of the evaluations to run; None for all.
        milestones: ``{"teacher": [20, 40], "student": [5, 13]}``: epochs where training is cut into segments because somebody
            else wants, or may want, that snapshot. Cuts change no result and no key. ``pair.teacher`` and ``pair.student`` are
            those of the pair whose student teaches, ``pair.pair.student`` is one generation further back.
    """
    builder = _Builder(pair, identity, milestones or {})
    _taught(builder, epoch)
    for spec in pair.evals:
        name = evaluation_name(spec)
        if evaluations is None or name in evaluations:
            builder.keys.setdefault("evaluation", {})[name] = _evaluation(builder, spec)
    return Graph(tuple(builder.stages.values()), builder.keys)


def _taught(builder: _Builder, epoch: int | None) -> None:
    """All stages up to the student."""
    pair = builder.pair
    transfer = plugins.module_of("transfer", pair.transfer)
    if pair.teacher is not None:
        _teacher(builder, pair.teacher)
    if "clusters" in transfer.NEEDS:
        _pseudo_labels(builder, transfer.NEEDS)
    elif "features" in transfer.NEEDS:
        builder.keys["features"] = _features(builder, "transfer")
    _student(builder, transfer, epoch)


def images_stage(spec: StrictSpec, identity: Identity) -> Stage:
    """The stage that decodes a data set; where the data lies is no part of its identity, its content is."""
    module = plugins.module_of("dataset", spec)
    what = spec.model_dump(exclude=set(module.LOCATION)) | {"content": identity(spec)}
    return Stage("images", what, _revisions("images", spec, images), local={"data": images.located(spec).model_dump()})


def generations(pair: PairSpec) -> tuple[PairSpec, ...]:
    """`pair`, the pair whose student teaches it, and so on to the first."""
    teacher = pair.teacher
    return (pair, *generations(teacher.pair)) if isinstance(teacher, StudentTeacher) else (pair,)


def evaluation_name(spec: Any) -> str:
    """The prefix of an evaluation's metrics: its `name`, or its kind."""
    return str(spec.name or spec.kind)


def final_epoch(pair: PairSpec) -> int:
    """The last epoch of the student; 0 for a transfer that trains nothing."""
    trains = hasattr(plugins.module_of("transfer", pair.transfer), "task")
    return pair.student.schedule.epochs if trains else 0


def _revisions(stage: str, *methods: StrictSpec | ModuleType) -> dict[str, int]:
    """Revisions of the module that does the stage of this name, and of the methods that it is given."""
    return _revisions_of(MODULES[stage], *methods)


def _revisions_of(*sources: StrictSpec | ModuleType) -> dict[str, int]:
    """Revisions of the given tools, of every plugin in the specs, however deep, and of the `TOOLS` that any of them names."""
    found: dict[str, int] = {}
    for source in sources:
        module = source if isinstance(source, ModuleType) else sys.modules[type(source).__module__]
        if hasattr(module, "REVISION"):
            found[plugins.identity_name(module)] = module.REVISION
        found |= _revisions_of(*getattr(module, "TOOLS", ()))
        if isinstance(source, StrictSpec):
            fields = (getattr(source, name) for name in type(source).model_fields)
            found |= _revisions_of(*(value for value in fields if isinstance(value, StrictSpec)))
    return found


def _training(builder: _Builder, name: str, stage: Callable[[int], Stage], schedule: Schedule, last: int) -> str:
    """The chain of segments up to epoch `last`; only milestones before it become stages of their own."""
    milestones = builder.milestones.get(f"{builder.generation}{name}", ())
    cuts = sorted({epoch for epoch in milestones if 0 < epoch < last} | {last})
    # Trials share teachers, and the keys of all epochs of one are most of the work of building a graph.
    known = (stage(last).sha256, canonical([stage(last).local, schedule.model_dump(mode="json"), cuts]))
    if known not in _chains:
        while len(_chains) >= MOST_CHAINS:
            del _chains[next(iter(_chains))]
        _chains[known] = _chain(stage, cuts)
    return [builder.add(each) for each in _chains[known]][-1]


def _chain(stage: Callable[[int], Stage], cuts: Sequence[int]) -> list[Stage]:
    at = lru_cache(maxsize=None)(stage)
    chain = []
    for cut in cuts:
        stride = max(1, -(-cut // MOST_STARTS))
        earlier = sorted({*range(stride, cut, stride), *(c for c in cuts if c < cut)}, reverse=True)
        chain.append(_with_starts(at(cut), tuple(at(epoch).key for epoch in earlier)))
    return chain


def _with_starts(stage: Stage, starts: tuple[str, ...]) -> Stage:
    return Stage(stage.name, stage.spec, stage.revisions, stage.inputs, starts, stage.local)


def _teacher(builder: _Builder, teacher: StrictSpec) -> None:
    if isinstance(teacher, TrainedTeacher):
        inputs = {"images.pretext": builder.images("pretext")}
        what = {"pretext": teacher.pretext.model_dump(), "backbone": teacher.backbone.model_dump(), "seed": teacher.seed}
        revisions = _revisions("teacher", teacher.pretext, teacher.backbone, loop, augmentation)
        local = {"data": builder.data("pretext"), "schedule": teacher.schedule.model_dump()}

        def at(epoch: int) -> Stage:
            sliced = {**what, "epoch": epoch, "schedule": loop.snapshot_slice(teacher.schedule, epoch)}
            return Stage("teacher", sliced, revisions, inputs, local=local)

        builder.keys["teacher"] = _training(builder, "teacher", at, teacher.schedule, teacher.schedule.epochs)
    elif isinstance(teacher, LoadedTeacher):
        builder.keys["teacher"] = builder.add(_loaded(teacher))
    elif isinstance(teacher, StudentTeacher):
        before = f"{builder.generation}pair."
        inner = _Builder(teacher.pair, builder.identity, builder.milestones, before, builder.stages)
        _taught(inner, None)
        builder.keys["teacher"] = inner.keys["student"]
    elif isinstance(teacher, HandcraftedTeacher) and hasattr(plugins.module_of("descriptor", teacher.descriptor), "fit"):
        inputs = {"images.cluster": builder.images("cluster")}
        what = {"descriptor": teacher.descriptor.model_dump()}
        revisions = _revisions("teacher", teacher.descriptor)
        builder.keys["teacher"] = builder.add(
            Stage("teacher", what, revisions, inputs, local={"data": builder.data("cluster")})
        )


def _loaded(teacher: LoadedTeacher) -> Stage:
    """Weights from a file or folder, identified by their content, or from an artifact, which this graph does not make."""
    backbone, revisions = teacher.backbone.model_dump(), _revisions("teacher", teacher.backbone, loop)
    if pretrained.ARTIFACT.fullmatch(teacher.checkpoint):
        inputs = {"snapshot": teacher.checkpoint}
        return Stage("teacher", {"checkpoint": teacher.checkpoint, "backbone": backbone}, revisions, inputs)
    what = {"checkpoint": checkpoint_sha256(teacher.checkpoint), "backbone": backbone}
    return Stage("teacher", what, revisions, local={"checkpoint": str(Path(teacher.checkpoint).absolute())})


def _teacher_view(teacher: StrictSpec) -> dict[str, Any]:
    """The fields of a teacher that its features depend on beyond its weights."""
    if isinstance(teacher, HandcraftedTeacher):
        return {"descriptor": teacher.descriptor.model_dump()}
    if isinstance(teacher, PrecomputedTeacher):
        return {"features": features_identity(teacher)}
    network: Any = teacher
    normalize = {"normalize": teacher.normalize} if isinstance(teacher, LoadedTeacher) else {}
    return {"backbone": network.backbone.model_dump(), "layer": network.layer, "pool": network.pool.model_dump(), **normalize}


def _features(builder: _Builder, role: str) -> str:
    teacher: Any = builder.pair.teacher
    inputs = {"images": builder.images(role)}
    if "teacher" in builder.keys:
        inputs["teacher"] = builder.keys["teacher"]
    what = {**_teacher_view(teacher), "dtype": teacher.dtype}
    local = {"teacher": _located(teacher), "data": builder.data(role)[role]}
    varies = ("layer", "pool") if "layer" in what else ()  # a forward pass brings every layer
    revisions = _revisions("features", _method(teacher), extraction, augmentation)
    return builder.add(Stage("features", what, revisions, inputs, local=local, varies=varies))


def _method(teacher: Any) -> StrictSpec | ModuleType:
    """What gives the features of a teacher their meaning."""
    if isinstance(teacher, PrecomputedTeacher):
        return precomputed
    method: StrictSpec = teacher.descriptor if isinstance(teacher, HandcraftedTeacher) else teacher.backbone
    return method


def _located(teacher: StrictSpec) -> dict[str, Any]:
    """The teacher as plain data, with the files of ready-made features where any worker finds them."""
    files = precomputed.files(teacher) if isinstance(teacher, PrecomputedTeacher) else {}
    return teacher.model_dump() | {field: str(path) for field, path in files.items()}


def _pseudo_labels(builder: _Builder, needs: Mapping[str, tuple[str, ...]]) -> None:
    """Clusters and pseudo-labels of each k: stages of their own, which another transfer with that k shares."""
    transfer, keys = builder.pair.transfer.model_dump(), builder.keys
    keys["features"] = _features(builder, "cluster")
    k = transfer["k"]
    for place, clusters in enumerate(k if isinstance(k, list | tuple) else (k,)):
        what = {name: transfer[name] for name in needs["clusters"]} | {"k": clusters}
        revisions = _revisions("clusters", kmeans, projection)
        made = builder.add(Stage("clusters", what, revisions, {"features": keys["features"]}))
        inputs = {
            "features": _features(builder, "transfer"),
            "clusters": made,
            "images.transfer": builder.images("transfer"),
        }
        what = _PLAIN_LABELS | {name: transfer[name] for name in needs["pseudo_labels"]}
        revisions = _revisions("pseudo_labels", kmeans, projection, pseudo_labelling)
        stage = Stage("pseudo_labels", what, revisions, inputs, local={"data": builder.data("transfer")})
        keys[numbered("clusters", place)] = made
        keys[numbered("pseudo_labels", place)] = builder.add(stage)


def _student(builder: _Builder, transfer: Any, epoch: int | None) -> None:
    pair, student = builder.pair, builder.pair.student
    inputs = {"images.transfer": builder.images("transfer")}
    inputs |= {name: key for name, key in builder.keys.items() if name.startswith(("clusters", "pseudo_labels"))}
    if "features" in transfer.NEEDS:
        inputs["features"] = _features(builder, "transfer")
    elsewhere = {name for fields in transfer.NEEDS.values() for name in fields}
    what = {
        "backbone": student.backbone.model_dump(),
        "augment": student.augment.model_dump(),
        "seed": student.seed,
        "transfer": pair.transfer.model_dump(exclude=elsewhere),
    }
    revisions = _revisions("student", pair.transfer, student.backbone, loop, augmentation)
    schedule = student.schedule
    local = {
        "data": builder.data("transfer"),
        "schedule": schedule.model_dump(),
        "transfer": pair.transfer.model_dump(),
    }

    taught = {**local, "lineage": lineage(pair.model_dump())}

    def at(epoch: int) -> Stage:
        sliced = {**what, "epoch": epoch, "schedule": loop.snapshot_slice(schedule, epoch)}
        return Stage("student", sliced, revisions, inputs, local=taught)

    last = final_epoch(pair) if epoch is None else min(epoch, final_epoch(pair))
    if last == 0:
        # A student as drawn is the same whatever the schedule and the augmentation would have been.
        drawn = {"backbone": what["backbone"], "seed": student.seed, "epoch": 0}
        stage = Stage("student", drawn, _revisions("student", student.backbone, loop), local=local)
        builder.keys["student"] = builder.add(stage)
    else:
        builder.keys["student"] = _training(builder, "student", at, schedule, last)


def _evaluation(builder: _Builder, spec: Any) -> str:
    pair, keys = builder.pair, builder.keys
    module = plugins.module_of("evaluation", spec)
    what = spec.model_dump(exclude={"name"})
    local: dict[str, Any] = {"evaluation": spec.model_dump(), "judges": spec.of}
    inputs = {"images.target": builder.images("target")}
    methods: list[StrictSpec | ModuleType] = [spec]
    roles = ["target"]
    if getattr(module, "READS_PSEUDO_LABELS", False):
        if "pseudo_labels" in keys:
            inputs |= {"pseudo_labels": keys["pseudo_labels"], "images.transfer": builder.images("transfer")}
            roles.append("transfer")
        else:
            inputs["student"] = keys["student"]
    elif spec.of == "teacher":
        teacher: Any = pair.teacher
        if "teacher" in keys:
            inputs["teacher"] = keys["teacher"]
        seen = _located(teacher) | ({"layer": spec.layer, "pool": spec.pool.model_dump()} if spec.layer else {})
        local["teacher"] = seen
        view = _teacher_view(teacher)
        what["teacher"] = view | ({"layer": spec.layer, "pool": spec.pool.model_dump()} if spec.layer else {})
        methods.append(_method(teacher))
    else:
        inputs["student"] = keys["student"]
        what["backbone"] = pair.student.backbone.model_dump()
        methods.append(pair.student.backbone)
    local["data"] = builder.data(*roles)
    revisions = _revisions("evaluation", *methods, extraction, augmentation)
    return builder.add(Stage("evaluation", what, revisions, inputs, local=local))
