"""What a search takes at full size, forecast from its dry run: the seconds and bytes of each stage.

Each stage of a dry run is an observation of its stage at full size, scaled in proportion to images, epochs, k-means iterations
and k. That is rough, and rather too much: the time to start is scaled as if it were work. Of kinds of stages that the store has
records of, the cost model forecasts the seconds from these instead; of all others from the observations.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ktray.artifact import Artifact, Stage
from ktray.cost_model.stage_costs import learn_from
from ktray.stages.images_stage import DRY_RUN
from ktray.stores import Store

PER_IMAGE = ("images", "features", "pseudo_labels")  # stages whose files grow with the number of images,
SHEETS = (".png",)  # except for these files


@dataclass(frozen=True)
class FullSizeStages:
    """What a dry run is the small form of.

    Attributes:
        draws: name of a draw -> its stages at full size, one for each of the dry run and in the same order.
        images: key of a data set's images -> how many are for training, and how many there are in all.
        expected: kind of stage -> how many different artifacts of it are to be expected; {} for those of these draws.
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
        pair_bytes: of those of the largest of the draws, as if none of them were there.
        stages: kind of stage -> `expected` artifacts, mean `whole_seconds` and `whole_bytes` of one; what the store has
            already takes none.
    """

    seconds: float
    bytes: int
    pair_bytes: int
    stages: Mapping[str, Mapping[str, float]]


class _Observation(NamedTuple):
    """A stage at full size, as its dry run makes expect."""

    stage: Stage
    seconds: float
    bytes: float


def forecast(small: Mapping[str, Sequence[Stage]], full: FullSizeStages, dry_run_store: Store, store: Store) -> Forecast:
    """Scale what a dry run has recorded.

    Args:
        small: name of a draw -> its stages in the dry run.
        dry_run_store: where the dry run has published.
        store: where the artifacts at full size will be; its records teach the cost model.
    """
    observed = {name: list(_observations(stages, full, name, dry_run_store)) for name, stages in small.items()}
    observations = {each.stage.key: each for of_draw in observed.values() for each in of_draw}
    seconds = _expected_seconds(full, observations, store)
    by_kind: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for key in (stage.key for stages in full.draws.values() for stage in stages if stage.key in observations):
        there = store.find(key) is not None
        by_kind[observations[key].stage.name][key] = (0.0, 0.0) if there else (seconds[key], observations[key].bytes)
    rows = {
        kind: {
            "expected": full.expected.get(kind, float(len(sizes))),
            "whole_seconds": round(sum(seconds for seconds, _ in sizes.values()) / len(sizes), 3),
            "whole_bytes": round(sum(size for _, size in sizes.values()) / len(sizes)),
        }
        for kind, sizes in by_kind.items()
    }
    largest = max((sum(each.bytes for each in of_draw) for of_draw in observed.values()), default=0.0)
    return Forecast(
        round(sum(row["expected"] * row["whole_seconds"] for row in rows.values()), 1),
        round(sum(row["expected"] * row["whole_bytes"] for row in rows.values())),
        round(largest),
        rows,
    )


def _expected_seconds(full: FullSizeStages, observations: Mapping[str, _Observation], store: Store) -> dict[str, float]:
    """Key -> seconds at full size: what was observed where the store has no record of the kind, else the cost model's."""
    model = learn_from(store)
    found: dict[str, float] = {}
    for stages in full.draws.values():
        found |= model.predict(stages)
    return found | {key: each.seconds for key, each in observations.items() if not model.has_records(each.stage.name)}


def _observations(small: Sequence[Stage], full: FullSizeStages, draw: str, dry_run_store: Store) -> Iterator[_Observation]:
    """Of the stages of a draw that its dry run has published."""
    if len(small) != len(full.draws[draw]):
        return  # two trainings of a chain that differ in nothing but their epochs are one in small
    known = {stage.key: stage for stage in (*small, *full.draws[draw])}
    for small_stage, stage in zip(small, full.draws[draw], strict=True):
        artifact = dry_run_store.find(small_stage.key)
        if artifact is not None:
            images = _images_ratio(small_stage, stage, artifact, known, full.images)
            clusters = _clusters(stage, known) / _clusters(small_stage, known)
            seconds = artifact.record["seconds"] * images * clusters * _passes_ratio(stage, artifact)
            yield _Observation(stage, seconds, _bytes(artifact, images, clusters))


def _images_ratio(
    small: Stage, full: Stage, artifact: Artifact, known: Mapping[str, Stage], counts: Mapping[str, tuple[int, int]]
) -> float:
    """How many times as many images the stage reads at full size; of several data sets the largest ratio."""
    if full.name == "images":
        return max(1.0, counts[full.key][1] / max(1.0, artifact.metrics["count"]))
    read = [known[key] for key in full.inputs.values() if key in known]
    read += [known[key] for each in read if each.name == "features" for key in each.inputs.values() if key in known]
    ratios = (float(counts[each.key][0] / small.spec[DRY_RUN]) for each in read if each.name == "images")
    return max([1.0, *ratios])


def _clusters(stage: Stage, known: Mapping[str, Stage]) -> float:
    """K of the clusters that a stage makes or assigns; 1 of every other stage."""
    clustering = known.get(stage.inputs.get("clusters", ""), stage) if stage.name == "pseudo_labels" else stage
    return float(clustering.spec["k"]) if clustering.name == "clusters" else 1.0


def _passes_ratio(full: Stage, artifact: Artifact) -> float:
    """How many times as often the stage goes over its images: epochs of a training, iterations of k-means."""
    if full.name == "clusters":
        return max(1.0, float(full.spec["iterations"]) / max(1.0, artifact.metrics["iterations"]))
    return max(1.0, float(full.spec.get("epoch", 1)))


def _bytes(artifact: Artifact, images: float, clusters: float) -> float:
    """Bytes of the artifact at full size, given how many times as many images and clusters there are."""
    sizes: dict[str, int] = {name: entry["size"] for name, entry in artifact.record["files"].items()}
    if artifact.record["stage"] in PER_IMAGE:
        return sum(size * (1.0 if name.endswith(SHEETS) else images) for name, size in sizes.items())
    if artifact.record["stage"] == "clusters":
        return sum(size * (clusters if name == "centroids.npy" else 1.0) for name, size in sizes.items())
    return float(sum(sizes.values()))
