"""Metrics and cost of a pair, read from its published stages."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ktray.artifact import Artifact, kind_of
from ktray.stores import Store, intact_file_or_none
from ktray.text import some_of

if TYPE_CHECKING:  # it imports torch
    from ktray.pipeline.pair_graph import Graph


def published_artifacts(graph: Graph, store: Store) -> dict[str, Artifact] | None:
    """Key -> artifact of every stage if all are published, else None."""
    found: dict[str, Artifact] = {}
    for stage in graph.stages:
        artifact = store.find(stage.key)
        if artifact is None:
            return None
        found[stage.key] = artifact
    return found


def metrics(graph: Graph, artifacts: Mapping[str, Artifact]) -> dict[str, float]:
    """``{"knn/top1": ..., "clusters/inertia": ..., "cost/seconds": ...}`` of a pair whose stages are all published."""
    merged = {
        f"{prefix}/{name}": value
        for key, prefix in graph.metric_prefixes().items()
        for name, value in artifacts[key].metrics.items()
    }
    return merged | {"cost/seconds": cost_seconds(graph, artifacts)}


def cost_seconds(graph: Graph, artifacts: Mapping[str, Artifact]) -> float:
    """Seconds that the pair would have cost alone, summed over stages. A snapshot's record includes its earlier segments."""
    intermediate = {key for stage in graph.stages for key in stage.resume_from}
    return float(sum(artifacts[s.key].record["seconds_alone"] for s in graph.stages if s.key not in intermediate))


def count_by_stage(keys: Iterable[str]) -> dict[str, int]:
    """Stage name -> number of distinct keys."""
    counts: dict[str, int] = {}
    for key in sorted(set(keys)):
        stage = kind_of(key)
        counts[stage] = counts.get(stage, 0) + 1
    return counts


def unreadable_images(keys: Iterable[str], store: Store) -> list[str]:
    """A sentence about each data set with unreadable images that one of the artifacts `keys` read."""
    artifacts = [artifact for artifact in map(store.find, sorted(set(keys))) if artifact]
    read = {key for artifact in artifacts for key in artifact.record["inputs"].values() if key.startswith("images-")}
    found = []
    for images in filter(None, map(store.find, sorted(read))):
        count = int(images.metrics["unreadable"])
        if count:
            path = intact_file_or_none(images, "splits.json")
            listed = json.loads(path.read_text())["unreadable"] if path else []
            first = ", ".join(f"{entry['name']} ({entry['why']})" for entry in listed[:3])
            total = count + int(images.metrics["count"])
            which = f": {first}{', ...' if count > 3 else ''}" if listed else ""
            unreadable = some_of(count, total, "image", ("was", "were"))
            found.append(f"{unreadable} unreadable and left out{which}")
    return found


def learning_curve(artifact: Artifact) -> list[dict[str, Any]]:
    """Rows (one per epoch) of a training artifact's learning curve; empty for other stages, and where it is damaged."""
    if not (artifact.directory / "history.parquet").exists():
        return []
    path = intact_file_or_none(artifact, "history.parquet")
    if path is None:
        return []
    import pyarrow.parquet as parquet

    rows: list[dict[str, Any]] = parquet.ParquetFile(path).read().to_pylist()  # `read_table` imports pandas
    return rows


def prefixed_curve(artifact: Artifact, prefix: str) -> list[dict[str, Any]]:
    """`learning_curve` with ``PREFIX/`` before the name of each metric, as trackers take it; ``epoch`` keeps its name."""
    return [
        {name if name == "epoch" else f"{prefix}/{name}": value for name, value in row.items()}
        for row in learning_curve(artifact)
    ]
