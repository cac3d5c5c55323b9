"""Lloyd's k-means over shards of features: bitwise identical results for any number of workers and any order of execution.

Three properties guarantee this:

- The label of a row depends only on the row and the centroids (see `nearest_centroids`).
- Rows are centred and rounded to multiples of a power of two, coarse enough for float64 sums over all rows to be exact:
  2**-31 of the largest value for a million rows, which is below float32 rounding for all but tiny values. Sums over any
  grouping therefore agree, each worker sends a single partial sum, and only rows that changed their label need to be added.
- The initial centroids are rows, drawn by number from (seed, N).

Legend: N rows, K clusters, D feature width, d width after projection.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import fingerprint, progress
from ktray.clustering import nearest_centroids, projection
from ktray.clustering.projection import apply, finite_rows
from ktray.ops import blas
from ktray.pool import Pool

IDENTITY, REVISION = "kmeans", 2
TOOLS = (projection, nearest_centroids)

CACHE_BYTES = 8 << 30  # projected rows that a worker keeps between iterations; rows beyond that are projected every time


@dataclass(frozen=True)
class Clusters:
    """The result of k-means.

    Attributes:
        centroids: (K, d) float32, in the projected space.
        inertia: mean squared distance of the rows to their centroid: first for the initial centroids, then after each update.
        empty: number of empty clusters at the same points in time; `fit` repairs them in the next update.
        sizes: (K,) int64, rows of each cluster under `centroids`.
        iterations: number of updates, len(inertia) - 1.
        converged: whether the last update left all labels unchanged.
    """

    centroids: NDArray[np.float32]
    inertia: tuple[float, ...]
    empty: tuple[int, ...]
    sizes: NDArray[np.int64]
    iterations: int
    converged: bool


@dataclass(frozen=True)
class _ClusteringSpace:
    """The space in which rows and centroids are compared: projected, centred, rows rounded to a grid.

    Attributes:
        projection: from `projection.fit`, or empty.
        centre: (d,) float32, the mean of the projected rows, which is subtracted: the expanded form of |x - c|^2 loses
            digits far from the origin.
        grid: rows are rounded to multiples of this power of two; all sums and differences of rows are then exact in float64.
        key: sha256 hex digest of the three attributes above.
    """

    projection: Mapping[str, NDArray[Any]]
    centre: NDArray[np.float32]
    grid: float
    key: str

    @classmethod
    def of(cls, projection: Mapping[str, NDArray[Any]], centre: NDArray[np.float32], grid: float) -> _ClusteringSpace:
        digest = hashlib.sha256(centre.tobytes() + np.float64(grid).tobytes())
        for name in sorted(projection):
            digest.update(name.encode() + np.asarray(projection[name]).tobytes())
        return cls(projection, centre, grid, digest.hexdigest())


@dataclass(frozen=True)
class _Centroids:
    """Centroids (K, d) float32 in a space; workers cache labels under the digest of both."""

    values: NDArray[np.float32]
    digest: bytes

    @classmethod
    def of(cls, values: NDArray[np.float32], space: _ClusteringSpace) -> _Centroids:
        return cls(values, hashlib.blake2b(space.key.encode() + values.tobytes(), digest_size=16).digest())


@dataclass(frozen=True)
class _SumChange:
    """How new centroids change the sums of the clusters, for the rows of some shards.

    Attributes:
        sums: (K, d) float64, the change of the sum of each cluster's rows; exact.
        counts: (K,) int64, the change of the number of rows in each cluster.
        squares: sum of |x|^2 of each shard.
        relabelled: number of rows that changed their label.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    squares: list[float]
    relabelled: int


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
    """K clusters of all rows, by Lloyd's iteration from K random rows until no label changes.

    If two centroids are equally near to a row, the first one wins. Each empty cluster takes over the row that is farthest
    from its centroid (ties: the first in shard order), and the mean of the cluster that loses the row is corrected. Several
    empty clusters take distinct rows, never the only row of a cluster. If no row is left for an empty cluster, it keeps its
    centroid and is repaired after the next assignment.

    Args:
        shards: files of (n, D) float32 or float16 features; their order numbers the rows.
        k: number of clusters, 1 <= k <= N.
        seed: selects the K initial rows.
        iterations: maximum number of updates, >= 0.
        projection: from `projection.fit`, or empty.
        on_iteration: called with (updates so far, inertia) after every assignment.

    Raises:
        ValueError: k > N, fewer than k distinct rows, a feature is not finite, or all rows are equal.

    Source: Lloyd, Least squares quantization in PCM, IEEE Trans. Inf. Theory 28(2), 1982.
    """
    if k < 1:
        raise ValueError(f"k = {k}, but k-means needs at least one cluster")
    space, counts = _survey(shards, projection, pool)
    total = sum(counts)
    if k > total:
        raise ValueError(f"k = {k} clusters need at least as many rows; the features have {total}")
    initial = _gather(shards, counts, seed_rows(total, k, seed), space, pool)
    clusters = _iterate(initial, _groups(shards, pool), iterations, space, pool, on_iteration)
    pool.map(_release_cache, range(pool.workers), space.key)
    return clusters


