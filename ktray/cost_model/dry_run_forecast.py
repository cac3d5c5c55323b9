"""Forecasts the seconds and bytes of each stage of a search at full size from its dry run.

The record of each stage of a dry run is scaled in proportion to images, epochs, k-means iterations and k. This is rough and
rather too high, since the start-up time is scaled as well. For kinds of stages with records in the store, the seconds come from
the cost model instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ktray.artifact import Artifact, Stage
from ktray.cost_model.stage_costs import learn_from, passes
from ktray.stages.images_stage import DRY_RUN
from ktray.stores import Store

PER_IMAGE = ("images", "features", "pseudo_labels")  # stages whose files grow with the number of images,
SHEETS = (".png",)  # except for these files


@dataclass(frozen=True)
class FullSizeStages:
    """The stages at full size that a dry run stands for.

    Attributes:
        draws: name of a draw -> its stages at full size, one for each stage of the dry run and in the same order.
        images: key of a data set's images -> number of training images, number of all images.
        expected: kind of stage -> expected number of different artifacts; {}: only those of these draws.
    """

    draws: Mapping[str, Sequence[Stage]]
    images: Mapping[str, tuple[int, int]]
    expected: Mapping[str, float]


@dataclass(frozen=True)
class Forecast:
    """The forecast for a search at full size.

    Attributes:
        seconds: of all stages, run one after the other, each training to its last epoch.
        bytes: of all artifacts on disk.
        pair_bytes: of the artifacts of the largest draw, as if the store had none of them.
        stages: kind of stage -> `expected` artifacts, and mean `whole_seconds` and `whole_bytes` of one artifact; those that
            the store already has count as zero.
    """

    seconds: float
    bytes: int
    pair_bytes: int
    stages: Mapping[str, Mapping[str, float]]


class _Observation(NamedTuple):
    """A stage at full size with seconds and bytes scaled from its dry run."""

    stage: Stage
    seconds: float
    bytes: float


def forecast(small: Mapping[str, Sequence[Stage]], full: FullSizeStages, dry_run_store: Store, store: Store) -> Forecast:
    """Scale the records of a dry run to full size.

    Args:
        small: name of a draw -> its stages in the dry run.
        dry_run_store: store with the artifacts of the dry run.
        store: store for the artifacts at full size; the cost model learns from its records.
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
    """Key -> seconds at full size: from the cost model for kinds with records in the store, else scaled from the dry run."""
    model = learn_from(store)
    found: dict[str, float] = {}
    for stages in full.draws.values():
        found |= model.predict(stages)
    return found | {key: each.seconds for key, each in observations.items() if not model.has_records(each.stage.name)}


def _observations(small: Sequence[Stage], full: FullSizeStages, draw: str, dry_run_store: Store) -> Iterator[_Observation]:
    """Yield an observation for each stage of a draw that its dry run has published."""
    if len(small) != len(full.draws[draw]):
        return  # two trainings of a chain that differ only in epochs are one stage in the dry run
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
    """Ratio of the numbers of images that the stage reads at full size and in the dry run; the largest of several data sets."""
    if "steps" in full.spec:  # so many, however many images there are
        return 1.0
    if full.name == "images":
        return max(1.0, counts[full.key][1] / max(1.0, artifact.metrics["count"]))
    read = [known[key] for key in full.inputs.values() if key in known]
    read += [known[key] for each in read if each.name == "features" for key in each.inputs.values() if key in known]
    ratios = (float(counts[each.key][0] / small.spec[DRY_RUN]) for each in read if each.name == "images")
    return max([1.0, *ratios])


def _clusters(stage: Stage, known: Mapping[str, Stage]) -> float:
    """Number of clusters that a stage fits or assigns; 1 for every other stage."""
    clustering = known.get(stage.inputs.get("clusters", ""), stage) if stage.name == "pseudo_labels" else stage
    return float(clustering.spec["k"]) if clustering.name == "clusters" else 1.0


def _passes_ratio(full: Stage, artifact: Artifact) -> float:
    """Ratio of the numbers of passes over the images or of steps: of a training, of an evaluation that trains, of k-means."""
    if full.name == "clusters":
        return max(1.0, float(full.spec["iterations"]) / max(1.0, artifact.metrics["iterations"]))
    small = artifact.record["spec"] if full.name == "evaluation" else {}
    return max(1.0, (passes(full.spec) or 1.0) / (passes(small) or 1.0))


def _bytes(artifact: Artifact, images: float, clusters: float) -> float:
    """Bytes of the artifact at full size, given the ratios of images and of clusters."""
    sizes: dict[str, int] = {name: entry["size"] for name, entry in artifact.record["files"].items()}
    if artifact.record["stage"] in PER_IMAGE:
        return sum(size * (1.0 if name.endswith(SHEETS) else images) for name, size in sizes.items())
    if artifact.record["stage"] == "clusters":
        return sum(size * (clusters if name in ("centroids.npy", "codebook.npz") else 1.0) for name, size in sizes.items())
    return float(sum(sizes.values()))
