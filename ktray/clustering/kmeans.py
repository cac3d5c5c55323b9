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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ktray import fingerprint, progress
from ktray.checksums import intact
from ktray.clustering import grid, lower_bounds, nearest_centroids, projection
from ktray.clustering.grid import Codebook, Grid
from ktray.clustering.projection import apply, centre_and_radius, finite_rows, row_counts, sample
from ktray.pool import Pool

if TYPE_CHECKING:
    from ktray.clustering import gpu_kmeans

IDENTITY, REVISION = "kmeans", 3
TOOLS = (projection, grid, nearest_centroids)

CACHE_BYTES = 8 << 30  # rows on the grid that a worker keeps between iterations; rows beyond that are projected every time
_COARSE_BYTES = 128 << 20  # coefficients that a worker keeps beside them: rows rounded to bfloat16, or their coefficients
_FEWEST_ADDED, _MOST_ADDED = 1 << 17, 1 << 22  # values that are added to the sums at a time: 1 to 32 MB


@dataclass(frozen=True)
class Clusters:
    """The result of k-means.

    Attributes:
        codebook: the centroids on their grid.
        inertia: mean squared distance of the rows to their centroid: first for the initial centroids, then after each update.
        empty: number of empty clusters at the same points in time; `fit` repairs them in the next update.
        sizes: (K,) int64, rows of each cluster under `codebook`.
        labels: (N,) int32, the cluster of each row under `codebook`.
        iterations: number of updates, len(inertia) - 1.
        converged: whether the last update left all labels unchanged.
        decided_again: share of the labels that the screening product could not decide.
    """

    codebook: Codebook
    inertia: tuple[float, ...]
    empty: tuple[int, ...]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int32]
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
class IterationState:
    """All that the following iterations depend on, and what the result says of the ones before.

    Attributes:
        points, previous: (K, d) int64, the centroids to which rows are assigned next, and those before, whose labels tell which
            rows change theirs.
        inertia, empty: as in `Clusters`, up to `previous`.
        searched, unclear: number of labels that were searched for, and how many of them the product could not decide.
    """

    points: NDArray[np.int64]
    previous: NDArray[np.int64]
    inertia: tuple[float, ...]
    empty: tuple[int, ...]
    searched: int
    unclear: int

    def write(self, path: Path, space_key: str) -> None:
        """Write the state to an npz file, for the space with this key."""
        np.savez(path, space_key=space_key, **vars(self))

    @classmethod
    def read(cls, path: Path, space_key: str) -> IterationState | None:
        """The state in a file that `write` wrote; None if it belongs to another space."""
        with np.load(intact(path), allow_pickle=False) as file:
            if str(file["space_key"]) != space_key:
                return None
            return cls(
                file["points"],
                file["previous"],
                tuple(file["inertia"].tolist()),
                tuple(file["empty"].tolist()),
                int(file["searched"]),
                int(file["unclear"]),
            )


Save = Callable[[int, Callable[[Path], None]], None]
"""(updates so far, function that writes a file of this path) -> None, called between two iterations."""


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
    start: Path | None = None,
    save: Save | None = None,
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
        start: file of an interrupted clustering with the same arguments, which is continued with the same result. One that
            belongs to other rows is ignored.
        save: called after every update with the number of updates and a function that writes such a file.

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
    engine = _engine_on(device, shards, counts, projection) if device.startswith("cuda") else None
    largest = engine.largest_distance if engine else None
    space = _ClusteringSpace.of(projection, Grid.around(*centre_and_radius(shards, projection, pool, largest), total))
    seeds = space.grid.rows(sample(shards, counts, seed_rows(total, k, seed), projection, pool))
    state = IterationState.read(start, space.key) if start else None

    def keep(updates: int, reached: Callable[[], IterationState]) -> None:
        if save:
            save(updates, lambda path: reached().write(path, space.key))

    if engine:
        return _fit_on(engine, space, seeds, iterations, on_iteration, state, keep)
    clusters = _iterate(space.grid.whole(seeds), _groups(shards, pool), iterations, space, pool, on_iteration, state, keep)
    pool.map(_release_cache, range(pool.worker_count), space.key)
    return clusters


