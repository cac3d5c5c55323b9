"""The nearest centroids of rows: a function of the row and the centroids alone, whatever BLAS multiplies.

A float32 product is fast, but its last bits depend on the kernel, and with some kernels on the row's place in the block. So
it only screens: a row whose order is clear by more than the rounding can explain keeps it, and every other row compares
those centroids that may be nearest by their float64 distances, each summed in a fixed order. About one row in twenty is
compared twice at D = 512 and K = 1000, which costs 2 % of the time.

Legend: n rows, d width, K centroids, m nearest wanted.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ktray.ops import blas

IDENTITY, REVISION = "nearest_centroids", 1

_PAIR_VALUES = 1 << 18  # float64 values that differences of rows and centroids hold at once: 2 MB, which stays in the cache

Search = Callable[..., NDArray[np.int64]]


def search_among(centroids: NDArray[np.float32]) -> Search:
    """A function of rows (n, d) float32 and m = 1: the numbers (n, m) int64 of the m nearest of the centroids (K, d).

    The nearest comes first, and the lower number where two squared distances are equal in float64.

    Why the screening is safe: with u = 2**-24, x a row and c a centroid after the centring below, a product of width d errs
    by at most gamma_d 2 |x| |c|, gamma_d = d u / (1 - d u), in any order of summation (Higham, Accuracy and Stability of
    Numerical Algorithms, 2002, section 3.1). The rounding of norms, sums and the centring itself, and that of the float64
    distances, are below 6 u (|x|^2 + |c|^2). With 2 |x| |c| <= |x|^2 + |c|^2 and bound = gamma_(d+8), every score is within
    bound (|x|^2 + 2 |c|^2) of |x - c|^2 - |x|^2. The part with |c|^2 is taken off the norms beforehand, so that no pass
    over all scores is needed for it: scores are lower bounds, and those of far centroids do not widen the others'.
    """
    centre = centroids.mean(axis=0, dtype=np.float64).astype(np.float32)  # near the origin fewer digits cancel
    centred = centroids - centre
    minus_twice = np.ascontiguousarray((-2 * centred).T)
    squares = blas.squared_lengths(centred)
    terms = (centroids.shape[1] + 8) * 2.0**-24
    bound = terms / (1 - terms)
    lower = (squares * (1 - 2 * bound)).astype(np.float32)
    near_block = np.empty((blas.CHUNK_ROWS, centroids.shape[1]), np.float32)
    score_block = np.empty((blas.CHUNK_ROWS, len(centroids)), np.float32)

    def nearest(rows: NDArray[np.float32], m: int = 1) -> NDArray[np.int64]:
        numbers = np.empty((len(rows), m), np.int64)
        with blas.one_thread():
            for start in range(0, len(rows), blas.CHUNK_ROWS):
                piece = rows[start : start + blas.CHUNK_ROWS]
                each = np.arange(len(piece))
                near = np.subtract(piece, centre, out=near_block[: len(piece)])
                scores = np.matmul(near, minus_twice, out=score_block[: len(piece)])
                scores += lower
                best = numbers[start : start + len(piece)]
                lowest = np.empty((len(piece), m + 1), np.float32)
                for place in range(m):  # m is small: a pass for each is cheaper than sorting all K
                    best[:, place] = scores.argmin(axis=1)
                    lowest[:, place] = scores[each, best[:, place]]
                    scores[each, best[:, place]] = np.inf
                lowest[:, m] = scores.min(axis=1)
                lengths = np.einsum("nd,nd->n", near, near).astype(np.float64) * (1 + 2 * bound)  # not below the true ones
                highest = lowest[:, :m] + 2 * bound * (lengths[:, None] + 2 * squares[best])
                unclear = np.flatnonzero(~(lowest[:, 1:] > highest).all(axis=1))  # "not greater": also if one overflowed
                if len(unclear):
                    scores[each[:, None], best] = lowest[:, :m]
                    possible = ~(scores[unclear] > highest[unclear].max(axis=1)[:, None])
                    best[unclear] = _nearest_of(possible, piece[unclear], centroids, m)
        return numbers

    return nearest


def _nearest_of(
    possible: NDArray[np.bool_], rows: NDArray[np.float32], centroids: NDArray[np.float32], m: int
) -> NDArray[np.int64]:
    """The m nearest (n, m) of those centroids that are possible (n, K) for each row, at least m of them."""
    pairs = np.nonzero(possible)
    order = np.lexsort((pairs[1], _squared_distances(rows, centroids, *pairs), pairs[0]))
    first = np.searchsorted(pairs[0], np.arange(len(rows)))
    nearest: NDArray[np.int64] = pairs[1][order[first[:, None] + np.arange(m)]]
    return nearest


def squared_distances(
    rows: NDArray[np.float32], centroids: NDArray[np.float32], numbers: NDArray[np.integer]
) -> NDArray[np.float64]:
    """|x - c|^2 of each row (n, d) and its centroids, of (K, d), with these numbers: float64, of the shape of `numbers`,
    which is (n,) or (n, m)."""
    places = np.arange(numbers.size) // max(1, numbers.size // max(1, len(rows)))
    return _squared_distances(rows, centroids, places, numbers.ravel()).reshape(numbers.shape)


def _squared_distances(
    rows: NDArray[np.float32], centroids: NDArray[np.float32], places: NDArray[np.integer], numbers: NDArray[np.integer]
) -> NDArray[np.float64]:
    """|rows[places] - centroids[numbers]|^2 in float64, each summed in an order that depends on d alone: (len(places),)."""
    squared = np.empty(len(places))
    step = max(1, _PAIR_VALUES // max(1, rows.shape[1]))
    for start in range(0, len(places), step):
        part = slice(start, start + step)
        apart = rows[places[part]].astype(np.float64)
        apart -= centroids[numbers[part]]
        squared[part] = blas.squared_lengths(apart)
    return squared
