"""Nearest centroids by lower bounds of squared distances, of which one cheap matrix product yields all.

Rows and centroids are replaced by shorter or coarser ones: their coefficients along the leading directions of the rows, or
themselves, in bfloat16 on processors that multiply it many times as fast as float32. What that leaves out is at most a sum of
three products of lengths (Cauchy-Schwarz), which are three more columns of the same product. A centroid whose lower bound is
above the distance of another one is not the nearest. Of most rows one centroid remains; the few others are compared by float32
inner products, and those that float32 cannot decide by exact whole numbers. `docs/clustering.md` has the proof.

Legend: n rows x, K centroids c, d width, q directions, w columns of the product.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktray.clustering import grid
from ktray.clustering.grid import Codebook
from ktray.ops import blas

DIRECTIONS = 128  # measured on Fashion-MNIST and network features: 64 leaves 2.5 times as many centroids, 256 cost more
_BASIS_ROWS = 2048
_EXTRA = 9  # columns after the coefficients: three for |x|^2, three for |c|^2, three for what the coefficients leave out
_ALIGNED = 32  # columns that the processor multiplies at a time
# Below these widths and numbers of centroids a product of the rows themselves is as fast. The shares are those of the centroids
# of which the inner product may be taken before it is faster: with AMX, bfloat16 products do 900 GFLOP/s, float32 products 140,
# and single inner products 15.
_FEWEST_FEATURES = {torch.bfloat16: 1024, torch.float32: 256}
_FEWEST_CENTROIDS = 64
_MOST_COMPARED = {torch.bfloat16: 0.02, torch.float32: 0.08}
_BLOCK_VALUES, _BLOCK_ROWS = 1 << 20, 4096  # lower bounds at a time, 2 MB in bfloat16, and rows, at most
_TINY = 2.0**-90  # absolute, above any product that underflows; squared distances are multiples of 2**-60


@dataclass(frozen=True)
class Basis:
    """Directions along which rows vary most.

    Attributes:
        directions: P (d, q) float32, about orthonormal.
        defect: at least the spectral norm of P'P - I.
    """

    directions: NDArray[np.float32]
    defect: float

    @classmethod
    def of(cls, rows: NDArray[np.float32]) -> Basis:
        """About the `DIRECTIONS` leading directions of some of the rows, by subspace iteration. Any others would do.

        Source: Halko, Martinsson, Tropp, Finding structure with randomness, SIAM Review 53(2), 2011, algorithm 4.4.
        """
        number = min(len(rows), _BASIS_ROWS)
        sample = rows[np.arange(number) * len(rows) // number]
        width = min(DIRECTIONS, rows.shape[1], number)
        found = np.random.default_rng(0).normal(size=(rows.shape[1], width)).astype(np.float32)
        with blas.one_thread():
            for _ in range(3):
                found = np.linalg.qr(sample.T @ (sample @ found))[0]
            wide = found.astype(np.float64)
            defect = float(np.linalg.norm(wide.T @ wide - np.eye(width)))
        return cls(found, defect + 2.0**-30)


@dataclass(frozen=True)
class Lengths:
    """What bounds the inner product of a row, or centroid, with another: all (n,) float64.

    With a the coefficients as they are stored, P the basis (or the identity) and s = x - P a:

    Attributes:
        squares: |x|^2.
        along: |a|.
        inside: at least |P's| + defect |a|.
        outside: at least |s|.
    """

    squares: NDArray[np.float64]
    along: NDArray[np.float64]
    inside: NDArray[np.float64]
    outside: NDArray[np.float64]

    def __getitem__(self, part: slice | NDArray[np.integer]) -> Lengths:
        return Lengths(self.squares[part], self.along[part], self.inside[part], self.outside[part])

    @classmethod
    def joined(cls, parts: list[Lengths]) -> Lengths:
        fields = ("squares", "along", "inside", "outside")
        return cls(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


@dataclass(frozen=True)
class CoarseRows:
    """Rows for the product.

    Attributes:
        basis: of the coefficients, or None.
        lengths: of the rows.
        inputs: (n, w), or None: they are made again for each search.
    """

    basis: Basis | None
    lengths: Lengths
    inputs: Tensor | None

    @property
    def bytes(self) -> int:
        return 0 if self.inputs is None else self.inputs.nbytes


@cache
def product_type() -> torch.dtype:
    """bfloat16 where the processor multiplies it faster than float32, and does so as the proof needs; else float32."""
    able = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if able and torch.backends.mkldnn.is_available() and _sums_in_float32() else torch.float32


def _sums_in_float32() -> bool:
    """Whether products of bfloat16 are summed in float32 and rounded once, on an example that shows other sums."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(64, 640, generator=generator).abs().to(torch.bfloat16) for _ in range(2))
    exact = left.double() @ right.double().T
    return bool(((left @ right.T).double() - exact).abs().le(exact * (2.0**-8 + 2.0**-12)).all())


