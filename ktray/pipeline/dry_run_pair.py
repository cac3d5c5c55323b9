"""The pair of a dry run: every stage on a few images for one epoch, under keys that no real stage can have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ktray.artifact import Stage
from ktray.pipeline import pair_graph
from ktray.pipeline.pair_graph import Identity
from ktray.spec import PairSpec
from ktray.stages.images_stage import DRY_RUN

MIN_IMAGES = 256  # enough to fit a descriptor, and for several images of each class in most data sets


def sample_size(pair: PairSpec) -> int:
    """Number of images of each split in a dry run: at least one batch of every training, and enough for its PCA."""
    sizes = [MIN_IMAGES]
    for generation in pair_graph.generations(pair):
        sizes += [generation.student.schedule.batch_size, 2 * (getattr(generation.transfer, "pca", None) or 0)]
        schedule = getattr(generation.teacher, "schedule", None)
        if schedule:
            sizes.append(schedule.batch_size)
    return max(sizes)


def small_pair(pair: PairSpec, count: int) -> PairSpec:
    """The same networks and methods, with one epoch of each training and at most `count` / 4 clusters.

    Args:
        count: number of images.
    """
    return PairSpec.model_validate(_shrunk(pair.model_dump(mode="json"), max(2, count // 4)))


def _shrunk(plain: dict[str, Any], limit: int) -> dict[str, Any]:
    """The plain data of a pair, and of the pair whose student teaches it, with at most `limit` clusters or anchors."""
    for part in ("teacher", "student"):
        schedule = (plain[part] or {}).get("schedule")
        if schedule:
            schedule |= {"epochs": 1, "warmup": 0.0}
    if "pair" in (plain["teacher"] or {}):
        plain["teacher"]["pair"] = _shrunk(plain["teacher"]["pair"], limit)
    transfer = plain["transfer"]
    if isinstance(transfer.get("k"), list):
        transfer["k"] = _distinct(transfer["k"], limit)
    limits = {"k": limit, "anchors": limit, "min_size": 2}
    for field in limits.keys() & transfer.keys():
        if not isinstance(transfer[field], list):
            transfer[field] = min(transfer[field], limits[field])
    if "neighbours" in transfer:
        transfer["neighbours"] = min(transfer["neighbours"], transfer["k"])
    return plain


def _distinct(numbers: list[int], limit: int) -> list[int]:
    """The numbers, reduced to at most `limit` and kept distinct, because each has a head of its own."""
    found: list[int] = []
    for number in numbers:
        found.append(next(smaller for smaller in range(min(number, limit), 1, -1) if smaller not in found))
    return found


def dry_run_stages(pair: PairSpec, identity: Identity) -> list[Stage]:
    """The stages of a pair's dry run, each after its inputs. `DRY_RUN` in every spec keeps their keys apart from real ones."""
    count = sample_size(pair)
    key_in_dry_run: dict[str, str] = {}
    stages = []
    for stage in pair_graph.build(small_pair(pair, count), identity).stages:
        inputs = {role: key_in_dry_run.get(key, key) for role, key in stage.inputs.items()}
        small = replace(stage, spec={**stage.spec, DRY_RUN: count}, inputs=inputs, resume_from=(), varying_fields=())
        key_in_dry_run[stage.key] = small.key
        stages.append(small)
    return stages