def _iterate(
    initial: NDArray[np.float32],
    groups: list[list[Path]],
    iterations: int,
    space: _ClusteringSpace,
    pool: Pool,
    on_iteration: Callable[[int, float], None] | None,
) -> Clusters:
    centroids, previous = _Centroids.of(initial, space), None
    sums, sizes = np.zeros(initial.shape), np.zeros(len(initial), np.int64)
    inertia: list[float] = []
    empty: list[int] = []
    while True:
        changes = pool.map(_sum_change, groups, (space, centroids, previous))
        for change in changes:
            sums, sizes = sums + change.sums, sizes + change.counts
        inertia.append(_inertia(changes, sums, sizes, centroids.values))
        empty.append(int((sizes == 0).sum()))
        if on_iteration:
            on_iteration(len(inertia) - 1, inertia[-1])
        converged = previous is not None and not empty[-1] and not sum(change.relabelled for change in changes)
        if converged or len(inertia) > iterations:
            shifted_back = (space.centre.astype(np.float64) + centroids.values).astype(np.float32)
            return Clusters(shifted_back, tuple(inertia), tuple(empty), sizes, len(inertia) - 1, converged)
        repaired_sums, repaired_sizes = _repaired(sums, sizes, centroids, groups, space, pool) if empty[-1] else (sums, sizes)
        previous, centroids = centroids, _Centroids.of(_means(repaired_sums, repaired_sizes, centroids.values), space)


def seed_rows(count: int, k: int, seed: int) -> NDArray[np.int64]:
    """The k distinct row numbers in [0, count) from which k-means starts: (k,) int64, a function of the arguments alone."""
    return np.random.default_rng(fingerprint.seed_of(seed, "centroids", count)).choice(count, k, replace=False)


