"""The grid of a clustering: rows and centroids as whole numbers, between which squared distances are exact.

Every number that decides something in a clustering is a whole number here, so it is the same on every processor, device and
number of workers. `docs/clustering.md` has the definition and the proofs.

Legend: n rows, N rows in all, d width after projection, K centroids, b bits of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ktray.checksums import intact
from ktray.ops import blas

IDENTITY, REVISION = "grid", 1

REACH = 2.0**10  # rows of other data may lie this many times as far from the centre as the clustered rows
_MOST_BITS, _FEWEST_BITS = 30, 16
_TYPICAL_STEPS = 2.0**10  # with fewer steps from the centre to a usual row, rounding would change inertia by over 1e-6
_SINGLE_EXPONENT = 64  # up to here nothing in float32 overflows or loses digits before it is rounded to the grid
_HALF_BITS, _SQUARED_VALUES = 15, 1 << 15  # of a whole number, and how many are squared at a time
_PAIR_VALUES = 1 << 18  # differences computed at a time: 2 MB, which fits in the processor cache


@dataclass(frozen=True)
class Grid:
    """A grid around a centre.

    Attributes:
        centre: (d,) float32, subtracted from every projected row.
        exponent: no clustered row is farther than 2**exponent from the centre in any coordinate.
        bits: the distance between grid points is 2**(exponent - bits), the grid's *step*.
    """

    centre: NDArray[np.float32]
    exponent: int
    bits: int

    @classmethod
    def around(cls, sample: NDArray[np.float32], centre: NDArray[np.float32], radius: float, total: int) -> Grid:
        """The grid for `total` rows, none of which is farther than `radius` > 0 from the centre (d,) in any coordinate.

        It is as fine as the exactness of all sums allows, but no finer than 2**-30 of the largest value.

        Args:
            sample: (n, d), some of the rows.

        Raises:
            ValueError: there are too many values for a useful grid, or a few rows are so far out that the grid is too coarse
                for the others.
        """
        exponent = math.frexp(radius)[1]
        bits = min(_MOST_BITS, 51 - (total - 1).bit_length(), 62 - 2 * (len(centre) - 1).bit_length())
        if bits < _FEWEST_BITS:
            raise ValueError(
                f"{total} rows of {len(centre)} features are too many for exact sums. Reduce the width by `pca`, or "
                "cluster fewer images."
            )
        deviations = np.abs(sample.astype(np.float64) - centre).max(axis=1, initial=0)
        usual = float(np.median(deviations[deviations > 0])) if (deviations > 0).any() else radius
        if usual < _TYPICAL_STEPS * 2.0 ** (exponent - bits):
            raise ValueError(
                f"some features are {radius / usual:.2g} times as far from the centre as those of a usual image (largest "
                f"deviation {radius:.3g}, usually {usual:.3g}), and a grid that reaches them is too coarse for the rest. Look "
                "for broken features, or set `l2: true`, which gives every row the length 1."
            )
        return cls(centre, exponent, bits)

    def rows(self, projected: NDArray[np.float32], name: str = "the features") -> NDArray[np.float32]:
        """Projected rows (n, d) on the grid, as multiples of 2**-bits: in [-1, 1] for rows that were clustered.

        Args:
            name: of the rows, for the message of an error.

        Raises:
            ValueError: a row is farther out than `REACH`.
        """
        found = np.empty(projected.shape, np.float32)
        single = projected.dtype == np.float32 and abs(self.exponent) <= _SINGLE_EXPONENT
        for start in range(0, len(projected), blas.CHUNK_ROWS):
            piece = found[start : start + blas.CHUNK_ROWS]
            if single:  # one rounding to float32 gives what one to float64 and one to float32 give, as 53 >= 2 * 24 + 2
                with np.errstate(over="ignore"):  # infinity is refused below
                    np.subtract(projected[start : start + blas.CHUNK_ROWS], self.centre, out=piece)
                    piece *= np.float32(2.0 ** (self.bits - self.exponent))
            else:
                wide = projected[start : start + blas.CHUNK_ROWS].astype(np.float64)
                wide -= self.centre
                wide *= 2.0**-self.exponent
                piece[:] = wide.clip(-4 * REACH, 4 * REACH)  # so that float32 can represent it; it is refused below
                piece *= np.float32(2.0**self.bits)
            np.rint(piece, out=piece)
            piece *= np.float32(2.0**-self.bits)
            if piece.size and max(piece.max(), -piece.min()) > REACH:
                beyond = np.flatnonzero(np.abs(piece).max(axis=1) > REACH)
                raise ValueError(
                    f"{name}: row {start + beyond[0]} is more than {REACH:.0f} times as far from the centre as any row that "
                    "was clustered. Features must be made as those of the clusters were."
                )
        return found

    def whole(self, rows: NDArray[np.floating]) -> NDArray[np.int64]:
        """Rows (n, d) from `rows` as whole numbers of steps."""
        return (rows.astype(np.float64) * 2.0**self.bits).astype(np.int64)

    @property
    def square(self) -> float:
        """The square of the step: 1 in the units of squared whole numbers."""
        return 2.0 ** (2 * (self.exponent - self.bits))


@dataclass(frozen=True)
class Codebook:
    """Centroids on a grid: all that is needed to find the nearest cluster of a projected row.

    Attributes:
        grid: the grid of the clustering.
        points: (K, d) int64, the centroids in steps from the grid's centre.
    """

    grid: Grid
    points: NDArray[np.int64]

    @property
    def centroids(self) -> NDArray[np.float32]:
        """The centroids (K, d) in the projected space, rounded to float32."""
        return (self.points * 2.0 ** (self.grid.exponent - self.grid.bits) + self.grid.centre).astype(np.float32)

    @property
    def centroid_rows(self) -> NDArray[np.float64]:
        """The centroids (K, d) in the units of `Grid.rows`."""
        return np.multiply(self.points, 2.0**-self.grid.bits, dtype=np.float64)

    def save(self, path: Path) -> None:
        """Write the codebook to an npz file."""
        grid = self.grid
        np.savez(path, points=self.points.astype(np.int32), centre=grid.centre, exponent=grid.exponent, bits=grid.bits)

    @classmethod
    def load(cls, path: Path) -> Codebook:
        """The codebook in a file that `save` wrote."""
        with np.load(intact(path), allow_pickle=False) as file:
            grid = Grid(file["centre"], int(file["exponent"]), int(file["bits"]))
            return cls(grid, file["points"].astype(np.int64))


# Whole numbers of up to 2**126, as (high, low) with the value high * 2**64 + low and 0 <= low < 2**64.
# The low word comes from int64 arithmetic modulo 2**64, the high word from a float64 sum that is off by less than 2**62.
# Both are the same for any order of summation.

Words = tuple[NDArray[np.int64], NDArray[np.uint64]]


def squared_distances(
    rows: NDArray[np.floating], codebook: Codebook, row_of_pair: NDArray[np.integer], numbers: NDArray[np.integer]
) -> Words:
    """Exact squared distances (n_pairs,) in squared steps of rows[row_of_pair] and the centroids with these numbers.

    Args:
        rows: (n, d) from `Grid.rows`.
    """
    high, low = np.empty(len(row_of_pair), np.int64), np.empty(len(row_of_pair), np.uint64)
    step = max(1, _PAIR_VALUES // max(1, rows.shape[1]))
    for start in range(0, len(row_of_pair), step):
        part = slice(start, start + step)
        differences = codebook.grid.whole(rows[row_of_pair[part]])
        differences -= codebook.points[numbers[part]]
        high[part], low[part] = inner_products(differences, differences)
    return high, low


def inner_products(left: NDArray[np.int64], right: NDArray[np.int64]) -> Words:
    """The exact inner product of each row of `left` (n, d) and the same row of `right` (n, d)."""
    low = np.einsum("nd,nd->n", left, right).view(np.uint64)
    near = np.einsum("nd,nd->n", left.astype(np.float64), right.astype(np.float64))
    return np.rint((near - low.astype(np.float64)) * 2.0**-64).astype(np.int64), low


def sum_of_squares(rows: NDArray[np.floating], of_rows: Grid) -> int:
    """The sum of |x|^2 of clustered rows (n, d) from `Grid.rows`, in squared steps."""
    total = 0
    values = np.ascontiguousarray(rows).ravel()
    with blas.one_thread():
        for start in range(0, len(values), _SQUARED_VALUES):
            low = np.multiply(values[start : start + _SQUARED_VALUES], 2.0**of_rows.bits, dtype=np.float64)
            high = np.rint(low * 2.0**-_HALF_BITS)
            low -= high * 2.0**_HALF_BITS
            # Halves of at most 2^15: products of at most 2^30, of which 2^22 have an exact sum.
            total += int(high @ high) << 2 * _HALF_BITS
            total += int(high @ low) << _HALF_BITS + 1
            total += int(low @ low)
    return total


def total_of(words: Words) -> int:
    """The sum of whole numbers."""
    high, low = words
    lower = int((low & np.uint64(0xFFFFFFFF)).sum()) + (int((low >> np.uint64(32)).sum()) << 32)
    return (int(high.sum()) << 64) + lower


def as_float(words: Words) -> NDArray[np.float64]:
    """Whole numbers as float64; equal numbers give equal floats."""
    high, low = words
    return high.astype(np.float64) * 2.0**64 + low.astype(np.float64)
