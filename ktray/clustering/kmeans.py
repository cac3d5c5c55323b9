"""Lloyd's k-means over shards of features: labels, centroids and inertia are a function of features, k and seed alone.

Rows and centroids are whole numbers on a grid (see `grid`), so nothing depends on the number of workers, the order of
execution, the processor or the library that multiplies:

- The label of a row is the number of the centroid at the smallest exact squared distance (see `nearest_centroids`).
- Sums over any grouping of rows are exact in float64, so each worker sends a single partial sum, and only rows that changed
  their label need to be added. A mean is one division and one rounding to the grid.
- The initial centroids are rows, drawn by number from (seed, N).

Legend: N rows, K clusters, D feature width, d width after projection.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import fingerprint, progress
from ktray.clustering import grid, nearest_centroids, projection
from ktray.clustering.grid import Codebook, Grid
from ktray.clustering.projection import apply, centre_and_radius, finite_rows, row_counts, sample
from ktray.ops import blas
from ktray.pool import Pool

IDENTITY, REVISION = "kmeans", 3
TOOLS = (projection, grid, nearest_centroids)

CACHE_BYTES = 8 << 30  # rows on the grid that a worker keeps between iterations; rows beyond that are projected every time


@dataclass(frozen=True)
class Clusters:
    """The result of k-means.

    Attributes:
        codebook: the centroids on their grid.
        inertia: mean squared distance of the rows to their centroid: first for the initial centroids, then after each update.
        empty: number of empty clusters at the same points in time; `fit` repairs them in the next update.
        sizes: (K,) int64, rows of each cluster under `codebook`.
        iterations: number of updates, len(inertia) - 1.
        converged: whether the last update left all labels unchanged.
        decided_again: share of the labels that the screening product could not decide.
    """

    codebook: Codebook
    inertia: tuple[float, ...]
    empty: tuple[int, ...]
    sizes: NDArray[np.int64]
    iterations: int
    converged: bool
    decided_again: float

    @property
    def centroids(self) -> NDArray[np.float32]:
        """(K, d) float32, in the projected space."""
        return self.codebook.centroids


@dataclass(frozen=True)
class _ClusteringSpace:
    """The space in which rows and centroids are compared.

    Attributes:
        projection: from `projection.fit`, or empty.
        grid: of the projected rows.
        key: sha256 hex digest of the two attributes above.
    """

    projection: Mapping[str, NDArray[Any]]
    grid: Grid
    key: str

    @classmethod
    def of(cls, projection: Mapping[str, NDArray[Any]], grid: Grid) -> _ClusteringSpace:
        digest = hashlib.sha256(grid.centre.tobytes() + np.array([grid.exponent, grid.bits], np.int64).tobytes())
        for name in sorted(projection):
            digest.update(name.encode() + np.asarray(projection[name]).tobytes())
        return cls(projection, grid, digest.hexdigest())


@dataclass(frozen=True)
class _Centroids:
    """Centroids in a space; workers cache labels under the digest of both."""

    codebook: Codebook
    digest: bytes

    @classmethod
    def of(cls, points: NDArray[np.int64], space: _ClusteringSpace) -> _Centroids:
        digest = hashlib.blake2b(space.key.encode() + points.tobytes(), digest_size=16).digest()
        return cls(Codebook(space.grid, points), digest)


@dataclass(frozen=True)
class _SumChange:
    """How new centroids change the sums of the clusters, for the rows of some shards.

    Attributes:
        sums: (K, d) float64, the change of the sum of each cluster's rows; exact.
        counts: (K,) int64, the change of the number of rows in each cluster.
        squares: sum of |x|^2 in squared steps; exact.
        relabelled: number of rows that changed their label.
        searched: number of rows whose label was not known yet.
        unclear: how many of them the product could not decide.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    squares: int
    relabelled: int
    searched: int
    unclear: int


