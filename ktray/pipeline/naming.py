"""Readable names of pairs, such as ``rotation-alexnet/conv4 k=50 -> alexnet w0.25``; for display only, not unique."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

Pair = Mapping[str, Any]
"""A `PairSpec` as plain data, defaults included or not."""


def pair_name(pair: Pair) -> str:
    """Teacher, transfer and student: ``hog k=100 -> resnet18``, ``none -> alexnet w0.25`` for a transfer without a teacher."""
    parts = [teacher_name(pair), transfer_name(pair)]
    return f"{' '.join(filter(None, parts))} -> {student_name(pair)}"


def teacher_name(pair: Pair) -> str:
    """The teacher's origin, network and layer; empty for a pair without a teacher.

    ``rotation-resnet18/layer3`` (trained), ``hog``, ``random_network/conv3`` (handcrafted),
    ``dino-resnet50/layer4`` (loaded from a file ``dino.pt``), ``vit_base_patch16_224.mae/cls`` (by its name), ``clip.npy``
    (precomputed), ``(hog k=50 -> resnet18)/layer3`` (the student of a pair), ``hog + clip.npy`` (several).
    """
    teacher = pair.get("teacher")
    if not teacher:
        return ""
    if "several" in teacher:
        return " + ".join(teacher_name({"teacher": each}) for each in teacher["several"] if each)
    if "descriptor" in teacher:
        return _descriptor_name(teacher["descriptor"])
    if "features" in teacher:
        return PurePath(teacher["features"]).name
    if teacher.get("timm"):
        return _with_layer(
            str(teacher["timm"]), {"layer": "/".join(filter(None, (teacher.get("layer"), teacher.get("tokens"))))}
        )
    if "pair" in teacher:
        return _with_layer(f"({pair_name(teacher['pair'])})", teacher)
    origin = _kind(teacher["pretext"]) if "pretext" in teacher else PurePath(teacher["checkpoint"]).stem
    return _with_layer(f"{origin}-{backbone_name(teacher['backbone']).replace(' ', '-')}", teacher)


def lineage(pair: Pair) -> str:
    """The student and its chain of teachers, back to the first; in brackets the transfer of each step.

    ``alexnet (k=50), taught by resnet18/layer3 (k=100), taught by hog``, ``alexnet (labels)``.
    """
    return f"{student_name(pair)} {_taught(pair)}"


def _taught(pair: Pair) -> str:
    teacher = pair.get("teacher") or {}
    by = " and by ".join(filter(None, map(_lineage_of_teacher, teacher.get("several", [teacher]))))
    return f"({transfer_name(pair)})" + (f", taught by {by}" if by else "")


def _lineage_of_teacher(teacher: Mapping[str, Any] | None) -> str:
    if teacher and "pair" in teacher:
        return f"{_with_layer(student_name(teacher['pair']), teacher)} {_taught(teacher['pair'])}"
    return teacher_name({"teacher": teacher})


def transfer_name(pair: Pair) -> str:
    """``k=50`` or ``k=50+200`` for clusters; otherwise the kind of the transfer, with its k if it has one."""
    transfer = pair["transfer"]
    kind = _kind(transfer)
    k = transfer.get("k") if isinstance(transfer, Mapping) else None
    if k is None:
        return kind
    k = "+".join(map(str, k)) if isinstance(k, list | tuple) else k
    return f"k={k}" if kind == "clusters" else f"{kind} k={k}"


def student_name(pair: Pair) -> str:
    """The student's network: ``alexnet w0.25``, ``resnet18``."""
    return backbone_name(pair["student"]["backbone"])


def stage_name(stage: str, spec: Mapping[str, Any]) -> str:
    """A stage and its main fields: ``clusters k=50``, ``student alexnet w0.25 to epoch 4``, ``evaluation knn``.

    Args:
        spec: of the stage, as in its record.
    """
    if stage == "clusters":
        return f"clusters k={spec['k']}"
    names = [_kind(spec["pretext"])] if "pretext" in spec else [str(spec["kind"])] if "kind" in spec else []
    if "features" in spec:
        names.append("ready-made")
    if "descriptor" in spec:
        names.append(_descriptor_name(spec["descriptor"]))
    elif stage != "evaluation" and "backbone" in spec:
        names.append(backbone_name(spec["backbone"]))
    name = " ".join([stage, *names])
    if spec.get("layer"):
        name += f"/{spec['layer']}"
    return f"{name} to epoch {spec['epoch']}" if spec.get("epoch") else name


def backbone_name(backbone: Mapping[str, Any] | str) -> str:
    """Kind and depth, then what is not the default: a model's name or size, a form other than ``small``, the width."""
    if isinstance(backbone, str):
        return backbone
    extras = [str(backbone[field]) for field in ("name", "model", "size") if backbone.get(field)]
    if backbone.get("form", "small") != "small":
        extras.append(str(backbone["form"]))
    if backbone.get("width", 1) != 1:
        extras.append(f"w{backbone['width']:g}")
    return " ".join([f"{_kind(backbone)}{backbone.get('depth', '')}", *extras])


def _descriptor_name(descriptor: Mapping[str, Any] | str) -> str:
    return _with_layer(_kind(descriptor), descriptor if isinstance(descriptor, Mapping) else {})


def _with_layer(name: str, of: Mapping[str, Any]) -> str:
    return f"{name}/{of['layer']}" if of.get("layer") else name


def _kind(value: Mapping[str, Any] | str) -> str:
    return value if isinstance(value, str) else str(value["kind"])
