"""Lloyd's k-means on a GPU: the same bits as on CPUs, as fast as a kernel that gives approximate labels.

A fused product in half precision finds the best two centroids of each row and bounds all others, without a matrix of scores.
Rows whose order is not certain are decided exactly, most of them between two centroids. Only rows that changed their label are
added to the sums, which are exact, so in any order. `docs/clustering.md` has the error bounds.

Everything runs on any torch device; without CUDA and Triton plain torch operations take the place of the kernels.

Legend: n rows, N rows in all, d width, K centroids.
"""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ktray import progress
from ktray.clustering import grid
from ktray.clustering.grid import Grid

SCREENERS = {  # name -> type of the inputs, whether their product may use TF32, error of rounding an input
    "float16": (torch.float16, False, 2.0**-11),
    "bfloat16": (torch.bfloat16, False, 2.0**-8),
    "tf32": (torch.float32, True, 2.0**-10),
    "float32": (torch.float32, False, 2.0**-24),
}
_SCALE = 2.0**14  # of rows and centroids for the product, so that hardly any value is subnormal in float16
_ABSOLUTE = 2.0**-40  # covers the values that are subnormal nevertheless, in the units of rows
_PIECES = 16  # of the rows, at least, where not all of them fit into memory
_AT_ONCE = 3  # pieces: one that is computed with, one that is read, and one that is about to be freed
_SCORES = 1 << 24  # float64 scores at a time in the exact decision among all centroids
_VALUES = 1 << 22  # values at a time in other computations in float64 and int64
_WORK_BYTES = 512 << 20  # of the budget, for what is computed from the rows
_READERS = max(4, min(12, (os.cpu_count() or 1) // 2))  # threads that read and round shards
_UNKNOWN = 2e30  # an upper bound that says nothing
_MOST_FAST = 2  # at most one in so many centroids is compared with rows whose other distances are bounded
_WORTHWHILE = 0.85  # of a whole search, at most, for bounds to be used
_AHEAD = 8  # iterations that are launched before the host reads what became of them, where the problem is small
_SMALL_ROWS, _SMALL_CENTROIDS, _SMALL_PAIRS = 1 << 18, 1 << 21, 1 << 28  # rows, values of centroids, and pairs of both


@dataclass
class _Piece:
    """Some shards on the device.

    Attributes:
        rows: (n, d) float32 from `Grid.rows`.
        inputs: (n, w) rows for the product, padded with zeros.
        lengths: (n,) float32, |x|^2.
    """

    rows: Tensor
    inputs: Tensor
    lengths: Tensor


@dataclass
class _Candidates:
    """Centroids on the device.

    Attributes:
        points: (K, d) int64.
        inputs, norms, squares, limits: for the product (see `gpu_kernels.best_two`).
        single: (K, d) float32, in the units of rows.
        drift: (K,) float32, how far each has moved since the search before, rounded up; None if there was none.
        bits: of the grid.
    """

    points: Tensor
    inputs: Tensor
    norms: Tensor
    squares: Tensor
    limits: tuple[float, float, float]
    single: Tensor
    drift: Tensor | None
    bits: int

    def some(self, numbers: Tensor) -> _Candidates:
        """Some of them for the product, as many as it takes at a time or a multiple."""
        parts = (self.inputs[numbers], self.norms[numbers], self.squares[numbers])
        return replace(self, inputs=parts[0], norms=parts[1], squares=parts[2])

    @cached_property
    def wide(self) -> Tensor:
        """(K, d) float64, in the units of rows."""
        return self.points.to(torch.float64) * 2.0**-self.bits

    @cached_property
    def wide_squares(self) -> Tensor:
        """|c|^2 (K,) float64."""
        return self.wide.square().sum(dim=1)


@dataclass
class _Known:
    """What is known of the rows of a piece.

    Attributes:
        labels: (n,) int32; -1 before the first search.
        upper: (n,) float32, not below the distance of a row to its centroid; `_UNKNOWN` if that has not been computed.
        lower: (n,) float32, not above its distances to all other centroids.
    """

    labels: Tensor
    upper: Tensor
    lower: Tensor

    @classmethod
    def nothing(cls, count: int, device: torch.device) -> _Known:
        labels = torch.full((count,), -1, dtype=torch.int32, device=device)
        return cls(labels, torch.full((count,), _UNKNOWN, device=device), torch.zeros(count, device=device))


@dataclass(frozen=True)
class Found:
    """The result of `iterate`; the attributes are those of `kmeans.Clusters`, with the share of rows decided again."""

    points: NDArray[np.int64]
    inertia: tuple[float, ...]
    empty: tuple[int, ...]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int32]
    converged: bool
    decided_again: float


Load = Callable[[Path], NDArray[np.float32]]
OnIteration = Callable[[int, float], None]
Keep = Callable[[int, Callable[[], dict[str, Any]]], None]
Repairs = Callable[[NDArray[np.int64], list[tuple[int, int, Any]]], list[tuple[int, int, Any]]]


def iterate(
    engine: Engine,
    initial: NDArray[np.int64],
    of_rows: Grid,
    iterations: int,
    repairs: Repairs,
    on_iteration: OnIteration | None = None,
    start: Mapping[str, Any] | None = None,
    keep: Keep | None = None,
) -> Found:
    """Lloyd's iteration from the `initial` centroids (K, d).

    Args:
        engine: has the rows; its `largest_distance` for the centre of the grid has been asked for or not.
        repairs: `kmeans.plan_repairs`.
        start: fields of the `kmeans.IterationState` from which to go on.
        keep: called after every update with the number of updates and a function that returns such fields.
    """
    engine.place(of_rows)
    if start is None and engine.is_small(len(initial)):
        found = _iterate_ahead(engine, initial, iterations, of_rows, on_iteration, keep)
        if isinstance(found, Found):
            return found
        start = found or None
    return _iterate_singly(engine, initial, iterations, of_rows, repairs, on_iteration, start, keep)


def _iterate_singly(
    engine: Engine,
    initial: NDArray[np.int64],
    iterations: int,
    of_rows: Grid,
    repairs: Repairs,
    on_iteration: OnIteration | None,
    start: Mapping[str, Any] | None,
    keep: Keep | None,
) -> Found:
    device, total = engine.device, sum(engine.piece_counts)
    k = len(initial)
    sums = torch.zeros(initial.shape, dtype=torch.float64, device=device)
    known = [_Known.nothing(n, device) for n in engine.piece_counts]
    sizes = torch.zeros(k, dtype=torch.float64, device=device)
    words = torch.zeros(3 * k, dtype=torch.int64, device=device)
    points = initial
    squares: int | None = None
    inertia: list[float] = []
    empty: list[int] = []
    updates, searched, unclear = 0, 0, 0
    if start:
        points = start["points"]
        inertia, empty, searched, unclear = list(start["inertia"]), list(start["empty"]), start["searched"], start["unclear"]
        updates = len(inertia)
        engine.label(engine.candidates(torch.from_numpy(start["previous"]).to(device)), known, sums, sizes)
    candidates = engine.candidates(torch.from_numpy(points).to(device))
    while True:
        relabelled, added = 0, 0
        for index, piece in engine.pieces():
            old = known[index].labels
            unclear += engine.assign(piece, candidates, known[index])
            relabelled += engine.update(sums, sizes, piece, old, known[index].labels)
            if squares is None:
                added += _sum_of_squares(piece.rows, of_rows.bits, engine.kernels)
        squares, searched = added if squares is None else squares, searched + total
        following = engine.following(candidates, sums, sizes, words)
        high, low, whole_sizes = words.cpu().numpy().reshape(3, k)
        inertia.append((squares - grid.total_of((high, low.view(np.uint64)))) / total * of_rows.square)
        empty.append(int((whole_sizes == 0).sum()))
        if on_iteration:
            on_iteration(updates, inertia[-1])
        converged = updates > 0 and not empty[-1] and not relabelled
        if converged or updates == iterations:
            break
        if empty[-1]:
            filled_sums, filled_sizes = engine.repaired(sums, sizes, candidates, known, repairs)
            following = engine.following(candidates, filled_sums, filled_sizes, words)
        before, candidates = candidates.points, following
        updates += 1
        if keep:
            said = {"inertia": tuple(inertia), "empty": tuple(empty), "searched": searched, "unclear": unclear}
            keep(updates, partial(_state, candidates.points, before, said))
    again_share, labels = unclear / searched, torch.cat([each.labels for each in known]).cpu().numpy()
    points = candidates.points.cpu().numpy()
    return Found(points, tuple(inertia), tuple(empty), whole_sizes.copy(), labels, converged, again_share)


def _iterate_ahead(
    engine: Engine,
    initial: NDArray[np.int64],
    iterations: int,
    of_rows: Grid,
    on_iteration: OnIteration | None,
    keep: Keep | None,
) -> Found | dict[str, Any]:
    """As `iterate`, several iterations at a time without waiting for the device.

    Iterations after the last one change nothing, so it does no harm that they have begun. If a cluster becomes empty, the
    iterations after it do not count: returned is the state before it, from which `iterate` goes on; nothing for the first one.
    """
    ahead = _Ahead(engine, torch.from_numpy(initial).to(engine.device))
    squares, total = _sum_of_squares(ahead.piece.rows, of_rows.bits, engine.kernels), sum(engine.piece_counts)
    inertia: list[float] = []
    unclear = 0
    before = ahead.candidates.points  # the centroids of the last iteration that counts

    def said() -> dict[str, Any]:
        made = len(inertia)
        return {"inertia": tuple(inertia), "empty": (0,) * made, "searched": total * made, "unclear": unclear}

    while True:
        number = min(_AHEAD, iterations + 1 - len(inertia)) if inertia else 1  # the first compiles the kernels
        for points, high, low, sizes, (moved, again) in ahead.run(number):
            if not sizes.all():
                return _state(points, before, said()) if inertia else {}
            unclear += int(again)
            inertia.append((squares - grid.total_of((high, low.view(np.uint64)))) / total * of_rows.square)
            if on_iteration:
                on_iteration(len(inertia) - 1, inertia[-1])
            converged = len(inertia) > 1 and not moved
            if converged or len(inertia) > iterations:
                share = unclear / (total * len(inertia))
                labels = ahead.labels.cpu().numpy()  # those of the iterations after convergence are the same
                return Found(points.cpu().numpy(), tuple(inertia), (0,) * len(inertia), sizes, labels, converged, share)
            before = points
        if keep:
            keep(len(inertia), partial(_state, ahead.candidates.points, before, said()))


class _Ahead:
    """Iterations whose launches depend on nothing that the host would have to read, and what each of them found."""

    def __init__(self, engine: Engine, points: Tensor) -> None:
        self.engine = engine
        _, self.piece = next(iter(engine.pieces()))
        device = engine.device
        self.labels = torch.full((len(self.piece.rows),), -1, dtype=torch.int32, device=device)
        self.sums = torch.zeros(points.shape, dtype=torch.float64, device=device)
        self.sizes = torch.zeros(len(points), dtype=torch.float64, device=device)
        self.candidates = engine.candidates(points)

    def run(self, number: int) -> Iterator[tuple[Any, ...]]:
        """Of each of the next iterations: its centroids; two words of the inner products of centroids and sums, and sizes, (K,)
        each; how many rows changed their label, and how many were unclear, (2,)."""
        k = len(self.sizes)
        words = torch.zeros(number, 3 * k + k % 2, dtype=torch.int64, device=self.engine.device)
        counts = torch.zeros(number, 2, 2, dtype=torch.int64, device=self.engine.device)  # aligned, for the compiler
        points = [self._iterate(row, count[0, :1], count[1, :1]) for row, count in zip(words, counts, strict=True)]
        for made, row, count in zip(points, words.cpu().numpy(), counts[:, :, 0].cpu().numpy(), strict=True):
            yield made, row[:k], row[k : 2 * k], row[2 * k : 3 * k], count

    def _iterate(self, words: Tensor, moved: Tensor, unclear: Tensor) -> Tensor:
        """One iteration, whose results are written; returns the centroids before it."""
        engine, piece, candidates = self.engine, self.piece, self.candidates
        labels, other, status, _, _ = engine.best_two(piece, candidates)
        decide, move = (engine.kernels.decide, engine.kernels.move) if engine.kernels else (_decide, _move)
        decide(
            piece.rows, candidates.points, candidates.single, candidates.squares, piece.lengths, status, labels, other, unclear,
            engine.bits,
        )  # fmt: skip
        move(piece.rows, self.labels, labels, self.sums, self.sizes, moved)
        self.candidates = engine.following(candidates, self.sums, self.sizes, words)
        return candidates.points


def _state(points: Tensor, previous: Tensor, said: dict[str, Any]) -> dict[str, Any]:
    return {"points": points.cpu().numpy().copy(), "previous": previous.cpu().numpy().copy(), **said}


class Engine:
    """The rows of a clustering, on the device as far as they fit.

    Args:
        counts: number of rows of each shard.
        load: reads a shard as projected rows (n, d).
        screener: of `SCREENERS`; it changes no result.
        budget: bytes of device memory; None for most of what is free.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        counts: Sequence[int],
        load: Load,
        device: str,
        screener: str = "float16",
        budget: int | None = None,
    ) -> None:
        self.device, self.load, self.bits = torch.device(device), load, 0
        self.grid: Grid | None = None
        self.dtype, self.tf32, self.rounding = SCREENERS[screener]
        self.kernels = _kernels() if self.device.type == "cuda" else None
        self.width = load(shards[0]).shape[1]
        self.padded = -(-self.width // 64) * 64
        free = budget if budget is not None else int(_free_bytes(self.device) * 0.8)
        per_row = 4 * self.width + self.padded * self.dtype.itemsize + 16
        total = sum(counts)
        free = max(free - _WORK_BYTES, free // 2)
        pieces = 1 if total * per_row <= free else max(_PIECES, -(-4 * total * per_row // free))
        ends = np.searchsorted(np.cumsum(counts), np.arange(1, pieces + 1) * total / pieces - 0.5) + 1
        bounds = np.unique(np.concatenate([[0], ends]))
        self._groups = [list(zip(shards[a:b], counts[a:b], strict=True)) for a, b in pairwise(bounds)]
        self.piece_counts = [sum(count for _, count in group) for group in self._groups]
        self._kept: dict[int, _Piece] = {}
        self._room = free - per_row * (_AT_ONCE * max(self.piece_counts) if pieces > 1 else 0)
        self._per_row = per_row
        self._ratio: float | None = None
        self._pause = self._waited = 0  # searches of whole pieces until bounds are tried again, and those before the last try

    def largest_distance(self, centre: NDArray[np.float32]) -> float:
        """The largest distance of any row from the centre (d,) in a coordinate; rows that are not on a grid yet."""
        middle, largest = torch.from_numpy(centre).to(self.device, torch.float64), 0.0
        for index, piece in self.pieces():
            low, high = piece.rows.amin(dim=0).to(torch.float64), piece.rows.amax(dim=0).to(torch.float64)
            largest = max(largest, float(torch.maximum(high - middle, middle - low).max()))
            progress.advance("shards", len(self._groups[index]))
        return largest

    def place(self, of_rows: Grid) -> None:
        """Round all rows to a grid, those that are read later, too; once."""
        if self.grid is of_rows:
            return
        assert self.grid is None, "rows that have been rounded cannot be rounded anew"
        self.grid, self.bits = of_rows, of_rows.bits
        for piece in self._kept.values():
            self._round(piece)

    def _round(self, piece: _Piece) -> None:
        """As `Grid.rows` of clustered rows, in place; what the product takes is made of them."""
        assert self.grid is not None
        centre, exponent = torch.from_numpy(self.grid.centre).to(self.device, torch.float64), self.grid.exponent
        step = max(1, 4 * _VALUES // self.width)
        for start in range(0, len(piece.rows), step):
            part = piece.rows[start : start + step]
            part.copy_((part.to(torch.float64) - centre) * 2.0**-exponent)
            part.mul_(2.0**self.bits).round_().mul_(2.0**-self.bits)
            piece.inputs[start : start + step, : self.width] = part * _SCALE
            piece.lengths[start : start + step] = part.square().sum(dim=1)

    def pieces(self) -> Iterator[tuple[int, _Piece]]:
        """All pieces, one after the other; those that do not stay on the device are read ahead by one."""
        if len(self._kept) == len(self._groups):
            yield from sorted(self._kept.items())
            return
        with ThreadPoolExecutor(1) as ahead:
            missing = [index for index in range(len(self._groups)) if index not in self._kept]
            futures = {index: ahead.submit(self._read, index) for index in missing[:1]}
            for index in range(len(self._groups)):
                if index in self._kept:
                    yield index, self._kept[index]
                    continue
                piece = futures.pop(index).result()
                following = missing[missing.index(index) + 1 :]
                if following:
                    futures[following[0]] = ahead.submit(self._read, following[0])
                if self._room >= self._per_row * len(piece.rows):
                    self._room -= self._per_row * len(piece.rows)
                    self._kept[index] = piece
                yield index, piece

    def _read(self, index: int) -> _Piece:
        rows = torch.empty(self.piece_counts[index], self.width, device=self.device)
        lengths = torch.empty(len(rows), device=self.device)
        inputs = torch.zeros(len(rows), self.padded, dtype=self.dtype, device=self.device)
        start = 0
        with ThreadPoolExecutor(_READERS) as readers:
            waiting = [readers.submit(self.load, shard) for shard, _ in self._groups[index][: 2 * _READERS]]
            for place, (_, count) in enumerate(self._groups[index]):
                rows[start : start + count] = torch.from_numpy(waiting[place].result())
                waiting[place] = None  # type: ignore[call-overload]
                if len(waiting) < len(self._groups[index]):
                    waiting.append(readers.submit(self.load, self._groups[index][len(waiting)][0]))
                start += count
        piece = _Piece(rows, inputs, lengths)
        if self.grid is not None:
            self._round(piece)
        return piece

    def candidates(self, points: Tensor) -> _Candidates:
        """Centroids for the product, of which nothing is known."""
        return replace(self._candidates(points, None, None, None), drift=None)

    def following(self, candidates: _Candidates, sums: Tensor, sizes: Tensor, words: Tensor) -> _Candidates:
        """The means of the clusters; an empty one keeps its centroid.

        Args:
            words: (3 K,) int64, set to the high and low words of the inner products of the centroids before and 2 S - n C, of
                which inertia is made, and to the sizes.
        """
        return self._candidates(candidates.points, sums, sizes, words)

    def _candidates(self, points: Tensor, sums: Tensor | None, sizes: Tensor | None, words: Tensor | None) -> _Candidates:
        product, norm = self._errors()
        # About |c| / |x|: 2 |x| |c| <= ratio |x|^2 + |c|^2 / ratio for any ratio, with equality at this one.
        if self._ratio is None and self._kept:
            lengths = next(iter(self._kept.values())).lengths
            square = (points.to(torch.float64) * 2.0**-self.bits).square().sum(dim=1).mean()
            self._ratio = min(max(math.sqrt(float(square / lengths.mean().clamp(min=1e-30))), 2.0**-10), 2.0**10)
        ratio = self._ratio or 1.0
        more = (1 + 2.0**-10) * _SCALE**2
        limits = (2 * product * ratio * more, 2 * (product / ratio + norm) * more, _ABSOLUTE * more)
        make = self.kernels.centroids if self.kernels else _centroids
        per_square = 1 - norm - product / ratio
        made = make(points, sums, sizes, self.bits, self.padded, self.dtype, _SCALE, per_square, words)
        found, inputs, single, squares, norms, drift = made
        return _Candidates(found, inputs, norms, squares, limits, single, drift, self.bits)

    def _errors(self) -> tuple[float, float]:
        """Bounds (p, q): the error of a score is at most 2 p |x| |c| + q |c|^2 and an absolute term."""
        rounding = self.rounding * (1 + 2.0**-10)
        product = 2 * rounding + rounding**2 + (self.width + 32) * 2.0**-22 + 2.0**-14
        return product, 2.0**-13

    def assign(self, piece: _Piece, candidates: _Candidates, known: _Known) -> int:
        """Replace what is known of a piece by what holds for these candidates; returns how many rows were decided again.

        Rows whose bounds prove that their label stays are not searched for (Hamerly, Making k-means even faster, SDM 2010).
        """
        chosen = self._open(piece, candidates, known)
        best, other, status, nearest, following = self.best_two(piece, candidates, chosen)
        unclear = torch.nonzero(status)[:, 0]
        several = unclear[status[unclear] > 1]
        nearer = self.kernels.nearer if self.kernels else _nearer
        lower = torch.where(status > 0, nearest, following)
        rows = unclear if chosen is None else chosen[unclear]
        best[unclear] = nearer(piece.rows, candidates.points, rows, best[unclear], other[unclear], self.bits)
        step = max(1, _SCORES // max(1, len(candidates.points)))
        for start in range(0, len(several), step):
            part = several[start : start + step]
            best[part] = _nearest_of_all(piece.rows[part if chosen is None else chosen[part]], candidates, self.bits)
        if chosen is None:
            known.labels, known.lower = best, lower
            known.upper.fill_(_UNKNOWN)
        else:
            known.labels = known.labels.clone()
            known.labels[chosen], known.lower[chosen], known.upper[chosen] = best, lower, _UNKNOWN
        return len(unclear)

    def _open(self, piece: _Piece, candidates: _Candidates, known: _Known) -> Tensor | None:
        """Numbers (m,) of the rows whose label may change; None for all. Bounds are changed so that they hold for `candidates`.

        The centroids that moved most, the fast ones, are searched for each row that is not certain already; the others move by
        no more than the slowest of the fast. How many are fast is what promises the shortest search.
        """
        k, drift = len(candidates.points), candidates.drift
        if drift is None:
            return None
        if self._pause > 0:
            self._pause -= 1
            return None
        self.own_distances(piece, candidates, known)
        slowest, order = drift.sort(descending=True)
        numbers = [0, *(256 << power for power in range(16) if _MOST_FAST * (256 << power) <= k)]
        gaps = known.lower - known.upper
        left = (gaps[:, None] <= slowest[torch.tensor(numbers, device=drift.device)]).sum(dim=0).cpu().numpy()
        costs = left / len(gaps) + (1 - left / len(gaps)) * np.array(numbers) / k
        if costs.min() > _WORTHWHILE:
            self._waited = self._pause = min(2 * self._waited + 1, 7)
            return None
        self._waited = 0
        fast = numbers[int(costs.argmin())]
        known.lower = (known.lower - slowest[fast]) * (1 - 2.0**-20)
        if fast:
            certain, numbers_of = torch.nonzero(known.upper < known.lower)[:, 0], order[:fast]
            best, _, _, nearest, following = self.best_two(piece, candidates.some(numbers_of), certain)
            others = torch.where(numbers_of[best.long()] == known.labels[certain], following, nearest)
            known.lower[certain] = torch.minimum(known.lower[certain], others)
        return torch.nonzero(~(known.upper < known.lower))[:, 0]

    def own_distances(self, piece: _Piece, candidates: _Candidates, known: _Known) -> None:
        """Compute the upper bounds that are unknown, and those of rows whose centroid has moved."""
        drift = torch.zeros_like(candidates.squares) if candidates.drift is None else candidates.drift
        measure = self.kernels.own_distances if self.kernels else _own_distances
        lengths, squares = piece.lengths, candidates.squares
        measure(piece.inputs, candidates.inputs, lengths, squares, known.labels, drift, known.upper, self._own_errors(), _SCALE)

    def _own_errors(self) -> tuple[float, float, float]:
        """Errors of the distance of a row and a centroid whose inputs were rounded: relative, of both lengths, and absolute."""
        return (self.width + 32) * 2.0**-23, self.rounding * (1 + 2.0**-6), math.sqrt(self.width) * 2.0**-38

    def best_two(
        self, piece: _Piece, candidates: _Candidates, chosen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """See `gpu_kernels.best_two`."""
        found: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
        arguments = (
            piece.inputs, chosen, candidates.inputs, candidates.norms, piece.lengths, candidates.squares, candidates.limits,
            _SCALE**-2,
        )  # fmt: skip
        if self.kernels and self.dtype != torch.float32:
            found = self.kernels.best_two(*arguments)
            return found
        return _best_two(*arguments, tf32=self.tf32)

    def is_small(self, k: int) -> bool:
        """Whether launching kernels would take longer than running them (see `_iterate_ahead`)."""
        rows = self.piece_counts[0]
        return (
            len(self._groups) == 1 and rows <= _SMALL_ROWS and k * self.width <= _SMALL_CENTROIDS and rows * k <= _SMALL_PAIRS
        )

    def label(self, candidates: _Candidates, known: list[_Known], sums: Tensor, sizes: Tensor) -> None:
        """Set the labels of all rows for these centroids, and add the rows to sums and sizes, which are zero."""
        for index, piece in self.pieces():
            old = known[index].labels
            self.assign(piece, candidates, known[index])
            self.update(sums, sizes, piece, old, known[index].labels)

    def update(self, sums: Tensor, sizes: Tensor, piece: _Piece, old: Tensor, new: Tensor) -> int:
        """Move the rows that changed their label between sums and sizes, in place; returns their number."""
        changed = torch.nonzero(old != new)[:, 0]
        leaving = changed[old[changed] >= 0]
        entries = torch.cat([changed, leaving])
        labels, order = torch.cat([new[changed], old[leaving]]).sort()
        signs = torch.ones(len(entries), dtype=torch.float64, device=self.device)
        signs[len(changed) :] = -1
        add = self.kernels.add_to_sums if self.kernels else _add_to_sums
        add(sums, sizes, piece.rows, entries[order], labels, signs[order])
        return len(changed)

    def repaired(
        self, sums: Tensor, sizes: Tensor, candidates: _Candidates, known: list[_Known], repairs: Repairs
    ) -> tuple[Tensor, Tensor]:
        """Copies of sums and sizes after empty clusters have taken over the farthest rows (see `kmeans.fit`)."""
        sums, sizes = sums.clone(), sizes.clone()
        host_sizes = sizes.to(torch.int64).cpu().numpy()
        count = int((host_sizes == 0).sum())
        found: list[tuple[int, int, Any]] = []
        for index, piece in self.pieces():
            known[index].upper.fill_(_UNKNOWN)
            self.own_distances(piece, candidates, known[index])
            found += self._farthest_distinct(piece, candidates, known[index], sizes, count)
        for donor, recipient, row in repairs(host_sizes, found):
            moved = torch.from_numpy(row).to(self.device, torch.float64)
            sums[donor] -= moved
            sums[recipient] += moved
            sizes[donor] -= 1
            sizes[recipient] += 1
        return sums, sizes

    def _farthest_distinct(
        self, piece: _Piece, candidates: _Candidates, known: _Known, sizes: Tensor, count: int
    ) -> list[tuple[int, int, Any]]:
        """Up to `count` distinct rows as (squared distance, label, row), farthest from their centroid first (see `kmeans`).

        Only the farthest by the bounds are sorted by exact squared distances, as long as they hold enough distinct rows.

        Args:
            known: with upper bounds for all rows.
        """
        numbers, rows = known.labels.long(), piece.rows
        growth, slack, absolute = self._own_errors()
        widths = slack * (piece.lengths.sqrt() + candidates.squares[numbers].sqrt()) + absolute
        nearest = ((known.upper - 2.01 * widths) * (1 - 4 * growth)).clamp(min=0)  # lower bounds of the distances
        alone = sizes[numbers] == 1
        nearest[alone] = 0
        found: list[tuple[int, int, Any]] = []
        for considered in (min(len(rows), 2 * count + 64), len(rows)):
            least = float(nearest.topk(considered).values[-1])
            chosen = torch.nonzero((known.upper >= least) & ~alone)[:, 0]
            high, low = _words(*_squared_distances(rows, candidates.points, chosen, numbers[chosen], self.bits))
            distances = np.sqrt(grid.as_float((high, low))) * 2.0**-self.bits
            of_row, label = rows[chosen].cpu().numpy(), numbers[chosen].cpu().numpy()
            found = []
            seen: set[bytes] = set()
            for index in np.lexsort((np.arange(len(high)), ~low, -high)):
                if len(seen) == count or not distances[index]:
                    break
                if distances[index] <= least * (1 + 1e-9) and considered < len(rows):
                    break  # one of the rows that were left out may be next
                if (content := of_row[index].tobytes()) not in seen:
                    seen.add(content)
                    exact = grid.total_of((high[index : index + 1], low[index : index + 1]))
                    found.append((exact, int(label[index]), of_row[index]))
            if len(seen) == count:
                break
        return found


def _kernels() -> Any:
    """The Triton kernels; None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from ktray.clustering import gpu_kernels

    return gpu_kernels


def _free_bytes(device: torch.device) -> int:
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else 8 << 30


def _best_two(
    rows: Tensor,
    chosen: Tensor | None,
    centroids: Tensor,
    norms: Tensor,
    lengths: Tensor,
    squares: Tensor,
    limits: tuple[float, float, float],
    unit: float,
    tf32: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `gpu_kernels.best_two`, by float32 products of the rounded inputs."""
    found, step = [], max(1, _SCORES // len(centroids))
    share = 1.0 - (rows.shape[1] + 16) * 2.0**-23
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        for start in range(0, max(1, len(rows) if chosen is None else len(chosen)), step):
            part = slice(start, start + step) if chosen is None else chosen[start : start + step]
            scores = torch.addmm(norms, rows[part].float(), centroids.float().T)
            lowest, numbers = scores.topk(3, dim=1, largest=False)
            limit = lowest[:, 0] + limits[0] * lengths[part] + limits[1] * squares[numbers[:, 0]] + limits[2]
            status = (~(lowest[:, 1:] > limit[:, None])).sum(dim=1)
            below = (lowest[:, :2] - (0.5 * limits[0] * lengths[part] + limits[2])[:, None]) * unit
            bounds = (below + (lengths[part] * share)[:, None]).clamp(min=0).sqrt() * 0.999999
            found.append((numbers[:, 0].int(), numbers[:, 1].int(), status.to(torch.int8), bounds[:, 0], bounds[:, 1]))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    best, runner_up, unclear, nearest, following = (torch.cat(parts) for parts in zip(*found, strict=True))
    return best, runner_up, unclear, nearest, following


def _own_distances(
    rows: Tensor,
    centroids: Tensor,
    lengths: Tensor,
    squares: Tensor,
    labels: Tensor,
    drift: Tensor,
    upper: Tensor,
    errors: tuple[float, float, float],
    scale: float,
) -> None:
    """As `gpu_kernels.own_distances`."""
    growth, slack, absolute = errors
    needed = torch.nonzero((upper > 1e30) | (drift[labels] > 0))[:, 0]
    step = max(1, _VALUES // rows.shape[1])
    for start in range(0, len(needed), step):
        part = needed[start : start + step]
        of_part = labels[part].long()
        distance = (rows[part].float() + 0.5 * centroids[of_part].float()).square().sum(dim=1).sqrt() / scale * (1 + growth)
        upper[part] = distance + slack * (lengths[part].sqrt() + squares[of_part].sqrt()) + absolute


def _centroids(
    points: Tensor, sums: Tensor | None, sizes: Tensor | None, bits: int, padded: int, dtype: torch.dtype,
    row_scale: float, per_square: float, words: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As `gpu_kernels.centroids`."""
    (k, width), device, found = points.shape, points.device, points
    if sums is not None and sizes is not None and words is not None:
        whole, counts = sums * 2.0**bits, sizes.to(torch.int64)
        high, low = _inner_products(points, 2 * whole.to(torch.int64) - counts[:, None] * points)
        words[: 3 * k] = torch.cat([high, low, counts])
        means = torch.round(whole / sizes.clamp(min=1)[:, None]).to(torch.int64)
        found = torch.where((sizes > 0)[:, None], means, points)
    drift = ((found - points).to(torch.float64).square().sum(dim=1).sqrt() * (2.0**-bits * 1.000001)).to(torch.float32)
    rows, scaled = -(-k // 256) * 256, found.to(torch.float64) * 2.0**-bits
    inputs = torch.zeros(rows, padded, dtype=dtype, device=device)
    inputs[:k, :width] = (scaled * (-2 * row_scale)).to(torch.float32).to(dtype)
    squares = torch.zeros(rows, dtype=torch.float64, device=device)
    squares[:k] = scaled.square().sum(dim=1)
    norms = torch.full((rows,), 1e37, device=device)
    norms[:k] = (squares[:k] * (per_square * row_scale**2)).to(torch.float32)
    return found, inputs, scaled.to(torch.float32), squares.to(torch.float32), norms, drift


def _nearer(rows: Tensor, points: Tensor, chosen: Tensor, one: Tensor, other: Tensor, bits: int) -> Tensor:
    """As `gpu_kernels.nearer`."""
    numbers = torch.stack([one, other], dim=1).sort(dim=1).values
    pairs = torch.arange(len(chosen), device=rows.device).repeat_interleave(2)
    return _first_of_nearest(rows[chosen], points, pairs, numbers.ravel().long(), bits)


def _nearest_of_all(rows: Tensor, candidates: _Candidates, bits: int) -> Tensor:
    """The nearest centroid (n,) int32 of each row among all: float64 scores select those that are compared exactly."""
    wide, squares = rows.to(torch.float64), candidates.wide_squares
    scores = torch.addmm(squares, wide, candidates.wide.T, alpha=-2)
    error = (rows.shape[1] + 16) * 2.0**-50 * (wide.square().sum(dim=1) + 2 * squares.max())
    pairs, numbers = torch.nonzero(scores <= (scores.amin(dim=1) + error)[:, None], as_tuple=True)
    if len(pairs) == len(rows):  # one for each row
        return numbers.to(torch.int32)
    return _first_of_nearest(rows, candidates.points, pairs, numbers, bits)


def _first_of_nearest(rows: Tensor, points: Tensor, row_of_pair: Tensor, numbers: Tensor, bits: int) -> Tensor:
    """The lowest number among the nearest centroids of each row (n,) int32, of pairs sorted by row."""
    high, low = _squared_distances(rows, points, row_of_pair, numbers, bits)
    lowest_first = low ^ torch.iinfo(torch.int64).min  # the low word is unsigned
    nearest = torch.ones(len(numbers), dtype=torch.bool, device=rows.device)
    for value in (high, lowest_first, numbers):
        least = torch.full((len(rows),), torch.iinfo(torch.int64).max, device=rows.device)
        least.scatter_reduce_(0, row_of_pair[nearest], value[nearest], "amin")
        nearest &= value == least[row_of_pair]
    found = torch.empty(len(rows), dtype=torch.int32, device=rows.device)
    found[row_of_pair[nearest]] = numbers[nearest].to(torch.int32)
    return found


def _squared_distances(rows: Tensor, points: Tensor, row_of_pair: Tensor, numbers: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `grid.squared_distances`, with both words as int64."""
    high, low = (torch.empty(len(numbers), dtype=torch.int64, device=rows.device) for _ in range(2))
    step = max(1, _VALUES // rows.shape[1])
    for start in range(0, len(numbers), step):
        part = slice(start, start + step)
        differences = (rows[row_of_pair[part]].to(torch.float64) * 2.0**bits).to(torch.int64) - points[numbers[part]]
        high[part], low[part] = _inner_products(differences, differences)
    return high, low


def _inner_products(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """As `grid.inner_products`, with both words as int64."""
    low = (left * right).sum(dim=1)
    near = (left.to(torch.float64) * right.to(torch.float64)).sum(dim=1)
    unsigned = low.to(torch.float64) + (low < 0).to(torch.float64) * 2.0**64
    return torch.round((near - unsigned) * 2.0**-64).to(torch.int64), low


def _words(high: Tensor, low: Tensor) -> grid.Words:
    return high.cpu().numpy(), low.cpu().numpy().view(np.uint64)


def _sum_of_squares(rows: Tensor, bits: int, kernels: Any) -> int:
    """The sum of |x|^2 of rows in squared steps."""
    squares = kernels.squares if kernels else _squares
    total, step = 0, max(1, len(rows) if kernels else _VALUES // rows.shape[1])
    for start in range(0, len(rows), step):
        high, low = squares(rows[start : start + step], bits)
        # Halves of the low words, which are unsigned: sums of up to 2^31 of them fit into int64.
        halves = (high, (low >> 32) & 0xFFFFFFFF, low & 0xFFFFFFFF)
        of_high, of_upper, of_lower = torch.stack([half.sum() for half in halves]).cpu().tolist()
        total += (of_high << 64) + (of_upper << 32) + of_lower
    return total


def _squares(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `gpu_kernels.squares`."""
    whole = (rows.to(torch.float64) * 2.0**bits).to(torch.int64)
    return _inner_products(whole, whole)


def _decide(
    rows: Tensor,
    points: Tensor,
    single: Tensor,
    squares: Tensor,
    lengths: Tensor,
    status: Tensor,
    best: Tensor,
    runner_up: Tensor,
    count: Tensor,
    bits: int,
) -> None:
    """As `gpu_kernels.decide`."""
    unclear = torch.nonzero(status)[:, 0]
    count += len(unclear)
    best[unclear] = _nearer(rows, points, unclear, best[unclear], runner_up[unclear], bits)
    several = unclear[status[unclear] > 1]
    pairs = several.repeat_interleave(len(points))
    numbers = torch.arange(len(points), device=rows.device).repeat(len(several))
    places = torch.arange(len(several), device=rows.device).repeat_interleave(len(points))
    best[several] = _first_of_nearest(rows[several], points, places, numbers, bits) if len(pairs) else best[several]


def _move(rows: Tensor, old: Tensor, new: Tensor, sums: Tensor, sizes: Tensor, moved: Tensor) -> None:
    """As `gpu_kernels.move`."""
    changed = torch.nonzero(old != new)[:, 0]
    leaving = changed[old[changed] >= 0]
    entries, labels = torch.cat([changed, leaving]), torch.cat([new[changed], old[leaving]])
    signs = torch.ones(len(entries), dtype=torch.float64, device=rows.device)
    signs[len(changed) :] = -1
    _add_to_sums(sums, sizes, rows, entries, labels, signs)
    old.copy_(new)
    moved += len(changed)


def _add_to_sums(sums: Tensor, sizes: Tensor, rows: Tensor, entries: Tensor, labels: Tensor, signs: Tensor) -> None:
    """As `gpu_kernels.add_to_sums`."""
    sizes.index_add_(0, labels, signs)
    step = max(1, _VALUES // rows.shape[1])
    for start in range(0, len(entries), step):
        part = slice(start, start + step)
        sums.index_add_(0, labels[part], rows[entries[part]].to(torch.float64) * signs[part, None])
