"""The workers' side of k-means: rows kept in memory, labels, and the exact change of each cluster's sum.

Nothing here is remembered that could not be computed again from the arguments; memory only saves time.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import progress
from ktray.clustering.nearest_centroids import Search, search_among, squared_distances
from ktray.clustering.projection import apply, finite_rows
from ktray.ops import blas

CACHE_BYTES = 8 << 30  # of projected rows that one worker keeps between iterations; more rows are projected again each time


@dataclass(frozen=True)
class ClusteringSpace:
    """Where rows and centroids live: projected, minus `centre`, rows rounded to multiples of `grid`; `key` names all of that.

    Attributes:
        projection: from `projection.fit`, or empty.
        centre: (d,) float32, the mean of the projected rows: the expanded |x - c|^2 loses digits when the origin is far away.
        grid: a power of two so coarse that any sums and differences of the rows are exact in float64.
        key: sha256 hex of the three above.
    """

    projection: Mapping[str, NDArray[Any]]
    centre: NDArray[np.float32]
    grid: float
    key: str

    @classmethod
    def of(cls, projection: Mapping[str, NDArray[Any]], centre: NDArray[np.float32], grid: float) -> ClusteringSpace:
        digest = hashlib.sha256(centre.tobytes() + np.float64(grid).tobytes())
        for name in sorted(projection):
            digest.update(name.encode() + np.asarray(projection[name]).tobytes())
        return cls(projection, centre, grid, digest.hexdigest())


@dataclass(frozen=True)
class Centroids:
    """(K, d) float32 centroids in a space, and the digest of both by which a worker knows labels that it made with them."""

    values: NDArray[np.float32]
    digest: bytes

    @classmethod
    def of(cls, values: NDArray[np.float32], space: ClusteringSpace) -> Centroids:
        return cls(values, hashlib.blake2b(space.key.encode() + values.tobytes(), digest_size=16).digest())


@dataclass(frozen=True)
class SumChange:
    """What the new centroids changed for some rows.

    Attributes:
        sums: (K, d) float64, what was added to the sum of each cluster's rows; exact.
        counts: (K,) int64, the same for the number of rows.
        squares: sum of |x|^2 of each shard.
        relabelled: rows whose label differs from the one under the previous centroids.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.int64]
    squares: list[float]
    relabelled: int


def sum_change(group: list[Path], shared: tuple[ClusteringSpace, Centroids, Centroids | None]) -> SumChange:
    """What the centroids of this iteration change for the rows of some shards.

    Args:
        shared: the space, the centroids, and those of the iteration before (None: there is none, so every row moves).
    """
    space, centroids, before = shared
    labels_of = _labels_under(centroids)
    labels_before = _labels_under(before) if before else None
    total = SumChange(np.zeros(centroids.values.shape), np.zeros(len(centroids.values), np.int64), [], 0)
    moved = 0
    for shard in group:
        rows, square = _rows(shard, space)
        old = labels_before(shard, rows) if labels_before else None
        labels = labels_of(shard, rows)
        moved += _add(total, rows, labels, old)
        progress.moved("shards")
        total.squares.append(square)
    return SumChange(total.sums, total.counts, total.squares, moved)


def farthest_rows(
    group: list[Path], shared: tuple[ClusteringSpace, Centroids, NDArray[np.int64], int]
) -> list[tuple[float, int, NDArray[np.float32]]]:
    """Per shard up to `count` distinct rows as (squared distance, label, row), the farthest from its centroid first.

    Left out: rows that are their centroid, and the only rows of their clusters.
    """
    space, centroids, counts, count = shared
    labels_of = _labels_under(centroids)
    found: list[tuple[float, int, NDArray[np.float32]]] = []
    for shard in group:
        rows, _ = _rows(shard, space)
        labels = labels_of(shard, rows)
        distances = squared_distances(rows, centroids.values, labels)
        distances[counts[labels] == 1] = 0
        seen: set[bytes] = set()
        for index in np.argsort(-distances, kind="stable"):
            if len(seen) == count or distances[index] == 0:
                break
            if (content := rows[index].tobytes()) not in seen:
                seen.add(content)
                found.append((float(distances[index]), int(labels[index]), rows[index].copy()))
    return found


def read_rows(item: tuple[Path, NDArray[np.int64]], space: ClusteringSpace) -> NDArray[np.float32]:
    """The rows of a shard with these numbers (m,): (m, d)."""
    shard, numbers = item
    return _rows(shard, space)[0][numbers]


def _add(total: SumChange, rows: NDArray[np.float32], labels: NDArray[np.int64], old: NDArray[np.int64] | None) -> int:
    """Adds the moved rows to their new clusters and takes them from the old ones, in place; returns how many."""
    from scipy.sparse import csc_matrix

    k = len(total.counts)
    np.add(total.counts, np.bincount(labels, minlength=k), out=total.counts)
    if old is None:
        for start in range(0, len(rows), blas.CHUNK_ROWS):
            wide = rows[start : start + blas.CHUNK_ROWS].astype(np.float64)
            n = len(wide)
            signs = csc_matrix((np.ones(n), labels[start : start + n], np.arange(n + 1)), shape=(k, n))
            np.add(total.sums, signs @ wide, out=total.sums)
        return len(rows)
    np.subtract(total.counts, np.bincount(old, minlength=k), out=total.counts)
    moved = np.flatnonzero(labels != old)
    n = len(moved)
    if n:
        places = np.stack([labels[moved], old[moved]], axis=1).ravel()
        signs = csc_matrix((np.tile([1.0, -1.0], n), places, np.arange(0, 2 * n + 1, 2)), shape=(k, n))
        np.add(total.sums, signs @ rows[moved].astype(np.float64), out=total.sums)
    return n


_ShardKey = tuple[str, int, int]
_cached_rows: dict[_ShardKey, tuple[NDArray[np.float32], float]] = {}
_cached_labels: dict[_ShardKey, tuple[bytes, NDArray[np.int32]]] = {}
_cached_space = ""
_lock = threading.Lock()


def _shard_key(shard: Path) -> _ShardKey:
    stat = shard.stat()
    return str(shard), stat.st_mtime_ns, stat.st_size


def _rows(shard: Path, space: ClusteringSpace) -> tuple[NDArray[np.float32], float]:
    """The rows of a shard in `space` and their sum of squares, from memory if it has them; it holds one space at a time."""
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
        used = sum(each.nbytes for each, _ in _cached_rows.values())
        if _cached_space == space.key and used + rows.nbytes <= CACHE_BYTES:
            _cached_rows[key] = rows, square
    return rows, square


def _labels_under(centroids: Centroids) -> Callable[[Path, NDArray[np.float32]], NDArray[np.int64]]:
    """Labels of a shard's rows under `centroids`, from memory if they were the last that were made here."""
    nearest: Search | None = None

    def labels_of(shard: Path, rows: NDArray[np.float32]) -> NDArray[np.int64]:
        nonlocal nearest
        key = _shard_key(shard)
        digest, known = _cached_labels.get(key, (b"", None))
        if known is not None and digest == centroids.digest:
            return known.astype(np.int64)
        nearest = nearest or search_among(centroids.values)
        labels = nearest(rows)[:, 0]
        _cached_labels[key] = centroids.digest, labels.astype(np.int32)
        return labels

    return labels_of


def release_cache(_: int, key: str) -> None:
    """Frees a worker's memory; one that this call does not reach frees it when it next meets another space."""
    with _lock:
        if _cached_space == key:
            _cached_rows.clear()
            _cached_labels.clear()
