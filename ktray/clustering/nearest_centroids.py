"""Nearest-centroid search: the numbers of the centroids with the smallest exact squared distances.

A float32 product is fast, but its last bits depend on the BLAS kernel, the number of threads and, with some kernels, on the
row's position in the block. It therefore only *screens*. If the gaps between the smallest scores exceed the error bound of the
product, the order is final. Otherwise all centroids that might be among the nearest are compared by exact whole numbers
(`grid.squared_distances`). So the result is a function of the row and the codebook alone, whatever did the screening.

Legend: n rows, d width, K centroids, m nearest centroids per row.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ktray.clustering import grid, lower_bounds
from ktray.clustering.grid import Codebook
from ktray.ops import blas

IDENTITY, REVISION = "nearest_centroids", 2
TOOLS = (grid,)

Search = Callable[..., tuple[NDArray[np.int64], int]]


def search_among(codebook: Codebook) -> Search:
    """A search function: rows (n, d) from `Grid.rows` and m (default 1) -> the m nearest of the K centroids, (n, m) int64,
    and the number of rows that the product could not decide.

    The nearest centroid comes first; of two that are equally near, the one with the lower number.

    Why the filter is safe: let u = 2**-24, x a row and c a centroid, in the units of `Grid.rows`. Their values are 0 or at
    least 2**-30, so no product underflows. A product of width d has an error of at most gamma_d 2 |x| |c| for any order of
    summation, gamma_d = d u / (1 - d u) (Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.1). Rounding
    x, c, the norms and the sums to float32 adds less than 8 u (|x|^2 + |c|^2). With 2 |x| |c| <= |x|^2 + |c|^2 and
    bound = gamma_(d+12), every score is within bound (|x|^2 + 2 |c|^2) of |x - c|^2 - |x|^2. The |c|^2 term of the error is
    subtracted from the norms in advance, which saves a pass over all scores: scores are lower bounds, and distant centroids
    do not widen the bounds of the others.
    """
    bounded = lower_bounds.Search(codebook, None) if lower_bounds.has_bfloat16() else None
    points = codebook.centroid_rows
    minus_twice = np.ascontiguousarray((-2 * points).T.astype(np.float32))
    squares = blas.squared_lengths(points)
    terms = (points.shape[1] + 12) * 2.0**-24
    bound = terms / (1 - terms)
    lower = (squares * (1 - 2 * bound)).astype(np.float32)
    score_block = np.empty((blas.CHUNK_ROWS, len(points)), np.float32)

    def search(rows: NDArray[np.floating], m: int = 1) -> tuple[NDArray[np.int64], int]:
        if bounded and m == 1 and rows.dtype == np.float32:
            labels, decided_again = bounded(rows, lower_bounds.coarse(rows, None))
            return labels[:, None], decided_again
        numbers, decided_again = np.empty((len(rows), m), np.int64), 0
        with blas.one_thread():
            for start in range(0, len(rows), blas.CHUNK_ROWS):
                piece = rows[start : start + blas.CHUNK_ROWS]
                every_row = np.arange(len(piece))
                single = piece.astype(np.float32, copy=False)
                scores = np.matmul(single, minus_twice, out=score_block[: len(piece)])
                scores += lower
                best = numbers[start : start + len(piece)]
                lowest = np.empty((len(piece), m + 1), np.float32)
                for place in range(m):  # m is small, so m passes are cheaper than sorting all K
                    best[:, place] = scores.argmin(axis=1)
                    lowest[:, place] = scores[every_row, best[:, place]]
                    scores[every_row, best[:, place]] = np.inf
                lowest[:, m] = scores.min(axis=1)
                lengths = np.einsum("nd,nd->n", single, single).astype(np.float64) * (1 + 2 * bound)  # upper bounds
                highest = lowest[:, :m] + 2 * bound * (lengths[:, None] + 2 * squares[best])
                unclear = np.flatnonzero(~(lowest[:, 1:] > highest).all(axis=1))
                decided_again += len(unclear)
                if len(unclear):
                    scores[every_row[:, None], best] = lowest[:, :m]
                    possible = ~(scores[unclear] > highest[unclear].max(axis=1)[:, None])
                    best[unclear] = _nearest_of(possible, piece[unclear], codebook, m)
        return numbers, decided_again

    return search


def _nearest_of(possible: NDArray[np.bool_], rows: NDArray[np.floating], codebook: Codebook, m: int) -> NDArray[np.int64]:
    """The m nearest (n, m) among the possible centroids (n, K) of each row, of which there are at least m."""
    row_of_pair, numbers = np.nonzero(possible)
    high, low = grid.squared_distances(rows, codebook, row_of_pair, numbers)
    order = np.lexsort((numbers, low, high, row_of_pair))
    first = np.searchsorted(row_of_pair, np.arange(len(rows)))
    nearest: NDArray[np.int64] = numbers[order[first[:, None] + np.arange(m)]]
    return nearest


def nearest(rows: NDArray[np.floating], codebook: Codebook, count: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The `count` nearest centroids of each row, and the squared distances to them in the projected space: (n, count) each.

    Args:
        rows: (n, d) from `Grid.rows`.
        count: m, 1 <= m <= K.
    """
    numbers, _ = search_among(codebook)(rows, count)
    exact = grid.squared_distances(rows, codebook, np.repeat(np.arange(len(rows)), count), numbers.ravel())
    squared = (grid.as_float(exact) * codebook.grid.square).reshape(numbers.shape)
    return numbers.astype(np.int32), squared.astype(np.float32)
