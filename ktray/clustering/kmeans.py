"""Lloyd's k-means over shards of features: the same bits with any number of workers, in any order of execution.

Three things make that true. The label of a row depends on the row and the centroids alone (`nearest_centroids`). The rows are
centred and rounded to multiples of a power of two, so coarse that float64 sums of all of them are exact: 2**-31 of the
largest value for a million rows, below float32's own rounding of all but tiny values. So sums over any grouping agree, each
worker sends one partial sum however many shards it holds, and only rows that changed their label need to be added. And the
seeds are row numbers drawn from (seed, N).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import fingerprint, progress
from ktray.clustering import lloyd, nearest_centroids, projection
from ktray.clustering.lloyd import Centroids, ClusteringSpace, SumChange
from ktray.clustering.projection import apply, finite_rows
from ktray.pool import Pool

IDENTITY, REVISION = "kmeans", 2
TOOLS = (projection, nearest_centroids)


@dataclass(frozen=True)
class Clusters:
    """A finished k-means.

    Attributes:
        centroids: (K, d) float32, in the projected space.
        inertia: mean squared distance of the rows to their centroid: of the seeds, then after each update.
        empty: clusters without a row, at the same times; `fit` repairs them with the next update.
        sizes: (K,) int64, rows of each cluster under `centroids`.
        iterations: updates made, len(inertia) - 1.
        converged: the last update changed no label.
    """

    centroids: NDArray[np.float32]
    inertia: tuple[float, ...]
    empty: tuple[int, ...]
    sizes: NDArray[np.int64]
    iterations: int
    converged: bool


def fit(
    shards: Sequence[Path],
    k: int,
    *,
    seed: int,
    iterations: int,
    projection: Mapping[str, NDArray[Any]],
    pool: Pool,
    on_iteration: Callable[[int, float], None] | None = None,
) -> Clusters:
    """K clusters of all rows by Lloyd's iteration from K random rows, until no label changes.

    A row equally near to two centroids belongs to the first. An empty cluster takes over the row that is farthest from its
    centroid (the first in shard order where equal); several take rows that differ, never the only row of a cluster, and the
    donor's mean is corrected. A cluster that finds none keeps its centroid and is repaired after the next assignment.

    Args:
        shards: files of (n, D) float32 or float16 features; their order numbers the rows.
        k: number of clusters, 1 <= k <= N.
        seed: of the K initial rows.
        iterations: most updates to make, >= 0.
        projection: from `projection.fit`, or empty.
        on_iteration: called with (updates so far, inertia) after every assignment.

    Raises:
        ValueError: k > N, fewer than k distinct rows, a feature is not finite, or all rows are equal.

    Source: Lloyd, Least squares quantization in PCM, IEEE Trans. Inf. Theory 28(2), 1982.
    """
    if k < 1:
        raise ValueError(f"k = {k}: there is at least one cluster")
    space, counts = _survey(shards, projection, pool)
    total = sum(counts)
    if k > total:
        raise ValueError(f"k = {k} clusters need at least as many rows; the features have {total}")
    seeds = _gather(shards, counts, seed_rows(total, k, seed), space, pool)
    found = _iterated(seeds, _groups(shards, pool), iterations, space, pool, on_iteration)
    pool.map(lloyd.release_cache, range(pool.workers), space.key)
    return found


def _iterated(
    seeds: NDArray[np.float32],
    groups: list[list[Path]],
    iterations: int,
    space: ClusteringSpace,
    pool: Pool,
    on_iteration: Callable[[int, float], None] | None,
) -> Clusters:
    centroids, before = Centroids.of(seeds, space), None
    sums, sizes = np.zeros(seeds.shape), np.zeros(len(seeds), np.int64)
    inertia: list[float] = []
    empty: list[int] = []
    while True:
        changes = pool.map(lloyd.sum_change, groups, (space, centroids, before))
        for change in changes:
            sums, sizes = sums + change.sums, sizes + change.counts
        inertia.append(_inertia(changes, sums, sizes, centroids.values))
        empty.append(int((sizes == 0).sum()))
        if on_iteration:
            on_iteration(len(inertia) - 1, inertia[-1])
        converged = before is not None and not empty[-1] and not sum(change.relabelled for change in changes)
        if converged or len(inertia) > iterations:
            lifted = (space.centre.astype(np.float64) + centroids.values).astype(np.float32)
            return Clusters(lifted, tuple(inertia), tuple(empty), sizes, len(inertia) - 1, converged)
        repaired_sums, repaired_sizes = _repaired(sums, sizes, centroids, groups, space, pool) if empty[-1] else (sums, sizes)
        before, centroids = centroids, Centroids.of(_means(repaired_sums, repaired_sizes, centroids.values), space)


def seed_rows(count: int, k: int, seed: int) -> NDArray[np.int64]:
    """The k distinct row numbers in [0, count) that k-means starts from: (k,) int64, a function of the arguments alone."""
    return np.random.default_rng(fingerprint.seed_of(seed, "centroids", count)).choice(count, k, replace=False)


def assign(rows: NDArray[np.float32], centroids: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest centroid of each row, the first where equal; the bits do not depend on how the rows are batched.

    Args:
        rows: (n, d) float32, projected.
        centroids: (K, d) float32.

    Returns:
        labels (n,) int64 in [0, K) and squared distances (n,) float32.
    """
    labels = nearest_centroids.search_among(centroids)(rows)[:, 0]
    return labels, nearest_centroids.squared_distances(rows, centroids, labels).astype(np.float32)


