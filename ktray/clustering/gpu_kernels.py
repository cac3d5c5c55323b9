"""Triton kernels of k-means: the best two centroids of each row, exact comparison of two centroids, exact sums of clusters.

Each has a counterpart in `gpu_kmeans` made of torch operations, which runs where Triton does not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 256  # centroids are padded to a multiple of it; the low 8 bits of a score name a column of a block
BLOCK_WIDTH = 64  # rows and centroids are padded with zeros to a multiple of it
NO_CENTROID = 1e37  # the norm of padding; finite, so that naming it in its low bits makes no NaN
_BLOCK_ROWS = 128
_WIDE = 1024  # measured on an H200 at widths 512 and 2048: 4 and 5 % between the two block shapes
_SUM_ENTRIES, _SUM_WIDTH = 64, 256


@triton.jit
def _insert(value, number, first, first_number, second, second_number, third):  # type: ignore[no-untyped-def]
    """The three smallest values, and the numbers of the smallest two, after one more value."""
    before_first, before_second = value < first, value < second
    third = tl.where(before_second, second, tl.minimum(third, value))
    second_number = tl.where(before_first, first_number, tl.where(before_second, number, second_number))
    second = tl.where(before_first, first, tl.where(before_second, value, second))
    first_number = tl.where(before_first, number, first_number)
    first = tl.where(before_first, value, first)
    return first, first_number, second, second_number, third


@triton.jit  # type: ignore[untyped-decorator]
def _best_two_kernel(  # type: ignore[no-untyped-def]
    rows, centroids, norms, lengths, squares, best, runner_up, status,
    n, k_padded, per_length, per_square, absolute,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    numbers = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(numbers, n - 1)
    inner, column = tl.arange(0, INNER), tl.arange(0, COLUMNS)
    first = tl.full((ROWS,), 1e38, tl.float32)
    second, third = first, first
    first_number = tl.zeros((ROWS,), tl.int32)
    second_number = first_number
    for start in range(0, k_padded, COLUMNS):
        scores = tl.zeros((ROWS, COLUMNS), tl.float32)
        row_at = rows + read[:, None] * WIDTH + inner[None, :]
        centroid_at = centroids + (start + column).to(tl.int64)[None, :] * WIDTH + inner[:, None]
        for _ in range(0, WIDTH, INNER):
            scores = tl.dot(tl.load(row_at), tl.load(centroid_at), scores)
            row_at += INNER
            centroid_at += INNER
        scores += tl.load(norms + start + column)[None, :]
        # The low bits of a score name its column, so plain minima find value and number at once.
        packed = (scores.to(tl.int32, bitcast=True) & -256) | column[None, :]
        scores = packed.to(tl.float32, bitcast=True)
        for place in tl.static_range(3):
            lowest = tl.min(scores, axis=1)
            number = start + (lowest.to(tl.int32, bitcast=True) & 255)
            first, first_number, second, second_number, third = _insert(
                lowest, number, first, first_number, second, second_number, third
            )
            if place < 2:
                scores = tl.where(scores == lowest[:, None], 1e38, scores)
    length = tl.load(lengths + read)
    limit = first + per_length * length + per_square * tl.load(squares + first_number) + absolute
    unclear = tl.where(second > limit, 0, 1) + tl.where(third > limit, 0, 1)
    tl.store(best + numbers, first_number, mask=numbers < n)
    tl.store(runner_up + numbers, second_number, mask=numbers < n)
    tl.store(status + numbers, unclear.to(tl.int8), mask=numbers < n)


def best_two(
    rows: Tensor,
    centroids: Tensor,
    norms: Tensor,
    lengths: Tensor,
    squares: Tensor,
    limits: tuple[float, float, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the nearest and second-nearest centroid by their scores, and how many others could be the nearest: 0, 1 or 2+.

    Args:
        rows: (n, w) float16 or bfloat16, w a multiple of `BLOCK_WIDTH`.
        centroids: (K', w), the centroids times -2, padded to a multiple of `BLOCK_COLUMNS`.
        norms: (K',) float32, what is added to the products; `NO_CENTROID` for padding.
        lengths, squares: |x|^2 (n,) and |c|^2 (K',), float32.
        limits: a score above the lowest by limits[0] |x|^2 + limits[1] |c|^2 + limits[2] cannot be the nearest's.

    Returns:
        best (n,) int32, runner-up (n,) int32, status (n,) int8.
    """
    n = len(rows)
    best, runner_up = (torch.empty(n, dtype=torch.int32, device=rows.device) for _ in range(2))
    status = torch.empty(n, dtype=torch.int8, device=rows.device)
    wide = rows.shape[1] > _WIDE
    _best_two_kernel[(triton.cdiv(n, _BLOCK_ROWS),)](
        rows, centroids, norms, lengths, squares, best, runner_up, status, n, len(centroids), *limits,
        WIDTH=rows.shape[1], ROWS=_BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS if wide else BLOCK_COLUMNS // 2, INNER=BLOCK_WIDTH,
        num_warps=8 if wide else 4, num_stages=4 if wide else 3,
    )  # fmt: skip
    return best, runner_up, status