def has_bfloat16() -> bool:
    """Whether the product takes bfloat16; otherwise it needs a basis to be faster than `nearest_centroids.search_among`."""
    return product_type() == torch.bfloat16


def basis_may_pay(width: int, k: int) -> bool:
    """Whether coefficients may be worth their price for rows of this width and k centroids."""
    return width >= _FEWEST_FEATURES[product_type()] and k >= _FEWEST_CENTROIDS


def coarse(rows: NDArray[np.float32], basis: Basis | None, room: int = 0) -> CoarseRows:
    """Rows (n, d) from `Grid.rows` for `Search`. Inputs are kept if they take no more than `room` bytes."""
    width = _width(rows.shape[1], basis)
    kept = len(rows) * width * product_type().itemsize <= room
    inputs = torch.zeros(len(rows), width, dtype=product_type()) if kept else None
    lengths = []
    for start in range(0, len(rows), blas.CHUNK_ROWS):
        piece = rows[start : start + blas.CHUNK_ROWS]
        coefficients, found = _coefficients(piece, basis)
        lengths.append(found)
        if inputs is not None:
            _fill_rows(inputs[start : start + len(piece)], coefficients, found)
    return CoarseRows(basis, Lengths.joined(lengths), inputs)


def _width(width: int, basis: Basis | None) -> int:
    used = (basis.directions.shape[1] if basis else width) + _EXTRA
    return -(-used // _ALIGNED) * _ALIGNED


def _coefficients(points: NDArray[np.float32], basis: Basis | None) -> tuple[Tensor, Lengths]:
    """The coefficients (n, q) of rows or centroids (n, d), in the type of the product, and the lengths that bound the rest."""
    width = points.shape[1]
    relative = _gamma(width)  # error of an inner product in float32, of centroids with their rounding
    squares = np.einsum("nd,nd->n", points, points).astype(np.float64)
    if basis is None:
        exact, error = points, 0.0
    else:
        with blas.one_thread():
            exact = points @ basis.directions
        error = relative * math.sqrt(exact.shape[1])  # each direction has the length 1
    stored = torch.from_numpy(exact).to(product_type())
    rounded = stored.float().numpy()
    missed = exact - rounded  # exact in float32
    along = np.einsum("nq,nq->n", rounded, rounded).astype(np.float64)
    length = np.sqrt(squares * (1 + 2 * relative))
    inside = np.sqrt(np.einsum("nq,nq->n", missed, missed) * (1 + 2 * relative)) + (2.0**-23 + error) * length
    outside = inside
    if basis:
        # |s|^2 = |x|^2 - 2 P'x a + |P a|^2 = |x|^2 - |a|^2 - 2 (P'x - a) a + a (P'P - I) a, and |a| < 1.01 |x|.
        products = np.einsum("nq,nq->n", missed, rounded)
        slack = 4 * (relative + error + basis.defect)
        outside = np.sqrt(np.maximum(squares - along - 2 * products, 0) + slack * squares)
        inside = inside + 2 * basis.defect * length
    return stored, Lengths(squares, np.sqrt(along * (1 + 2 * relative)), inside, outside)


def _gamma(width: int) -> float:
    """At least the relative error of a float32 sum of so many products, in any order, and of rounding what is multiplied."""
    terms = (width + 12) * 2.0**-24
    return terms / (1 - terms)


def _pieces(values: NDArray[np.float64], dtype: torch.dtype) -> Iterator[Tensor]:
    """Three numbers (n,) of a type whose sum has 24 bits."""
    left = torch.from_numpy(values)
    for _ in range(3):
        piece = left.to(dtype)
        left = left - piece.double()
        yield piece


def _rounded_up(values: NDArray[np.float64], dtype: torch.dtype) -> Tensor:
    """The least numbers (n,) of a type, or the ones above them, that are not below the values."""
    stored = torch.from_numpy(values).to(dtype)
    above = torch.nextafter(stored, torch.tensor(torch.inf, dtype=dtype))
    return torch.where(stored.double() < torch.from_numpy(values), above, stored)


def _fill_rows(inputs: Tensor, coefficients: Tensor, lengths: Lengths) -> None:
    width = coefficients.shape[1]
    inputs[:, :width] = coefficients
    _fill_extra(inputs[:, width:], lengths, _sum_error(inputs.shape[1]))


def _fill_extra(extra: Tensor, lengths: Lengths, error: float) -> None:
    for place, piece in enumerate(_pieces(lengths.squares * (1 - error), extra.dtype)):
        extra[:, place] = piece
    extra[:, 3:6] = 1
    for place, length in enumerate((lengths.along, lengths.inside, lengths.outside), 6):
        extra[:, place] = _rounded_up(length, extra.dtype)


def _sum_error(width: int) -> float:
    """At least the error of the product's sums, relative to |x|^2 + |c|^2: the terms sum to at most 2.5 times that."""
    terms = (width + 16) * 2.0**-24
    return 2.5 * terms / (1 - terms) + 2.0**-22


class Search:
    """A search for the nearest of some centroids.

    Args:
        basis: of the rows that will be searched for, or None.
    """

    def __init__(self, codebook: Codebook, basis: Basis | None) -> None:
        points = codebook.centroid_rows
        self.codebook, self.basis = codebook, basis
        single = points.astype(np.float32)
        self.single = torch.from_numpy(single)
        coefficients, self.lengths = _coefficients(single, basis)
        width = _width(points.shape[1], basis)
        self._error = _sum_error(width)
        inputs = torch.zeros(len(points), width, dtype=product_type())
        used = coefficients.shape[1]
        inputs[:, :used] = -2 * coefficients
        inputs[:, used : used + 3] = 1
        for place, piece in enumerate(_pieces(self.lengths.squares * (1 - self._error), inputs.dtype), used + 3):
            inputs[:, place] = piece
        # Each row's |a| meets what a centroid leaves out inside of the directions, and the other way round.
        for place, length in enumerate((self.lengths.inside, self.lengths.along, self.lengths.outside), used + 6):
            inputs[:, place] = -2 * _rounded_up(length, inputs.dtype)
        # Columns 0 to 2 are the pieces of |x|^2 times 1, columns 3 to 5 are 1 times the pieces of |c|^2.
        self._inputs = inputs.T
        self._single_error = _gamma(points.shape[1])
        self._block = max(64, min(_BLOCK_ROWS, _BLOCK_VALUES // len(points)))
        self._bounds = torch.empty(0, len(points), dtype=product_type())  # with `_rows` it grows with the first rows
        self._rows = torch.empty(0, width, dtype=product_type())
        self._searched, self._compared = 0, 0  # rows, and pairs of a row and a centroid that the product could not exclude

    def __call__(self, rows: NDArray[np.float32], of_rows: CoarseRows) -> tuple[NDArray[np.int64], int]:
        """The nearest centroids (n,) of rows (n, d) from `Grid.rows`, and how many of them needed whole numbers."""
        labels, decided_again = np.empty(len(rows), np.int64), 0
        if len(self._bounds) < min(self._block, len(rows)):
            size = min(self._block, len(rows))
            self._bounds = torch.empty(size, self._bounds.shape[1], dtype=product_type())
            self._rows = torch.zeros(size, self._rows.shape[1], dtype=product_type())
        for start in range(0, len(rows), self._block):
            part = slice(start, start + self._block)
            labels[part], again = self._search(rows[part], of_rows.lengths[part], self._inputs_of(rows, of_rows, part))
            decided_again += again
        self._searched += len(rows)
        return labels, decided_again

    def basis_pays(self) -> bool:
        """Whether the product left so few centroids that searches without a basis would have taken longer."""
        return self._compared <= _MOST_COMPARED[product_type()] * self._searched * len(self.codebook.points)

    def _inputs_of(self, rows: NDArray[np.float32], of_rows: CoarseRows, part: slice) -> Tensor:
        if of_rows.inputs is not None:
            return of_rows.inputs[part]
        piece = rows[part]
        found = self._rows[: len(piece)]
        if self.basis:
            _fill_rows(found, _coefficients(piece, self.basis)[0], of_rows.lengths[part])
        else:
            _fill_rows(found, torch.from_numpy(piece), of_rows.lengths[part])
        return found

    def _search(self, rows: NDArray[np.float32], lengths: Lengths, inputs: Tensor) -> tuple[NDArray[np.int64], int]:
        every_row = np.arange(len(rows))
        bounds = torch.mm(inputs, self._inputs, out=self._bounds[: len(rows)])
        # The bits of floats of 0 and above are ordered as they are. Those below 0 are below the limit either way.
        ordered = _bits(bounds)
        labels: NDArray[np.int64] = ordered.argmin(axis=1)
        if self.basis:
            near = self._squared(rows, lengths, every_row, labels, np.arange(len(rows) + 1))
            highest = near + self._single_error * (lengths.squares + self.lengths.squares[labels])
        else:
            highest = self._upper_bounds(bounds, lengths, labels)
        limit = _bits(_rounded_up(np.maximum(highest, 0) + _TINY, bounds.dtype))
        flat = np.flatnonzero(ordered <= limit[:, None])
        row_of_pair = flat // ordered.shape[1]
        number = np.bincount(row_of_pair, minlength=len(rows))
        several = number > 1
        chosen = several[row_of_pair]
        row_of_pair, numbers = row_of_pair[chosen], (flat - row_of_pair * ordered.shape[1])[chosen]
        again = 0
        if len(numbers):
            self._compared += len(numbers)
            ends = np.concatenate([[0], np.cumsum(np.where(several, number, 0))])
            labels, again = self._decide(rows, lengths, labels, row_of_pair, numbers, ends)
        return labels, again

    def _upper_bounds(self, bounds: Tensor, lengths: Lengths, labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """At least the squared distance to the centroids of these numbers (n,), from their lower bounds."""
        lowest = bounds.gather(1, torch.from_numpy(labels)[:, None])[:, 0].double().numpy()
        of_labels = self.lengths[labels]
        left_out = lengths.along * of_labels.inside + lengths.inside * of_labels.along + lengths.outside * of_labels.outside
        rounding = np.abs(lowest) * 2.0**-8 + 2.2 * self._error * (lengths.squares + of_labels.squares)
        upper: NDArray[np.float64] = lowest + 4.1 * left_out + rounding
        return upper

    def _squared(
        self,
        rows: NDArray[np.float32],
        lengths: Lengths,
        row_of_pair: NDArray[np.int64],
        numbers: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> NDArray[np.float64]:
        """Squared distances (n_pairs,), off by at most `_single_error` (|x|^2 + |c|^2).

        Args:
            row_of_pair, numbers: (n_pairs,), sorted by row.
            ends: (n + 1,), where the pairs of each row begin and end.
        """
        products = _inner_products(torch.from_numpy(rows), self.single, ends, numbers).numpy()
        squared: NDArray[np.float64] = lengths.squares[row_of_pair] + self.lengths.squares[numbers] - 2.0 * products
        return squared

    def _decide(
        self,
        rows: NDArray[np.float32],
        lengths: Lengths,
        labels: NDArray[np.int64],
        row_of_pair: NDArray[np.int64],
        numbers: NDArray[np.int64],
        ends: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], int]:
        """The labels with those of rows that have pairs replaced, and how many rows needed whole numbers."""
        squared = self._squared(rows, lengths, row_of_pair, numbers, ends)
        error = self._single_error * (lengths.squares[row_of_pair] + self.lengths.squares[numbers])
        with_pairs = np.flatnonzero(np.diff(ends))
        least = np.zeros(len(rows))
        least[with_pairs] = np.minimum.reduceat(squared + error, ends[with_pairs])
        possible = ~(squared - error > least[row_of_pair])
        row_of_pair, numbers = row_of_pair[possible], numbers[possible]
        number = np.bincount(row_of_pair, minlength=len(rows))
        single = (number == 1)[row_of_pair]
        labels[row_of_pair[single]] = numbers[single]
        row_of_pair, numbers = row_of_pair[~single], numbers[~single]
        if len(numbers):
            high, low = grid.squared_distances(rows, self.codebook, row_of_pair, numbers)
            order = np.lexsort((numbers, low, high, row_of_pair))
            first = order[np.concatenate([[True], np.diff(row_of_pair[order]) > 0])]
            labels[row_of_pair[first]] = numbers[first]
        return labels, int((number > 1).sum())


def _bits(values: Tensor) -> NDArray[np.integer]:
    """The bits of floats as whole numbers of the same size."""
    bits: NDArray[np.integer] = values.view(torch.int16 if values.dtype == torch.bfloat16 else torch.int32).numpy()
    return bits


def _inner_products(rows: Tensor, points: Tensor, ends: NDArray[np.int64], numbers: NDArray[np.int64]) -> Tensor:
    """Inner products (n_pairs,) of rows (n, d) with the points (K, d) of these numbers, in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch calls its sparse tensors a beta
        places = torch.sparse_csr_tensor(
            torch.from_numpy(ends.astype(np.int32)),
            torch.from_numpy(numbers.astype(np.int32)),
            torch.zeros(len(numbers)),
            (len(rows), len(points)),
            check_invariants=False,
        )
        products: Tensor = torch.sparse.sampled_addmm(places, rows, points.T, beta=0.0).values()
    return products
