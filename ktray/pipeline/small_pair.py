"""A pair in small: every stage of it on a few images for one epoch, under keys that no real stage can have."""

from __future__ import annotations

from typing import Any

from ktray.artifact import Stage
from ktray.pipeline import pair_graph
from ktray.pipeline.pair_graph import Identity
from ktray.spec import PairSpec

LEAST = 256  # images: enough for the parts of a fitted descriptor and for a few of every usual class
MARK = "rehearsal"


def sample_size(pair: PairSpec) -> int:
    """How many images of each split a rehearsal takes: a batch of every training, and enough for its PCA."""
    wanted = [LEAST]
    for each in pair_graph.generations(pair):
        spec: Any = each
        wanted += [spec.student.schedule.batch_size, 2 * (getattr(spec.transfer, "pca", None) or 0)]
        if hasattr(spec.teacher, "schedule"):
            wanted.append(spec.teacher.schedule.batch_size)
    return int(max(wanted))


def in_small(pair: PairSpec, count: int) -> PairSpec:
    """The same networks and methods: one epoch of each training, and no more clusters than a quarter of the images."""
    return PairSpec.model_validate(_shrunk(pair.model_dump(mode="json"), max(2, count // 4)))


def _shrunk(plain: dict[str, Any], most: int) -> dict[str, Any]:
    """A pair as plain data, and the pair whose student teaches it, with at most so many clusters or anchors."""
    for part in ("teacher", "student"):
        schedule = (plain[part] or {}).get("schedule")
        if schedule:
            schedule |= {"epochs": 1, "warmup": 0.0}
    if "pair" in (plain["teacher"] or {}):
        plain["teacher"]["pair"] = _shrunk(plain["teacher"]["pair"], most)
    transfer = plain["transfer"]
    if isinstance(transfer.get("k"), list):
        transfer["k"] = _apart(transfer["k"], most)
    most_of = {"k": most, "anchors": most, "min_size": 2}
    for field in most_of.keys() & transfer.keys():
        if not isinstance(transfer[field], list):
            transfer[field] = min(transfer[field], most_of[field])
    if "neighbours" in transfer:
        transfer["neighbours"] = min(transfer["neighbours"], transfer["k"])
    return plain


def _apart(numbers: list[int], most: int) -> list[int]:
    """The numbers, none above `most` and no two the same, because each is a head of its own."""
    found: list[int] = []
    for number in numbers:
        found.append(next(each for each in range(min(number, most), 1, -1) if each not in found))
    return found


def sample_stages(pair: PairSpec, identity: Identity) -> list[Stage]:
    """The stages of a pair in small, inputs before those that read them. The mark in each spec sets its key apart."""
    count = sample_size(pair)
    renamed: dict[str, str] = {}
    stages = []
    for stage in pair_graph.build(in_small(pair, count), identity).stages:
        inputs = {role: renamed.get(key, key) for role, key in stage.inputs.items()}
        local = {**stage.local, "sample": count} if stage.name == "images" else stage.local
        marked = Stage(stage.name, {**stage.spec, MARK: count}, stage.revisions, inputs, (), local)
        renamed[stage.key] = marked.key
        stages.append(marked)
    return stages
