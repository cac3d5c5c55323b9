"""Readable names of pairs, such as ``rotation-alexnet/conv4 k=50 -> alexnet w0.25``; they tell apart, they identify nothing."""

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
    """Where the teacher comes from, its network and its layer; empty for a pair without a teacher.

    ``rotation-resnet18/layer3`` (trained), ``hog`` (handcrafted), ``dino-resnet50/layer4`` (loaded from a file ``dino.pt``).
    """
    teacher = pair.get("teacher")
    if not teacher:
        return ""
    if "descriptor" in teacher:
        return _kind(teacher["descriptor"])
    origin = _kind(teacher["pretext"]) if "pretext" in teacher else PurePath(teacher["checkpoint"]).stem
    name = f"{origin}-{backbone_name(teacher['backbone']).replace(' ', '-')}"
    return f"{name}/{teacher['layer']}" if teacher.get("layer") else name


def transfer_name(pair: Pair) -> str:
    """``k=50`` for clusters, else the kind of the transfer, with its k where it has one."""
    transfer = pair["transfer"]
    kind = _kind(transfer)
    k = transfer.get("k") if isinstance(transfer, Mapping) else None
    if k is None:
        return kind
    return f"k={k}" if kind == "clusters" else f"{kind} k={k}"


def student_name(pair: Pair) -> str:
    """The student's network: ``alexnet w0.25``, ``resnet18``."""
    return backbone_name(pair["student"]["backbone"])


def backbone_name(backbone: Mapping[str, Any] | str) -> str:
    """Kind and depth, then what is unusual: a model's name, a form other than ``small``, a width other than 1."""
    if isinstance(backbone, str):
        return backbone
    extras = [str(backbone[field]) for field in ("name", "model") if backbone.get(field)]
    if backbone.get("form", "small") != "small":
        extras.append(str(backbone["form"]))
    if backbone.get("width", 1) != 1:
        extras.append(f"w{backbone['width']:g}")
    return " ".join([f"{_kind(backbone)}{backbone.get('depth', '')}", *extras])


def _kind(value: Mapping[str, Any] | str) -> str:
    return value if isinstance(value, str) else str(value["kind"])