def _engine_on(
    device: str, shards: Sequence[Path], counts: Sequence[int], projection: Mapping[str, NDArray[Any]]
) -> gpu_kmeans.Engine:
    from ktray.clustering import gpu_kmeans  # imports torch

    def load(shard: Path) -> NDArray[np.float32]:
        return apply(projection, finite_rows(shard))

    return gpu_kmeans.Engine(shards, counts, load, device)


def _fit_on(
    engine: gpu_kmeans.Engine,
    space: _ClusteringSpace,
    seeds: NDArray[np.float32],
    iterations: int,
    on_iteration: Callable[[int, float], None] | None,
    state: IterationState | None,
    keep: Callable[[int, Callable[[], IterationState]], None],
) -> Clusters:
    from ktray.clustering import gpu_kmeans

    found = gpu_kmeans.iterate(
        engine, space.grid.whole(seeds), space.grid, iterations, plan_repairs, on_iteration,
        start=vars(state) if state else None, keep=lambda updates, fields: keep(updates, lambda: IterationState(**fields())),
    )  # fmt: skip
    codebook = Codebook(space.grid, found.points)
    updates = len(found.inertia) - 1
    state_of = found.inertia, found.empty, found.sizes, found.labels
    return Clusters(codebook, *state_of, updates, found.converged, found.decided_again)


def _iterate(
    initial: NDArray[np.int64],
    groups: list[list[Path]],
    iterations: int,
    space: _ClusteringSpace,
    pool: Pool,
    on_iteration: Callable[[int, float], None] | None,
    state: IterationState | None,
    keep: Callable[[int, Callable[[], IterationState]], None],
) -> Clusters:
    centroids, previous = _Centroids.of(initial, space), None
    sums, sizes = np.zeros(initial.shape), np.zeros(len(initial), np.int64)
    inertia: list[float] = []
    empty: list[int] = []
    searched, unclear = 0, 0
    if state:
        centroids, previous = _Centroids.of(state.points, space), _Centroids.of(state.previous, space)
        inertia, empty, searched, unclear = list(state.inertia), list(state.empty), state.searched, state.unclear
        for change in pool.map(_sum_change, groups, (space, previous, None)):  # the workers know labels again, too
            sums, sizes = sums + change.sums, sizes + change.counts
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
            again, labels = unclear / max(1, searched), np.concatenate(pool.map(_labels, groups, (space, centroids)))
            updates = len(inertia) - 1
            return Clusters(centroids.codebook, tuple(inertia), tuple(empty), sizes, labels, updates, converged, again)
        repaired_sums, repaired_sizes = _repaired(sums, sizes, centroids, groups, space, pool) if empty[-1] else (sums, sizes)
        previous, centroids = centroids, _Centroids.of(_means(repaired_sums, repaired_sizes, centroids.codebook), space)
        points = centroids.codebook.points, previous.codebook.points
        reached = IterationState(*points, tuple(inertia), tuple(empty), searched, unclear)
        keep(len(inertia), lambda reached=reached: reached)  # type: ignore[misc]


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
    cache = _cache_of(space)
    labels_of, previous_labels_of = _Labelling(centroids, cache), _Labelling(previous, cache) if previous else None
    points = centroids.codebook.points
    sums, counts = np.zeros(points.shape), np.zeros(len(points), np.int64)
    additions = _Additions(sums, counts)
    squares, relabelled = 0, 0
    for shard in group:
        rows, square = _rows(shard, space, cache)
        old = previous_labels_of(shard, rows) if previous_labels_of else None
        labels = labels_of(shard, rows)
        relabelled += additions.add(rows, labels, old)
        progress.advance("shards")
        squares += square
    additions.flush()
    return _SumChange(sums, counts, squares, relabelled, labels_of.searched, labels_of.unclear)