def assign(rows: NDArray[np.float32], centroids: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The nearest centroid of each row (ties: the first); bitwise independent of how the rows are batched.

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
    """The `count` nearest centroids of each row, nearest first (ties: the first); the first column equals `assign`.

    Args:
        rows: (n, d) float32, projected.
        centroids: (K, d) float32.
        count: m, 1 <= m <= K.

    Returns:
        numbers (n, m) int32 in [0, K), and squared distances (n, m) float32.
    """
    numbers = nearest_centroids.search_among(centroids)(rows, count)
    return numbers.astype(np.int32), nearest_centroids.squared_distances(rows, centroids, numbers).astype(np.float32)


def _survey(shards: Sequence[Path], projection: Mapping[str, NDArray[Any]], pool: Pool) -> tuple[_ClusteringSpace, list[int]]:
    """The space of the clustering, and the number of rows in each shard."""
    counts, row_sums, lows, highs = zip(*pool.map(_shard_statistics, list(shards), projection), strict=True)
    total = sum(counts)
    centre = (np.sum(row_sums, axis=0) / total).astype(np.float32)
    low, high = np.min(lows, axis=0), np.max(highs, axis=0)
    if (low == high).all():
        raise ValueError(f"all {total} rows of the features are equal; there is nothing to cluster")
    largest = float(max((high - centre).max(), (centre - low).max()))
    # |partial sums of differences| <= 2 N max|x| <= 2**53 grid, so float64 represents each of them exactly
    grid = 2.0 ** (math.ceil(math.log2(largest)) + math.ceil(math.log2(total)) + 1 - 53)
    return _ClusteringSpace.of(projection, centre, grid), list(counts)


def _shard_statistics(
    shard: Path, projection: Mapping[str, NDArray[Any]]
) -> tuple[int, NDArray[np.float64], NDArray[np.float32], NDArray[np.float32]]:
    """Number, sum (d,), minimum (d,) and maximum (d,) of the projected rows."""
    progress.advance("shards")
    rows = apply(projection, finite_rows(shard))
    return len(rows), rows.sum(axis=0, dtype=np.float64), rows.min(axis=0), rows.max(axis=0)


def _groups(shards: Sequence[Path], pool: Pool) -> list[list[Path]]:
    """One group of consecutive shards per worker; sums are exact, so the grouping does not affect the result."""
    size = -(-len(shards) // pool.workers)
    return [list(shards[start : start + size]) for start in range(0, len(shards), size)]


def _gather(
    shards: Sequence[Path], counts: Sequence[int], numbers: NDArray[np.int64], space: _ClusteringSpace, pool: Pool
) -> NDArray[np.float32]:
    """The rows with these numbers, in this order."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    shard_of = np.searchsorted(starts, numbers, side="right") - 1
    visited = np.unique(shard_of)
    read = pool.map(_read_rows, [(shards[index], numbers[shard_of == index] - starts[index]) for index in visited], space)
    gathered = np.empty((len(numbers), read[0].shape[1]), np.float32)
    for index, rows in zip(visited, read, strict=True):
        gathered[shard_of == index] = rows
    return gathered


def _inertia(
    changes: Sequence[_SumChange], sums: NDArray[np.float64], sizes: NDArray[np.int64], centroids: NDArray[np.float32]
) -> float:
    """sum |x - c|^2 = sum |x|^2 - 2 sum c (sum of its x) + sum n |c|^2, in float64 from exact sums."""
    squares = math.fsum(square for change in changes for square in change.squares)
    wide = centroids.astype(np.float64)
    crossed = float((wide * (sizes[:, None] * wide - 2 * sums)).sum())
    return max(squares + crossed, 0.0) / int(sizes.sum())


def _means(sums: NDArray[np.float64], sizes: NDArray[np.int64], centroids: NDArray[np.float32]) -> NDArray[np.float32]:
    """The new centroids; an empty cluster keeps its old one."""
    means = centroids.copy()
    filled = sizes > 0
    means[filled] = (sums[filled] / sizes[filled, None]).astype(np.float32)
    return means


def _repaired(
    sums: NDArray[np.float64],
    sizes: NDArray[np.int64],
    centroids: _Centroids,
    groups: list[list[Path]],
    space: _ClusteringSpace,
    pool: Pool,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Copies of sums (K, d) and sizes (K,) after empty clusters have taken over the farthest rows (see `fit`)."""
    sums, sizes = sums.copy(), sizes.copy()
    unfilled = list(np.flatnonzero(sizes == 0))
    found = pool.map(_farthest_rows, groups, (space, centroids, sizes, len(unfilled)))
    candidates = sorted((candidate for group in found for candidate in group), key=lambda candidate: -candidate[0])
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


# What follows runs in the workers. Caches only save time: everything can be recomputed from the arguments.


def _sum_change(group: list[Path], shared: tuple[_ClusteringSpace, _Centroids, _Centroids | None]) -> _SumChange:
    """The change of the clusters' sums for the rows of some shards.

    Args:
        shared: the space, the centroids, and the previous centroids; in the first iteration None, and every row is added.
    """
    space, centroids, previous = shared
    labels_of = _labels_under(centroids)
    previous_labels_of = _labels_under(previous) if previous else None
    change = _SumChange(np.zeros(centroids.values.shape), np.zeros(len(centroids.values), np.int64), [], 0)
    relabelled = 0
    for shard in group:
        rows, square = _rows(shard, space)
        old = previous_labels_of(shard, rows) if previous_labels_of else None
        labels = labels_of(shard, rows)
        relabelled += _add(change, rows, labels, old)
        progress.advance("shards")
        change.squares.append(square)
    return _SumChange(change.sums, change.counts, change.squares, relabelled)


def _farthest_rows(
    group: list[Path], shared: tuple[_ClusteringSpace, _Centroids, NDArray[np.int64], int]
) -> list[tuple[float, int, NDArray[np.float32]]]:
    """Up to `count` distinct rows of each shard as (squared distance, label, row), farthest from their centroid first.

    Rows that coincide with their centroid, and the only row of a cluster, are left out.
    """
    space, centroids, sizes, count = shared
    labels_of = _labels_under(centroids)
    found: list[tuple[float, int, NDArray[np.float32]]] = []
    for shard in group:
        rows, _ = _rows(shard, space)
        labels = labels_of(shard, rows)
        distances = nearest_centroids.squared_distances(rows, centroids.values, labels)
        distances[sizes[labels] == 1] = 0
        seen: set[bytes] = set()
        for index in np.argsort(-distances, kind="stable"):
            if len(seen) == count or distances[index] == 0:
                break
            if (content := rows[index].tobytes()) not in seen:
                seen.add(content)
                found.append((float(distances[index]), int(labels[index]), rows[index].copy()))
    return found


def _read_rows(item: tuple[Path, NDArray[np.int64]], space: _ClusteringSpace) -> NDArray[np.float32]:
    """The rows (m, d) of a shard with these numbers (m,)."""
    shard, numbers = item
    return _rows(shard, space)[0][numbers]


def _add(change: _SumChange, rows: NDArray[np.float32], labels: NDArray[np.int64], old: NDArray[np.int64] | None) -> int:
    """Add relabelled rows to their new clusters and subtract them from the old ones, in place; returns their number."""
    from scipy.sparse import csc_matrix

    k = len(change.counts)
    np.add(change.counts, np.bincount(labels, minlength=k), out=change.counts)
    if old is None:
        for start in range(0, len(rows), blas.CHUNK_ROWS):
            wide = rows[start : start + blas.CHUNK_ROWS].astype(np.float64)
            n = len(wide)
            signs = csc_matrix((np.ones(n), labels[start : start + n], np.arange(n + 1)), shape=(k, n))
            np.add(change.sums, signs @ wide, out=change.sums)
        return len(rows)
    np.subtract(change.counts, np.bincount(old, minlength=k), out=change.counts)
    relabelled = np.flatnonzero(labels != old)
    n = len(relabelled)
    if n:
        clusters = np.stack([labels[relabelled], old[relabelled]], axis=1).ravel()
        signs = csc_matrix((np.tile([1.0, -1.0], n), clusters, np.arange(0, 2 * n + 1, 2)), shape=(k, n))
        np.add(change.sums, signs @ rows[relabelled].astype(np.float64), out=change.sums)
    return n


_ShardKey = tuple[str, int, int]
_cached_rows: dict[_ShardKey, tuple[NDArray[np.float32], float]] = {}
_cached_labels: dict[_ShardKey, tuple[bytes, NDArray[np.int32]]] = {}
_cached_space = ""
_lock = threading.Lock()


def _shard_key(shard: Path) -> _ShardKey:
    stat = shard.stat()
    return str(shard), stat.st_mtime_ns, stat.st_size


def _rows(shard: Path, space: _ClusteringSpace) -> tuple[NDArray[np.float32], float]:
    """The rows of a shard in `space` and their sum of squares, cached for one space at a time."""
    global _cached_space
    key = _shard_key(shard)
    with _lock:
        if _cached_space != space.key:
            _cached_rows.clear()
            _cached_labels.clear()
            _cached_space = space.key
        if key in _cached_rows:
            return _cached_rows[key]
    rows = apply(space.projection, finite_rows(shard)) - space.centre
    rows = (np.rint(rows.astype(np.float64) / space.grid) * space.grid).astype(np.float32)
    square = float(np.einsum("nd,nd->", rows, rows, dtype=np.float64))
    with _lock:
        used = sum(cached.nbytes for cached, _ in _cached_rows.values())
        if _cached_space == space.key and used + rows.nbytes <= CACHE_BYTES:
            _cached_rows[key] = rows, square
    return rows, square


def _labels_under(centroids: _Centroids) -> Callable[[Path, NDArray[np.float32]], NDArray[np.int64]]:
    """A function that labels a shard's rows, from the cache if its latest entry was made with the same centroids."""
    search: nearest_centroids.Search | None = None

    def labels_of(shard: Path, rows: NDArray[np.float32]) -> NDArray[np.int64]:
        nonlocal search
        key = _shard_key(shard)
        digest, cached = _cached_labels.get(key, (b"", None))
        if cached is not None and digest == centroids.digest:
            return cached.astype(np.int64)
        search = search or nearest_centroids.search_among(centroids.values)
        labels = search(rows)[:, 0]
        _cached_labels[key] = centroids.digest, labels.astype(np.int32)
        return labels

    return labels_of


def _release_cache(_: int, space_key: str) -> None:
    """Free the worker's cache; a worker that misses this call frees it when the next space arrives."""
    with _lock:
        if _cached_space == space_key:
            _cached_rows.clear()
            _cached_labels.clear()