def fit(
    shards: Sequence[Path],
    k: int,
    *,
    seed: int,
    iterations: int,
    projection: Mapping[str, NDArray[Any]],
    pool: Pool,
    device: str = "cpu",
    on_iteration: Callable[[int, float], None] | None = None,
) -> Clusters:
    """K clusters of all rows, by Lloyd's iteration from K random rows until no label changes.

    If two centroids are equally near to a row, the first one wins. Each empty cluster takes over the row that is farthest
    from its centroid (ties: the first in shard order), and the mean of the cluster that loses the row is corrected. m empty
    clusters take the m farthest distinct rows, but never the last row of a cluster: where that leaves nothing for an empty
    cluster, it keeps its centroid and is repaired after the next assignment.

    Args:
        shards: files of (n, D) float32 or float16 features; their order numbers the rows.
        k: number of clusters, 1 <= k <= N.
        seed: selects the K initial rows.
        iterations: maximum number of updates, >= 0.
        projection: from `projection.fit`, or empty.
        device: torch device; CUDA does the iterations alone, otherwise the pool's workers do them. It changes no result.
        on_iteration: called with (updates so far, inertia) after every assignment.

    Raises:
        ValueError: k > N, fewer than k distinct rows, a feature is not finite, all rows are equal, or no grid is fine enough
            for all rows (see `Grid.around`).

    Source: Lloyd, Least squares quantization in PCM, IEEE Trans. Inf. Theory 28(2), 1982.
    """
    if k < 1:
        raise ValueError(f"k = {k}, but k-means needs at least one cluster")
    counts = row_counts(shards)
    total = sum(counts)
    if k > total:
        raise ValueError(f"k = {k} clusters need at least as many rows; the features have {total}")
    space = _ClusteringSpace.of(projection, Grid.around(*centre_and_radius(shards, projection, pool), total))
    seeds = space.grid.rows(sample(shards, counts, seed_rows(total, k, seed), projection, pool))
    if device.startswith("cuda"):
        return _fit_on(device, space, seeds, shards, counts, iterations, on_iteration)
    clusters = _iterate(space.grid.whole(seeds), _groups(shards, pool), iterations, space, pool, on_iteration)
    pool.map(_release_cache, range(pool.worker_count), space.key)
    return clusters


def _fit_on(
    device: str,
    space: _ClusteringSpace,
    seeds: NDArray[np.float32],
    shards: Sequence[Path],
    counts: Sequence[int],
    iterations: int,
    on_iteration: Callable[[int, float], None] | None,
) -> Clusters:
    from ktray.clustering import gpu_kmeans  # imports torch

    def load(shard: Path) -> NDArray[np.float32]:
        return space.grid.rows(apply(space.projection, finite_rows(shard)))

    found = gpu_kmeans.iterate(
        space.grid.whole(seeds), shards, counts, iterations, space.grid, load, plan_repairs, device, on_iteration
    )
    codebook = Codebook(space.grid, found.points)
    updates = len(found.inertia) - 1
    return Clusters(codebook, found.inertia, found.empty, found.sizes, updates, found.converged, found.decided_again)


