"""A pair in small: every stage of it on a few images for one epoch, under keys that no real stage can have."""

from __future__ import annotations

from typing import Any

from ktray.artifact import Stage
from ktray.pipeline import graph as graphs
from ktray.pipeline.graph import Identity
from ktray.spec import PairSpec

LEAST = 256  # images: enough for the parts of a fitted descriptor and for a few of every usual class
MARK = "rehearsal"


def sample_size(pair: PairSpec) -> int:
    """How many images of each split a rehearsal takes: a batch of either training, and enough for its PCA."""
    spec: Any = pair
    batches = [spec.student.schedule.batch_size]
    if hasattr(spec.teacher, "schedule"):
        batches.append(spec.teacher.schedule.batch_size)
    return int(max(LEAST, *batches, 2 * (getattr(spec.transfer, "pca", None) or 0)))


def in_small(pair: PairSpec, count: int) -> PairSpec:
    """The same networks and methods: one epoch of each training, and no more clusters than a quarter of the images."""
    plain = pair.model_dump(mode="json")
    for part in ("teacher", "student"):
        schedule = (plain[part] or {}).get("schedule")
        if schedule:
            schedule |= {"epochs": 1, "warmup": 0.0}
    transfer = plain["transfer"]
    if "k" in transfer:
        transfer["k"] = max(2, min(transfer["k"], count // 4))
    if "min_size" in transfer:
        transfer["min_size"] = min(transfer["min_size"], 2)
    return PairSpec.model_validate(plain)


def sample_stages(pair: PairSpec, identity: Identity) -> list[Stage]:
    """The stages of a pair in small, inputs before those that read them. The mark in each spec sets its key apart."""
    count = sample_size(pair)
    renamed: dict[str, str] = {}
    stages = []
    for stage in graphs.build(in_small(pair, count), identity).stages:
        inputs = {role: renamed.get(key, key) for role, key in stage.inputs.items()}
        local = {**stage.local, "sample": count} if stage.name == "images" else stage.local
        marked = Stage(stage.name, {**stage.spec, MARK: count}, stage.revisions, inputs, (), local)
        renamed[stage.key] = marked.key
        stages.append(marked)
    return stages