def nearest(
    rows: NDArray[np.float32], centroids: NDArray[np.float32], count: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The `count` nearest centroids of each row, the nearest first, the first where equal; the first column is `assign`'s.

    Args:
        rows: (n, d) float32, projected.
        centroids: (K, d) float32.
        count: m, 1 <= m <= K.

    Returns:
        numbers (n, m) int32 in [0, K), and squared distances (n, m) float32.
    """
    numbers = nearest_centroids.search_among(centroids)(rows, count)
    return numbers.astype(np.int32), nearest_centroids.squared_distances(rows, centroids, numbers).astype(np.float32)


def _survey(shards: Sequence[Path], projection: Mapping[str, NDArray[Any]], pool: Pool) -> tuple[ClusteringSpace, list[int]]:
    """The space of the clustering, and the rows of each shard."""
    counts, row_sums, lows, highs = zip(*pool.map(_surveyed, list(shards), projection), strict=True)
    total = sum(counts)
    centre = (np.sum(row_sums, axis=0) / total).astype(np.float32)
    low, high = np.min(lows, axis=0), np.max(highs, axis=0)
    if (low == high).all():
        raise ValueError(f"all {total} rows of the features are equal; there is nothing to cluster")
    largest = float(max((high - centre).max(), (centre - low).max()))
    # |partial sums of differences| <= 2 N max|x| <= 2**53 grid: every one of them is a float64
    grid = 2.0 ** (math.ceil(math.log2(largest)) + math.ceil(math.log2(total)) + 1 - 53)
    return ClusteringSpace.of(projection, centre, grid), list(counts)


def _surveyed(
    shard: Path, projection: Mapping[str, NDArray[Any]]
) -> tuple[int, NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    progress.moved("shards")
    rows = apply(projection, finite_rows(shard))
    return len(rows), rows.sum(axis=0, dtype=np.float64), rows.min(axis=0), rows.max(axis=0)


def _groups(shards: Sequence[Path], pool: Pool) -> list[list[Path]]:
    """Neighbouring shards, one group per worker: the sums are exact, so the grouping cannot be seen in the result."""
    size = -(-len(shards) // pool.workers)
    return [list(shards[start : start + size]) for start in range(0, len(shards), size)]


def _gather(
    shards: Sequence[Path], counts: Sequence[int], numbers: NDArray[np.int64], space: ClusteringSpace, pool: Pool
) -> NDArray[np.float32]:
    """The rows with these numbers, in this order."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    shard_of = np.searchsorted(starts, numbers, side="right") - 1
    visited = np.unique(shard_of)
    picked = pool.map(
        lloyd.read_rows, [(shards[index], numbers[shard_of == index] - starts[index]) for index in visited], space
    )
    gathered = np.empty((len(numbers), picked[0].shape[1]), np.float32)
    for index, rows in zip(visited, picked, strict=True):
        gathered[shard_of == index] = rows
    return gathered


def _inertia(
    changes: Sequence[SumChange], sums: NDArray[np.float64], sizes: NDArray[np.int64], centroids: NDArray[np.float32]
) -> float:
    """sum |x - c|^2 = sum |x|^2 - 2 sum c (sum of its x) + sum n |c|^2, in float64 from exact sums."""
    squares = math.fsum(square for change in changes for square in change.squares)
    wide = centroids.astype(np.float64)
    crossed = float((wide * (sizes[:, None] * wide - 2 * sums)).sum())
    return max(squares + crossed, 0.0) / int(sizes.sum())


def _means(sums: NDArray[np.float64], sizes: NDArray[np.int64], centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    means = centroids.copy()
    filled = sizes > 0
    means[filled] = (sums[filled] / sizes[filled, None]).astype(np.float32)
    return means


def _repaired(
    sums: NDArray[np.float64],
    sizes: NDArray[np.int64],
    centroids: Centroids,
    groups: list[list[Path]],
    space: ClusteringSpace,
    pool: Pool,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Copies of sums (K, d) and sizes (K,) in which empty clusters have taken over far rows (see `fit`)."""
    sums, sizes = sums.copy(), sizes.copy()
    unfilled = list(np.flatnonzero(sizes == 0))
    found = pool.map(lloyd.farthest_rows, groups, (space, centroids, sizes, len(unfilled)))
    candidates = sorted((each for group in found for each in group), key=lambda each: -each[0])
    if not candidates:
        raise ValueError(f"k = {len(sizes)}, but the features have only {len(sizes) - len(unfilled)} distinct rows")
    used: set[bytes] = set()
    for _, donor, row in candidates:
        if unfilled and sizes[donor] > 1 and row.tobytes() not in used:
            used.add(row.tobytes())
            recipient = unfilled.pop(0)
            sums[donor] -= row
            sums[recipient] += row
            sizes[donor] -= 1
            sizes[recipient] += 1
    return sums, sizes
