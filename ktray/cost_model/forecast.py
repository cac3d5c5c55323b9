"""What draws take at full size, forecast from their rehearsal: seconds and bytes of each stage, scaled by what they grow with.

Rough, and rather too much: what a stage takes to start is scaled as if it were work. Seconds of kinds of stages that the
store's records know are learned from these instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.cost_model.stage_costs import learned
from ktray.stages.images_stage import DRY_RUN
from ktray.stores import Store

PER_IMAGE = ("images", "features", "pseudo_labels")  # stages whose files grow with the number of images
SHEETS = (".png",)  # these do not


@dataclass(frozen=True)
class FullSizeStages:
    """What a rehearsal is in small.

    Attributes:
        draws: name of a draw -> its stages at full size, one for each in small and in their order.
        images: key of a data set's images -> how many are for training, and how many there are in all.
        expected: name of a stage -> how many different artifacts of it are to be expected; {} for those of these draws.
    """

    draws: Mapping[str, Sequence[Stage]]
    images: Mapping[str, tuple[int, int]]
    expected: Mapping[str, float]


@dataclass(frozen=True)
class Forecast:
    """What is to be expected.

    Attributes:
        seconds: of all stages, one after the other, each training to its last epoch.
        bytes: of all artifacts on disk.
        pair_bytes: of those of the largest of the draws, as if nothing of it were there.
        stages: name of a stage -> `expected` artifacts, mean `whole_seconds` and `whole_bytes` of one; what the store has
            already takes none.
    """

    seconds: float
    bytes: int
    pair_bytes: int
    stages: Mapping[str, Mapping[str, float]]


def forecast(small: Mapping[str, Sequence[Stage]], wanted: FullSizeStages, store: Store, real: Store) -> Forecast:
    """Scale what was rehearsed.

    Args:
        small: name of a draw -> its rehearsed stages.
        store: where the rehearsal has published.
        real: where the draws at full size will be, and what was learned of stages like them.
    """
    whole = {name: dict(_scaled(stages, wanted, name, store)) for name, stages in small.items()}
    scaled = {key: sizes for of_draw in whole.values() for key, sizes in of_draw.items()}
    costs = learned(real)
    known = {key: sec for stages in wanted.draws.values() for key, sec in costs.each(stages).items()}
    taken: dict[str, dict[str, tuple[float, float]]] = {}
    for stage in (each for stages in wanted.draws.values() for each in stages if each.key in scaled):
        seconds, size = scaled[stage.key]
        seconds = seconds if costs.learned(stage.name) is None else known[stage.key]
        taken.setdefault(stage.name, {})[stage.key] = (0.0, 0.0) if real.find(stage.key) else (seconds, size)
    rows = {
        name: {
            "expected": wanted.expected.get(name, float(len(of_kind))),
            "whole_seconds": round(sum(seconds for seconds, _ in of_kind.values()) / len(of_kind), 3),
            "whole_bytes": round(sum(size for _, size in of_kind.values()) / len(of_kind)),
        }
        for name, of_kind in taken.items()
    }
    largest = max((sum(size for _, size in sizes.values()) for sizes in whole.values()), default=0.0)
    return Forecast(
        round(sum(row["expected"] * row["whole_seconds"] for row in rows.values()), 1),
        round(sum(row["expected"] * row["whole_bytes"] for row in rows.values())),
        round(largest),
        rows,
    )


def _scaled(
    small: Sequence[Stage], wanted: FullSizeStages, name: str, store: Store
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Key at full size -> seconds and bytes, of the stages of a draw that were rehearsed."""
    if len(small) != len(wanted.draws[name]):
        return  # two trainings of a chain that differ in nothing but their epochs are one in small
    known = {stage.key: stage for stage in (*small, *wanted.draws[name])}
    for few, full in zip(small, wanted.draws[name], strict=True):
        artifact = store.find(few.key)
        if artifact is not None:
            images = _more_images(few, full, artifact, known, wanted.images)
            clusters = _clusters(full, known) / _clusters(few, known)
            yield (
                full.key,
                (
                    artifact.record["seconds"] * images * clusters * _more_rounds(full, artifact),
                    _bytes(artifact, images, clusters),
                ),
            )


def _more_images(
    few: Stage, full: Stage, artifact: Artifact, known: Mapping[str, Stage], counts: Mapping[str, tuple[int, int]]
) -> float:
    """How many times as many images the stage reads; of several data sets the one where that is most."""
    if full.name == "images":
        return max(1.0, counts[full.key][1] / max(1.0, artifact.metrics["count"]))
    read = [known[key] for key in full.inputs.values() if key in known]
    read += [known[key] for each in read if each.name == "features" for key in each.inputs.values() if key in known]
    times = [counts[each.key][0] / few.spec[DRY_RUN] for each in read if each.name == "images"]
    return max([1.0, *times])


def _clusters(stage: Stage, known: Mapping[str, Stage]) -> float:
    """K of the clusters that a stage makes or assigns; 1 of every other one."""
    made = known.get(stage.inputs.get("clusters", ""), stage) if stage.name == "pseudo_labels" else stage
    return float(made.spec["k"]) if made.name == "clusters" else 1.0


def _more_rounds(full: Stage, artifact: Artifact) -> float:
    """How many times as often the stage goes over its images: epochs of a training, iterations of k-means."""
    if full.name == "clusters":
        return max(1.0, full.spec["iterations"] / max(1.0, artifact.metrics["iterations"]))
    return max(1.0, float(full.spec.get("epoch", 1)))


def _bytes(artifact: Artifact, images: float, clusters: float) -> float:
    files: Mapping[str, Any] = artifact.record["files"]
    if artifact.record["stage"] in PER_IMAGE:
        return sum(entry["size"] * (1.0 if name.endswith(SHEETS) else images) for name, entry in files.items())
    if artifact.record["stage"] == "clusters":
        return sum(entry["size"] * (clusters if name == "centroids.npy" else 1.0) for name, entry in files.items())
    return float(sum(entry["size"] for entry in files.values()))
