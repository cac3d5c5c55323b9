"""The projection of features before clustering: L2 -> PCA -> whitening -> L2, each step optional.

Rows are rounded to whole numbers for the moments, whose sums are then exact, so the projection is bitwise identical for any
number of workers and any BLAS. Only the eigenvectors are LAPACK's: their last digits may depend on its version and on the
processor's kernels. `made_by` names both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import progress
from ktray.checksums import intact
from ktray.ops import blas
from ktray.pool import Pool
from ktray.text import counted

IDENTITY, REVISION = "projection", 3

_WHITEN_FLOOR = 1e-7  # of the largest variance; in float32 features, a smaller variance is rounding noise
_MOST_BITS = 21  # of a whole number for the moments: products of 1,024 rows are then exact in float64
_SAMPLE_ROWS = 1024
_BLOCK_BYTES = 2 << 30  # memory for second moments at a time; the number of blocks is limited to 4 to 64


def fit(
    shards: Sequence[Path], *, l2: bool, pca: int | None, whiten: bool, l2_after: bool, pool: Pool, device: str = "cpu"
) -> dict[str, NDArray[Any]]:
    """Fit the projection for `apply`, as arrays for an npz file.

    If `pca` is at least the feature width D, or with whitening but no `pca`, all D directions are kept; the result marks this
    as a rotation. Whitening divides by the standard deviation, or by sqrt(1e-7) times the largest one if that is more, so
    directions without variance (dead units) stay near zero. Signs are chosen so that each component's largest entry is
    positive.

    Args:
        shards: files of (n, D) float32 or float16 features.
        l2: divide each row by its length first; a row of zeros is kept.
        pca: number of principal components kept, >= 1, or None.
        whiten: scale each component to unit variance.
        l2_after: divide each projected row by its length.
        device: torch device; CUDA multiplies the second moments, otherwise the pool's workers do. It changes no result.

    Returns:
        `l2`, `l2_after` bool, `rotation` bool (all directions kept); with PCA or whitening also `mean` (D,) float32,
        `components` (d, D) float32, `scale` (d,) float32, `explained` (d,) float64, the share of the variance, and `made_by`.

    Raises:
        ValueError: a feature is not finite, or all rows are equal.
    """
    result: dict[str, NDArray[Any]] = {"l2": np.array(l2), "l2_after": np.array(l2_after), "rotation": np.array(False)}
    if pca is None and not whiten:
        return result
    width = np.load(intact(shards[0]), mmap_mode="r", allow_pickle=False).shape[1]
    kept = width if pca is None else min(pca, width)
    mean, covariance = _moments(shards, width, l2, pool, device)
    variances, components = _principal(covariance, kept)
    total = float(np.trace(covariance))
    scale = 1 / np.sqrt(np.maximum(variances, _WHITEN_FLOOR * variances[0])) if whiten else np.ones(kept)
    return result | {
        "rotation": np.array(kept == width),
        "mean": mean.astype(np.float32),
        "components": components.astype(np.float32),
        "scale": scale.astype(np.float32),
        "explained": np.maximum(variances, 0) / total,
        "made_by": np.array(blas.description()),
    }


def apply(projection: Mapping[str, NDArray[Any]], rows: NDArray[Any]) -> NDArray[np.float32]:
    """(n, D) features of any float type, projected to (n, d) float32; rows do not depend on their batch.

    An empty `projection` only converts the type.
    """
    if not projection:
        return rows.astype(np.float32, copy=False)
    if "components" not in projection:
        normalise = bool(projection["l2"]) or bool(projection["l2_after"])
        return _unit(rows.astype(np.float32)) if normalise else rows.astype(np.float32)
    mean, components = projection["mean"], projection["components"].T
    projected = np.empty((len(rows), components.shape[1]), np.float32)
    for start in range(0, len(rows), blas.CHUNK_ROWS):
        piece = rows[start : start + blas.CHUNK_ROWS].astype(np.float32, copy=False)
        centred = (_unit(piece) if projection["l2"] else piece) - mean
        out = (blas.exact_product(centred, components) * projection["scale"]).astype(np.float32)
        projected[start : start + blas.CHUNK_ROWS] = _unit(out) if projection["l2_after"] else out
    return projected


def load(path: Path) -> dict[str, NDArray[Any]]:
    """The projection in an npz file."""
    with np.load(intact(path), allow_pickle=False) as file:
        return dict(file)


def finite_rows(path: Path) -> NDArray[np.float32]:
    """The (n, D) features of a shard as float32.

    Raises:
        ValueError: a feature is not finite; the message names the shard and the first such row.
    """
    rows: NDArray[np.float32] = np.load(intact(path), allow_pickle=False).astype(np.float32, copy=False)
    finite = np.isfinite(rows)
    if not finite.all():
        bad = np.flatnonzero(~finite.all(axis=1))
        raise ValueError(f"{path.name}: {counted(len(bad), 'row is', 'rows are')} not finite, the first is row {bad[0]}")
    return rows


def _unit(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    length = np.sqrt(blas.squared_lengths(rows)).astype(np.float32)
    length[length == 0] = 1
    return rows / length[:, None]


def sample(
    shards: Sequence[Path],
    counts: Sequence[int],
    numbers: NDArray[np.int64],
    projection: Mapping[str, NDArray[Any]],
    pool: Pool,
) -> NDArray[np.float32]:
    """The projected rows with these numbers, in this order.

    Args:
        counts: number of rows of each shard.
    """
    starts = np.concatenate([[0], np.cumsum(counts)])
    shard_of = np.searchsorted(starts, numbers, side="right") - 1
    visited = np.unique(shard_of)
    read = pool.map(_read_rows, [(shards[index], numbers[shard_of == index] - starts[index]) for index in visited], projection)
    found = np.empty((len(numbers), read[0].shape[1]), np.float32)
    for index, rows in zip(visited, read, strict=True):
        found[shard_of == index] = rows
    return found


def _read_rows(item: tuple[Path, NDArray[np.int64]], projection: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    """The projected rows (m, d) of a shard with these numbers (m,)."""
    shard, numbers = item
    return apply(projection, np.load(intact(shard), mmap_mode="r", allow_pickle=False)[numbers])


def centre_and_radius(
    shards: Sequence[Path],
    projection: Mapping[str, NDArray[Any]],
    pool: Pool,
    largest: Callable[[NDArray[np.float32]], float] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32], float]:
    """A sample (n, d) of the projected rows, its centre (d,), and the largest distance of any row from it in a coordinate.

    Args:
        largest: what finds that distance for a centre; None for the pool's workers.

    The sample are at most 1,024 evenly spaced rows. The centre is the median of each column, the lower one of two: a value of
    the sample, and not moved by outliers.

    Raises:
        ValueError: a feature is not finite, or all rows are equal.
    """
    counts = row_counts(shards)
    total = sum(counts)
    number = min(total, _SAMPLE_ROWS)
    rows = sample(shards, counts, np.arange(number) * total // number, projection, pool)
    centre: NDArray[np.float32] = np.partition(rows, (number - 1) // 2, axis=0)[(number - 1) // 2]
    radius = largest(centre) if largest else max(pool.map(_radius, list(shards), (projection, centre)))
    if not radius:
        raise ValueError(f"all {total} rows of the features are equal; there is nothing to cluster")
    return rows, centre, radius


def row_counts(shards: Sequence[Path]) -> list[int]:
    """The number of rows of each shard, from the head of its file."""
    return [len(np.load(intact(shard), mmap_mode="r", allow_pickle=False)) for shard in shards]


def _radius(shard: Path, shared: tuple[Mapping[str, NDArray[Any]], NDArray[np.float32]]) -> float:
    progress.advance("shards")
    projection, centre = shared
    rows = apply(projection, finite_rows(shard))
    low, high = rows.min(axis=0).astype(np.float64), rows.max(axis=0).astype(np.float64)
    return float(max((high - centre).max(), (centre - low).max()))


def _moments(
    shards: Sequence[Path], width: int, l2: bool, pool: Pool, device: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean (D,) and covariance (D, D), with denominator N - 1, of all rows; both float64.

    Rows are centred and rounded to whole numbers of b bits. A product of 1,024 rows is exact in float64, as 2 b + 10 <= 52,
    and the sum of all products in int64, as 2 b + log2 N <= 62. What follows is elementwise, so the same everywhere.
    """
    normalised = {"l2": np.array(l2), "l2_after": np.array(False)}
    _, centre, radius = centre_and_radius(shards, normalised, pool)
    bits = min(_MOST_BITS, (62 - (sum(row_counts(shards)) - 1).bit_length()) // 2)
    step = 2.0 ** (math.frexp(radius)[1] - bits)
    shared = normalised, centre, step
    if device.startswith("cuda"):
        count, total, second = _moments_on(device, shards, shared)
    else:
        number = min(64, max(4, _BLOCK_BYTES // (8 * width * width)))
        blocks = [list(block) for block in np.array_split(np.array(shards, object), min(number, len(shards)))]
        count, total, second = 0, np.zeros(width, np.int64), np.zeros((width, width), np.int64)
        for rows, row_sum, product in pool.map(_block_moments, blocks, shared):
            count, total = count + rows, total + row_sum
            second += product
    mean = total / count
    covariance = (second - np.outer(mean, total)) / max(count - 1, 1)
    return centre + mean * step, covariance * step**2


def _block_moments(
    block: list[Path], shared: tuple[Mapping[str, NDArray[Any]], NDArray[np.float32], float]
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    normalised, centre, step = shared
    width = len(centre)
    count, total, second = 0, np.zeros(width, np.int64), np.zeros((width, width), np.int64)
    with blas.one_thread():
        for shard in block:
            progress.advance("shards")
            rows = finite_rows(shard)
            for start in range(0, len(rows), blas.CHUNK_ROWS):
                piece = apply(normalised, rows[start : start + blas.CHUNK_ROWS])
                whole = np.rint((piece.astype(np.float64) - centre) / step)
                count, total = count + len(whole), total + whole.sum(axis=0).astype(np.int64)
                second += (whole.T @ whole).astype(np.int64)
    return count, total, second


def _moments_on(
    device: str, shards: Sequence[Path], shared: tuple[Mapping[str, NDArray[Any]], NDArray[np.float32], float]
) -> tuple[int, NDArray[np.int64], NDArray[np.int64]]:
    """As `_block_moments`, by exact products on a torch device."""
    import torch

    normalised, centre, step = shared
    width, middle = len(centre), torch.from_numpy(centre).to(device, torch.float64)
    count, total = 0, torch.zeros(width, dtype=torch.int64, device=device)
    second = torch.zeros(width, width, dtype=torch.int64, device=device)
    for shard in shards:
        progress.advance("shards")
        rows = torch.from_numpy(apply(normalised, finite_rows(shard))).to(device)
        count += len(rows)
        for piece in rows.split(blas.CHUNK_ROWS):
            whole = torch.round((piece.to(torch.float64) - middle) / step)
            total += whole.sum(dim=0).to(torch.int64)
            second += (whole.T @ whole).to(torch.int64)
    return count, total.cpu().numpy(), second.cpu().numpy()


def _principal(covariance: NDArray[np.float64], kept: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The `kept` largest variances in descending order, and their directions (kept, D)."""
    from scipy.linalg import eigh

    width = len(covariance)
    with blas.one_thread():
        values, vectors = eigh(covariance, subset_by_index=[width - kept, width - 1])
    directions = vectors[:, ::-1].T
    largest = np.abs(directions).argmax(axis=1)
    signs = np.sign(directions[np.arange(kept), largest])
    return values[::-1], directions * signs[:, None]
