"""Cluster features by k-means, after the projection that the transfer asks for."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import plugins
from ktray.artifact import Artifact, Stage
from ktray.checkpoints import saving
from ktray.clustering import kmeans, projection
from ktray.features import extraction
from ktray.pool import StageContext
from ktray.spec import TransferSpec

IDENTITY, REVISION = "stage.clusters", 1
TOOLS = (kmeans, projection)

_PROJECTION, _STATE = "projection.npz", "iterations.npz"


def numbers_of_clusters(transfer: TransferSpec) -> tuple[int, ...]:
    """The k of each clustering that a transfer by clusters asks for."""
    k = vars(transfer)["k"]  # every transfer has it whose NEEDS name "clusters"
    return k if isinstance(k, tuple) else (k,)


def stage_of(transfer: TransferSpec, k: int, features: str) -> Stage:
    """The stage that makes `k` clusters for a transfer.

    Args:
        features: key of the features that are clustered.
    """
    fields = plugins.module_of("transfer", transfer).NEEDS["clusters"]
    spec = {**transfer.model_dump(include=set(fields)), "k": k}
    return Stage("clusters", spec, plugins.revisions(sys.modules[__name__]), {"features": features})


def run(
    stage: Stage, inputs: Mapping[str, Artifact], out: Path, context: StageContext, start: Path | None
) -> Mapping[str, float]:
    """Write the centroids, `projection.npz` and `iterations.json`. Inertia is the mean squared distance.

    A checkpoint holds the projection and the state of the iterations, from which a later attempt goes on with the same result.
    The centroids are `codebook.npz` on their grid, as labels are made from, and `centroids.npy` (K, d) as float32, to look at.
    """
    spec, shards = stage.spec, extraction.shards(inputs["features"].directory)
    project = projection.load(start / _PROJECTION) if start else _fitted(shards, spec, context)
    checkpoint = saving(out, context.checkpoint_seconds, start)

    def save(updates: int, write: Callable[[Path], None]) -> None:
        def fill(directory: Path) -> None:
            np.savez(directory / _PROJECTION, **project)  # type: ignore[arg-type]
            write(directory / _STATE)

        checkpoint(updates, fill)

    found = kmeans.fit(
        shards,
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
    np.savez(out / _PROJECTION, **project)  # type: ignore[arg-type]
    rows = [{"iteration": i, "inertia": inertia} for i, inertia in enumerate(found.inertia)]  # 0: of the seeds
    (out / "iterations.json").write_text(json.dumps({"inertia": rows, "repaired": list(found.empty)}))
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
    steps = {name: spec[name] for name in ("l2", "pca", "whiten", "l2_after")}
    return projection.fit(shards, **steps, pool=context.pool)


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