def _labels(group: list[Path], shared: tuple[_ClusteringSpace, _Centroids]) -> NDArray[np.int32]:
    """The labels of the rows of some shards, mostly those that this worker has found last."""
    space, centroids = shared
    cache = _cache_of(space)
    labels_of = _Labelling(centroids, cache)
    found = [labels_of.known(shard) for shard in group]
    each = [
        labels_of(shard, _rows(shard, space, cache)[0]) if had is None else had for shard, had in zip(group, found, strict=True)
    ]
    return np.concatenate(each).astype(np.int32)


def _farthest_rows(
    group: list[Path], shared: tuple[_ClusteringSpace, _Centroids, NDArray[np.int64], int]
) -> list[tuple[int, int, NDArray[np.float32]]]:
    """Up to `count` distinct rows of each shard as (squared distance, label, row), farthest from their centroid first.

    Rows that coincide with their centroid, and the only row of a cluster, are left out.
    """
    space, centroids, sizes, count = shared
    cache = _cache_of(space)
    labels_of = _Labelling(centroids, cache)
    found: list[tuple[int, int, NDArray[np.float32]]] = []
    for shard in group:
        rows, _ = _rows(shard, space, cache)
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


class _Additions:
    """Rows that are added to the sums of their new clusters and subtracted from those of the old ones, in place.

    Rows of several shards are added at a time, since each product touches all sums.
    """

    def __init__(self, sums: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        self.sums, self.counts = sums, counts
        width = sums.shape[1]
        room = max(1, min(max(_FEWEST_ADDED, 4 * sums.size), _MOST_ADDED) // width)
        self._rows = np.empty((room, width))
        self._entries: list[tuple[NDArray[np.int64], NDArray[np.float64]]] = []  # clusters and signs, (n, 1) or (n, 2)
        self._waiting = 0

    def add(self, rows: NDArray[np.float32], labels: NDArray[np.int64], old: NDArray[np.int64] | None) -> int:
        """Add rows (n, d) with new and old labels; without old ones all are added. Returns how many changed theirs."""
        k = len(self.counts)
        np.add(self.counts, np.bincount(labels, minlength=k), out=self.counts)
        if old is not None:
            np.subtract(self.counts, np.bincount(old, minlength=k), out=self.counts)
        relabelled = np.arange(len(rows)) if old is None else np.flatnonzero(labels != old)
        start = 0
        while start < len(relabelled):
            part = relabelled[start : start + len(self._rows) - self._waiting]
            self._rows[self._waiting : self._waiting + len(part)] = rows[part]
            clusters = labels[part][:, None] if old is None else np.stack([labels[part], old[part]], axis=1)
            self._entries.append((clusters, np.tile([1.0, -1.0][: clusters.shape[1]], (len(part), 1))))
            start, self._waiting = start + len(part), self._waiting + len(part)
            if self._waiting == len(self._rows):
                self.flush()
        return len(relabelled)

    def flush(self) -> None:
        """Add what waits."""
        from scipy.sparse import csc_matrix

        if not self._waiting:
            return
        ends = np.concatenate([[0], *(np.full(len(each), each.shape[1]) for each, _ in self._entries)]).cumsum()
        clusters, signs = (np.concatenate([each[place].ravel() for each in self._entries]) for place in (0, 1))
        entries = csc_matrix((signs, clusters, ends), shape=(len(self.counts), self._waiting))
        self.sums += entries @ self._rows[: self._waiting]
        self._entries, self._waiting = [], 0


_ShardKey = tuple[str, fingerprint.FileVersion]


@dataclass
class _Cache:
    """What a worker keeps of one space.

    Attributes:
        space_key: of the space.
        rows: shard -> its rows on the grid, and their sum of |x|^2 in squared steps.
        labels: shard -> digest of the centroids, and the labels under them.
        coarse: shard -> what the search for the nearest centroid takes instead of the rows.
        basis: of the first rows that were searched for.
        uses_basis: False once the leading directions turned out to exclude too few centroids.
    """

    space_key: str
    rows: dict[_ShardKey, tuple[NDArray[np.float32], int]] = field(default_factory=dict)
    labels: dict[_ShardKey, tuple[bytes, NDArray[np.int32]]] = field(default_factory=dict)
    coarse: dict[_ShardKey, lower_bounds.CoarseRows] = field(default_factory=dict)
    basis: lower_bounds.Basis | None = None
    uses_basis: bool = True

    def screened(self, key: _ShardKey, rows: NDArray[np.float32], k: int) -> lower_bounds.CoarseRows | None:
        """What a search among k centroids takes instead of these rows of a shard; None where it needs the rows themselves."""
        self.uses_basis = self.uses_basis and lower_bounds.basis_may_pay(rows.shape[1], k)
        if not self.uses_basis and not lower_bounds.has_bfloat16():
            return None
        if self.uses_basis and self.basis is None:
            self.basis = lower_bounds.Basis.of(rows)
        basis = self.basis if self.uses_basis else None
        found = self.coarse.get(key)
        if found is None or found.basis is not basis:
            kept = sum(each.bytes for each in self.coarse.values())
            found = lower_bounds.coarse(rows, basis, _COARSE_BYTES - kept)
            self.coarse[key] = found
        return found


_cache = _Cache("")
_lock = threading.Lock()


def _cache_of(space: _ClusteringSpace) -> _Cache:
    """The cache of a space; it replaces that of another one."""
    global _cache
    with _lock:
        if _cache.space_key != space.key:
            _cache = _Cache(space.key)
        return _cache


def _shard_key(shard: Path) -> _ShardKey:
    return str(shard), fingerprint.file_version(shard.stat())


def _rows(shard: Path, space: _ClusteringSpace, cache: _Cache) -> tuple[NDArray[np.float32], int]:
    """The rows of a shard on the grid, and their sum of |x|^2 in squared steps."""
    key = _shard_key(shard)
    found = cache.rows.get(key)
    if found is None:
        rows = space.grid.rows(apply(space.projection, finite_rows(shard)))
        found = rows, grid.sum_of_squares(rows, space.grid)
        with _lock:
            used = sum(cached.nbytes for cached, _ in cache.rows.values())
            if used + rows.nbytes <= CACHE_BYTES:
                cache.rows[key] = found
    return found


class _Labelling:
    """Labels of shards under some centroids, from the cache if its latest entry was made with the same centroids."""

    def __init__(self, centroids: _Centroids, cache: _Cache) -> None:
        self.centroids, self.cache, self.searched, self.unclear = centroids, cache, 0, 0
        self._exhaustive: nearest_centroids.Search | None = None
        self._bounded: lower_bounds.Search | None = None

    def known(self, shard: Path) -> NDArray[np.int64] | None:
        """The labels of a shard that are in the cache; None if there are none, or of other centroids."""
        digest, cached = self.cache.labels.get(_shard_key(shard), (b"", None))
        return cached.astype(np.int64) if cached is not None and digest == self.centroids.digest else None

    def __call__(self, shard: Path, rows: NDArray[np.float32]) -> NDArray[np.int64]:
        known, key = self.known(shard), _shard_key(shard)
        if known is not None:
            return known
        labels, unclear = self._search(key, rows)
        self.searched, self.unclear = self.searched + len(rows), self.unclear + unclear
        self.cache.labels[key] = self.centroids.digest, labels.astype(np.int32)
        return labels

    def _search(self, key: _ShardKey, rows: NDArray[np.float32]) -> tuple[NDArray[np.int64], int]:
        codebook = self.centroids.codebook
        screened = self.cache.screened(key, rows, len(codebook.points))
        if screened is None:
            self._exhaustive = self._exhaustive or nearest_centroids.search_among(codebook)
            numbers, unclear = self._exhaustive(rows)
            return numbers[:, 0], unclear
        if self._bounded is None or self._bounded.basis is not screened.basis:
            self._bounded = lower_bounds.Search(codebook, screened.basis)
        found = self._bounded(rows, screened)
        self.cache.uses_basis = self.cache.uses_basis and self._bounded.basis_pays()
        return found


def _release_cache(_: int, space_key: str) -> None:
    """Free the worker's cache; a worker that misses this call frees it when the next space arrives."""
    global _cache
    with _lock:
        if _cache.space_key == space_key:
            _cache = _Cache("")
