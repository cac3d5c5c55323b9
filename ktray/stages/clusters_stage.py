"""Cluster features by k-means, after the projection that the transfer asks for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import conditions, fingerprint, plugins
from ktray.artifact import Artifact, Stage
from ktray.checkpoints import saving
from ktray.clustering import kmeans, position_rows, projection
from ktray.features import extraction
from ktray.pool import StageContext
from ktray.spec import TransferSpec

IDENTITY, REVISION = "stage.clusters", 1
TOOLS = (kmeans, projection)
TOOLS_OF_SOME = (position_rows,)  # in the keys of clusters of positions

LABELS = "labels.npy"
_PROJECTION, _STATE = "projection.npz", "iterations.npz"
_KEPT_BYTES = 64 << 20  # of a projection that stays in memory: 4,096 directions of 4,096 features

_latest_projection: dict[Any, tuple[dict[str, NDArray[Any]], float]] = {}
"""Of this process: features and steps -> projection and the seconds that it took, at most one."""


@dataclass(frozen=True)
class Clustering:
    """One clustering that a transfer asks for.

    Attributes:
        k: number of clusters.
        rows: what is clustered instead of the features of images, as plain data; empty for these.
    """

    k: int
    rows: Mapping[str, Any]

    @property
    def revisions(self) -> dict[str, int]:
        """Revisions of what makes the rows."""
        return plugins.revisions(position_rows) if self.rows else {}


def clusterings(transfer: TransferSpec) -> tuple[Clustering, ...]:
    """The clusterings that a transfer by clusters asks for: one per k, or of positions and of whole images."""
    values = vars(transfer)
    k = values["k"]  # every transfer has it whose NEEDS name "clusters"
    if "grid" not in values:
        return tuple(Clustering(each, {}) for each in (k if isinstance(k, tuple) else (k,)))
    grid, whole = values["grid"], values["whole"]
    positions = Clustering(k, {"of": "positions", "grid": grid, "sample": values["sample"]})
    return (positions, *([] if whole is None else [Clustering(whole, {"of": "means", "grid": grid})]))


def stage_of(transfer: TransferSpec, clustering: Clustering, features: str) -> Stage:
    """The stage that makes the clusters of a clustering of a transfer.

    Args:
        features: key of the features that are clustered.
    """
    hashed_fields = set(plugins.module_of("transfer", transfer).NEEDS["clusters"]) - {"grid", "sample", "whole"}
    rows = {"rows": dict(clustering.rows)} if clustering.rows else {}
    spec = {**transfer.model_dump(include=hashed_fields), "k": clustering.k, **rows}
    revisions = {**plugins.revisions(sys.modules[__name__]), **clustering.revisions}
    return Stage("clusters", spec, revisions, {"features": features})


@contextmanager
def rows_of(shards: Sequence[Path], spec: Mapping[str, Any], out: Path, seed: int | None = None) -> Iterator[Sequence[Path]]:
    """The files of what is clustered: the features of images, or rows that are made of them within a `with`.

    Args:
        spec: of a stage, whose `rows` say what; see `Clustering`.
        seed: of the sample of positions; None for all positions.
    """
    rows = spec.get("rows")
    if not rows:
        yield shards
        return
    sample = None if seed is None or "sample" not in rows else (rows["sample"], seed)
    with position_rows.position_files(shards, rows["grid"], out, sample, rows["of"] == "means") as files:
        yield files


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write the centroids, `projection.npz` and `iterations.json`. Inertia is the mean squared distance.

    A checkpoint holds the projection and the state of the iterations, from which a later attempt goes on with the same result.
    The centroids are `codebook.npz` on their grid, as labels are made from, and `centroids.npy` (K, d) as float32, to look at.
    `labels.npy` (N,) int32 has the clusters of the features themselves, unless other rows were made of them.
    """
    spec, shards = stage.spec, extraction.shards(inputs["features"].directory)
    with rows_of(shards, spec, out, spec["seed"]) as rows:
        project = projection.load(start / _PROJECTION) if start else _fitted(rows, spec, context)
        checkpoint = saving(out, context.checkpoint_seconds, start)

        def save(updates: int, write: Callable[[Path], None]) -> None:
            def fill(directory: Path) -> None:
                np.savez(directory / _PROJECTION, **project)  # type: ignore[arg-type]
                write(directory / _STATE)

            checkpoint(updates, fill)

        found = kmeans.fit(
            rows,
            spec["k"],
            seed=spec["seed"],
            iterations=spec["iterations"],
            projection=project,
            pool=context.pool,
            device=context.device,
            on_iteration=_reporting(spec["iterations"], context),
            start=start / _STATE if start else None,
            save=save,
        )

    found.codebook.save(out / "codebook.npz")
    np.save(out / "centroids.npy", found.centroids)
    if not spec.get("rows"):
        np.save(out / LABELS, found.labels)
    np.savez(out / _PROJECTION, **project)  # type: ignore[arg-type]
    curve = [{"iteration": i, "inertia": inertia} for i, inertia in enumerate(found.inertia)]  # 0: of the seeds
    (out / "iterations.json").write_text(json.dumps({"inertia": curve, "repaired": list(found.empty)}))
    return {
        "inertia": float(found.inertia[-1]),
        "iterations": float(found.iterations),
        "rotation": float(project["rotation"]),
        "empty": float((found.sizes == 0).sum()),
        "repaired": float(sum(found.empty)),
        "decided_again": found.decided_again,
        "largest_share": float(found.sizes.max() / found.sizes.sum()),
    }


def _fitted(shards: Sequence[Path], spec: Mapping[str, Any], context: StageContext) -> dict[str, NDArray[Any]]:
    """The projection; that of the clustering before if it was of the same features, as one of several k mostly is.

    Workers take stages whose inputs they know, so one of them often makes all clusterings of the same features.
    """
    steps = {name: spec[name] for name in ("l2", "pca", "whiten", "l2_after")}
    key = (*((str(shard), fingerprint.file_version(shard.stat())) for shard in shards), *steps.items())
    if key in _latest_projection:
        kept, seconds = _latest_projection[key]
        conditions.note(conditions.KEPT_PROJECTION, {"seconds": seconds})
        return kept
    _latest_projection.clear()
    began = time.perf_counter()
    fitted = projection.fit(shards, **steps, pool=context.pool, device=context.device)
    if sum(each.nbytes for each in fitted.values()) <= _KEPT_BYTES:
        _latest_projection[key] = fitted, round(time.perf_counter() - began, 3)
    return fitted


def _reporting(iterations: int, context: StageContext) -> Callable[[int, float], None]:
    """Reports every iteration, with the seconds that the others take if none converges before, at the mean pace so far."""
    first: list[tuple[int, float]] = []

    def report(iteration: int, inertia: float) -> None:
        now = time.monotonic()
        values = {"iteration": iteration, "of": iterations, "inertia": inertia}
        if first:
            done, began = first[0]
            values["seconds_left"] = round((now - began) / (iteration - done) * (iterations - iteration), 1)
        else:
            first.append((iteration, now))
        context.progress(values)

    return report