def _iterate(
    initial: NDArray[np.int64],
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
    searched, unclear = 0, 0
    while True:
        changes = pool.map(_sum_change, groups, (space, centroids, previous))
        for change in changes:
            sums, sizes = sums + change.sums, sizes + change.counts
            searched, unclear = searched + change.searched, unclear + change.unclear
        inertia.append(_inertia(changes, sums, sizes, centroids.codebook))
        empty.append(int((sizes == 0).sum()))
        if on_iteration:
            on_iteration(len(inertia) - 1, inertia[-1])
        converged = previous is not None and not empty[-1] and not sum(change.relabelled for change in changes)
        if converged or len(inertia) > iterations:
            again = unclear / max(1, searched)
            return Clusters(centroids.codebook, tuple(inertia), tuple(empty), sizes, len(inertia) - 1, converged, again)
        repaired_sums, repaired_sizes = _repaired(sums, sizes, centroids, groups, space, pool) if empty[-1] else (sums, sizes)
        previous, centroids = centroids, _Centroids.of(_means(repaired_sums, repaired_sizes, centroids.codebook), space)


def seed_rows(count: int, k: int, seed: int) -> NDArray[np.int64]:
    """The k distinct row numbers in [0, count) from which k-means starts: (k,) int64, a function of the arguments alone."""
    return np.random.default_rng(fingerprint.seed_of(seed, "centroids", count)).choice(count, k, replace=False)


def _groups(shards: Sequence[Path], pool: Pool) -> list[list[Path]]:
    """One group of consecutive shards per worker; sums are exact, so the grouping does not affect the result."""
    size = -(-len(shards) // pool.worker_count)
    return [list(shards[start : start + size]) for start in range(0, len(shards), size)]


def _inertia(changes: Sequence[_SumChange], sums: NDArray[np.float64], sizes: NDArray[np.int64], codebook: Codebook) -> float:
    """sum |x - c|^2 = sum |x|^2 - sum over clusters of c (2 (sum of its x) - n c): exact until it is divided by N."""
    crossed = 2 * codebook.grid.whole(sums) - sizes[:, None] * codebook.points
    squared = sum(change.squares for change in changes) - grid.total_of(grid.inner_products(codebook.points, crossed))
    return squared / int(sizes.sum()) * codebook.grid.square


def _means(sums: NDArray[np.float64], sizes: NDArray[np.int64], codebook: Codebook) -> NDArray[np.int64]:
    """The new centroids (K, d) on the grid; an empty cluster keeps its old one."""
    points = codebook.points.copy()
    filled = sizes > 0
    points[filled] = np.rint(sums[filled] * 2.0**codebook.grid.bits / sizes[filled, None]).astype(np.int64)
    return points


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
    found = pool.map(_farthest_rows, groups, (space, centroids, sizes, int((sizes == 0).sum())))
    for donor, recipient, row in plan_repairs(sizes, [candidate for group in found for candidate in group]):
        sums[donor] -= row
        sums[recipient] += row
        sizes[donor] -= 1
        sizes[recipient] += 1
    return sums, sizes


_Candidate = tuple[int, int, NDArray[np.float32]]  # exact squared distance from its centroid, label, row


def plan_repairs(sizes: NDArray[np.int64], candidates: Sequence[_Candidate]) -> list[tuple[int, int, NDArray[np.float32]]]:
    """Which empty cluster takes over which row: (donor, recipient, row) for as many as possible.

    Args:
        sizes: (K,) rows of each cluster.
        candidates: the farthest distinct rows of each part of the features, at least as many as there are empty clusters.
    """
    left = sizes.copy()
    unfilled = list(np.flatnonzero(sizes == 0))
    if not candidates:
        raise ValueError(f"k = {len(sizes)}, but the features have only {len(sizes) - len(unfilled)} distinct rows")
    distinct: dict[bytes, _Candidate] = {}
    for candidate in sorted(candidates, key=lambda each: -each[0]):
        distinct.setdefault(candidate[2].tobytes(), candidate)
    planned: list[tuple[int, int, NDArray[np.float32]]] = []
    for _, donor, row in list(distinct.values())[: len(unfilled)]:
        if left[donor] > 1:
            left[donor] -= 1
            planned.append((donor, int(unfilled[len(planned)]), row))
    return planned


# What follows runs in the workers. Caches only save time: everything can be recomputed from the arguments.


def _sum_change(group: list[Path], shared: tuple[_ClusteringSpace, _Centroids, _Centroids | None]) -> _SumChange:
    """The change of the clusters' sums for the rows of some shards.

    Args:
        shared: the space, the centroids, and the previous centroids; in the first iteration None, and every row is added.
    """
    space, centroids, previous = shared
    labels_of, previous_labels_of = _Labelling(centroids), _Labelling(previous) if previous else None
    points = centroids.codebook.points
    sums, counts = np.zeros(points.shape), np.zeros(len(points), np.int64)
    squares, relabelled = 0, 0
    for shard in group:
        rows, square = _rows(shard, space)
        old = previous_labels_of(shard, rows) if previous_labels_of else None
        labels = labels_of(shard, rows)
        relabelled += _add(sums, counts, rows, labels, old)
        progress.advance("shards")
        squares += square
    return _SumChange(sums, counts, squares, relabelled, labels_of.searched, labels_of.unclear)


def _farthest_rows(
    group: list[Path], shared: tuple[_ClusteringSpace, _Centroids, NDArray[np.int64], int]
) -> list[tuple[int, int, NDArray[np.float32]]]:
    """Up to `count` distinct rows of each shard as (squared distance, label, row), farthest from their centroid first.

    Rows that coincide with their centroid, and the only row of a cluster, are left out.
    """
    space, centroids, sizes, count = shared
    labels_of = _Labelling(centroids)
    found: list[tuple[int, int, NDArray[np.float32]]] = []
    for shard in group:
        rows, _ = _rows(shard, space)
        labels = labels_of(shard, rows)
        high, low = grid.squared_distances(rows, centroids.codebook, np.arange(len(rows)), labels)
        alone = sizes[labels] == 1
        high[alone], low[alone] = 0, 0
        seen: set[bytes] = set()
        for index in np.lexsort((np.arange(len(rows)), ~low, -high)):
            squared = grid.total_of((high[index : index + 1], low[index : index + 1]))
            if len(seen) == count or squared == 0:
                break
            if (content := rows[index].tobytes()) not in seen:
                seen.add(content)
                found.append((squared, int(labels[index]), rows[index].copy()))
    return found


def _add(
    sums: NDArray[np.float64],
    counts: NDArray[np.int64],
    rows: NDArray[np.float32],
    labels: NDArray[np.int64],
    old: NDArray[np.int64] | None,
) -> int:
    """Add relabelled rows to their new clusters and subtract them from the old ones, in place; returns their number."""
    from scipy.sparse import csc_matrix

    k = len(counts)
    np.add(counts, np.bincount(labels, minlength=k), out=counts)
    if old is None:
        for start in range(0, len(rows), blas.CHUNK_ROWS):
            wide = rows[start : start + blas.CHUNK_ROWS].astype(np.float64)
            n = len(wide)
            signs = csc_matrix((np.ones(n), labels[start : start + n], np.arange(n + 1)), shape=(k, n))
            np.add(sums, signs @ wide, out=sums)
        return len(rows)
    np.subtract(counts, np.bincount(old, minlength=k), out=counts)
    relabelled = np.flatnonzero(labels != old)
    n = len(relabelled)
    if n:
        clusters = np.stack([labels[relabelled], old[relabelled]], axis=1).ravel()
        signs = csc_matrix((np.tile([1.0, -1.0], n), clusters, np.arange(0, 2 * n + 1, 2)), shape=(k, n))
        np.add(sums, signs @ rows[relabelled].astype(np.float64), out=sums)
    return n


_ShardKey = tuple[str, int, int]
_cached_rows: dict[_ShardKey, tuple[NDArray[np.float32], int]] = {}
_cached_labels: dict[_ShardKey, tuple[bytes, NDArray[np.int32]]] = {}
_cached_space = ""
_lock = threading.Lock()


def _shard_key(shard: Path) -> _ShardKey:
    stat = shard.stat()
    return str(shard), stat.st_mtime_ns, stat.st_size


def _rows(shard: Path, space: _ClusteringSpace) -> tuple[NDArray[np.float32], int]:
    """The rows of a shard on the grid, and their sum of |x|^2 in squared steps; cached for one space at a time."""
    global _cached_space
    key = _shard_key(shard)
    with _lock:
        if _cached_space != space.key:
            _cached_rows.clear()
            _cached_labels.clear()
            _cached_space = space.key
        if key in _cached_rows:
            return _cached_rows[key]
    rows = space.grid.rows(apply(space.projection, finite_rows(shard)))
    square = _sum_of_squares(rows, space.grid)
    with _lock:
        used = sum(cached.nbytes for cached, _ in _cached_rows.values())
        if _cached_space == space.key and used + rows.nbytes <= CACHE_BYTES:
            _cached_rows[key] = rows, square
    return rows, square


def _sum_of_squares(rows: NDArray[np.float32], of_rows: Grid) -> int:
    """The sum of |x|^2 of rows (n, d) in squared steps."""
    total = 0
    for start in range(0, len(rows), blas.CHUNK_ROWS):
        piece = of_rows.whole(rows[start : start + blas.CHUNK_ROWS])
        total += grid.total_of(grid.inner_products(piece, piece))
    return total


class _Labelling:
    """Labels of shards under some centroids, from the cache if its latest entry was made with the same centroids."""

    def __init__(self, centroids: _Centroids) -> None:
        self.centroids, self.searched, self.unclear = centroids, 0, 0
        self._search: nearest_centroids.Search | None = None

    def __call__(self, shard: Path, rows: NDArray[np.float32]) -> NDArray[np.int64]:
        key = _shard_key(shard)
        digest, cached = _cached_labels.get(key, (b"", None))
        if cached is not None and digest == self.centroids.digest:
            return cached.astype(np.int64)
        self._search = self._search or nearest_centroids.search_among(self.centroids.codebook)
        numbers, unclear = self._search(rows)
        labels: NDArray[np.int64] = numbers[:, 0]
        self.searched, self.unclear = self.searched + len(rows), self.unclear + unclear
        _cached_labels[key] = self.centroids.digest, labels.astype(np.int32)
        return labels


def _release_cache(_: int, space_key: str) -> None:
    """Free the worker's cache; a worker that misses this call frees it when the next space arrives."""
    with _lock:
        if _cached_space == space_key:
            _cached_rows.clear()
            _cached_labels.clear()
