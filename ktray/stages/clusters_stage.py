"""Cluster features by k-means, after the projection that the transfer asks for."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ktray import plugins
from ktray.artifact import Artifact, Stage
from ktray.clustering import kmeans, projection
from ktray.features import extraction
from ktray.pool import StageContext
from ktray.spec import TransferSpec

IDENTITY, REVISION = "stage.clusters", 1
TOOLS = (kmeans, projection)


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

    The centroids are `codebook.npz` on their grid, as labels are made from, and `centroids.npy` (K, d) as float32, to look at.
    """
    spec, shards = stage.spec, extraction.shards(inputs["features"].directory)
    project = projection.fit(
        shards, l2=spec["l2"], pca=spec["pca"], whiten=spec["whiten"], l2_after=spec["l2_after"], pool=context.pool
    )
    found = kmeans.fit(
        shards,
        spec["k"],
        seed=spec["seed"],
        iterations=spec["iterations"],
        projection=project,
        pool=context.pool,
        device=context.device,
        on_iteration=lambda iteration, inertia: context.progress(
            {"iteration": iteration, "of": spec["iterations"], "inertia": inertia}
        ),
    )
    found.codebook.save(out / "codebook.npz")
    np.save(out / "centroids.npy", found.centroids)
    np.savez(out / "projection.npz", **project)  # type: ignore[arg-type]
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