@triton.jit  # type: ignore[untyped-decorator]
def _nearer_kernel(  # type: ignore[no-untyped-def]
    rows, points, chosen, one, other, nearer, width, scale, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0)
    row = tl.load(chosen + place).to(tl.int64)
    a, b = tl.load(one + row).to(tl.int64), tl.load(other + row).to(tl.int64)
    low = tl.zeros((BLOCK,), tl.int64)
    near = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        x = (tl.load(rows + row * width + at, mask=inside, other=0.0).to(tl.float64) * scale).to(tl.int64)
        p = tl.load(points + a * width + at, mask=inside, other=0)
        q = tl.load(points + b * width + at, mask=inside, other=0)
        left, right = q - p, 2 * x - p - q
        low += left * right
        near += left.to(tl.float64) * right.to(tl.float64)
    # D(x, p) - D(x, q) = (q - p) (2 x - p - q): its low word decides unless it is so large that float64 is certain.
    difference, approximate = tl.sum(low, axis=0), tl.sum(near, axis=0)
    certain = tl.abs(approximate) > 4e18
    smaller = tl.where(certain, approximate < 0, difference < 0)
    equal = (difference == 0) & (certain == 0)
    tl.store(nearer + place, tl.where(equal, tl.minimum(a, b), tl.where(smaller, a, b)).to(tl.int32))


def nearer(rows: Tensor, points: Tensor, chosen: Tensor, one: Tensor, other: Tensor, bits: int) -> Tensor:
    """The nearer (m,) of two centroids by exact squared distances, for the rows numbered `chosen` (m,); ties: the lower.

    Args:
        rows: (n, d) float32, multiples of 2**-bits.
        points: (K, d) int64.
        one, other: (n,) int32, numbers of centroids.
    """
    found = torch.empty(len(chosen), dtype=torch.int32, device=rows.device)
    if len(chosen):
        width = rows.shape[1]
        block = min(1024, triton.next_power_of_2(width))
        _nearer_kernel[(len(chosen),)](rows, points, chosen, one, other, found, width, 2.0**bits, BLOCK=block, num_warps=4)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    rows, entries, labels, signs, sums, sizes, count, width, ENTRIES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    start = tl.program_id(0) * ENTRIES
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    total = tl.zeros((BLOCK,), tl.float64)
    number = tl.zeros((), tl.float64)
    counts = tl.program_id(1) == 0
    label = tl.load(labels + start).to(tl.int64)
    for place in range(start, tl.minimum(start + ENTRIES, count)):
        current = tl.load(labels + place).to(tl.int64)
        if current != label:
            tl.atomic_add(sums + label * width + at, total, mask=inside, sem="relaxed")
            tl.atomic_add(sizes + label, number, mask=counts, sem="relaxed")
            total = tl.zeros((BLOCK,), tl.float64)
            number = tl.zeros((), tl.float64)
            label = current
        row = tl.load(entries + place).to(tl.int64)
        sign = tl.load(signs + place)
        total += tl.load(rows + row * width + at, mask=inside, other=0.0).to(tl.float64) * sign
        number += sign
    tl.atomic_add(sums + label * width + at, total, mask=inside, sem="relaxed")
    tl.atomic_add(sizes + label, number, mask=counts, sem="relaxed")


def add_to_sums(sums: Tensor, sizes: Tensor, rows: Tensor, entries: Tensor, labels: Tensor, signs: Tensor) -> None:
    """Add signs[i] * rows[entries[i]] to sums[labels[i]] and signs[i] to sizes[labels[i]], in place; exact in any order.

    Args:
        sums: (K, d) float64; sizes: (K,) float64.
        rows: (n, d) float32.
        entries, labels, signs: (m,) int, int, float64; the labels are sorted.
    """
    if len(entries):
        width = rows.shape[1]
        block = min(_SUM_WIDTH, triton.next_power_of_2(width))
        tiles = (triton.cdiv(len(entries), _SUM_ENTRIES), triton.cdiv(width, block))
        _sum_kernel[tiles](
            rows, entries, labels, signs, sums, sizes, len(entries), width, ENTRIES=_SUM_ENTRIES, BLOCK=block, num_warps=2
        )
