"""Triton kernels of k-means: the best two centroids of each row, exact comparisons, exact sums of clusters, and new centroids.

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
_OWN_ROWS = 64


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


# Numbers that change from call to call are not specialised, since each special case is compiled anew.
@triton.jit(do_not_specialize=["n"])  # type: ignore[untyped-decorator]
def _best_two_kernel(  # type: ignore[no-untyped-def]
    rows, chosen, centroids, norms, lengths, squares, best, runner_up, status, nearest_bound, next_bound,
    n, k_padded, per_length, per_square, absolute, length_share, unit,
    ALL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    numbers = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    read = tl.minimum(numbers, n - 1)
    if not ALL:
        read = tl.load(chosen + read)
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
    inside = numbers < n
    tl.store(best + numbers, first_number, mask=inside)
    tl.store(runner_up + numbers, second_number, mask=inside)
    tl.store(status + numbers, unclear.to(tl.int8), mask=inside)
    below = 0.5 * per_length * length + absolute
    tl.store(nearest_bound + numbers, _distance(first - below, length * length_share, unit), mask=inside)
    tl.store(next_bound + numbers, _distance(second - below, length * length_share, unit), mask=inside)


@triton.jit
def _distance(score, length, unit):  # type: ignore[no-untyped-def]
    """A lower bound of a distance, from those of its score and of |x|^2."""
    return tl.sqrt(tl.maximum(score * unit + length, 0.0)) * 0.999999


def best_two(
    rows: Tensor,
    chosen: Tensor | None,
    centroids: Tensor,
    norms: Tensor,
    lengths: Tensor,
    squares: Tensor,
    limits: tuple[float, float, float],
    unit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Numbers of the nearest and second-nearest centroid by their scores, how many others could be the nearest, and bounds.

    Args:
        rows: (n, w) float16 or bfloat16, w a multiple of `BLOCK_WIDTH`.
        chosen: (m,) int64, the numbers of the rows that are searched; None for all, m = n.
        centroids: (K', w), the centroids times -2, padded to a multiple of `BLOCK_COLUMNS`.
        norms: (K',) float32, what is added to the products; `NO_CENTROID` for padding.
        lengths, squares: |x|^2 (n,) and |c|^2 (K',), float32.
        limits: a score above the lowest by limits[0] |x|^2 + limits[1] |c|^2 + limits[2] cannot be the nearest's.
        unit: what a score of 1 is in the units of squared distances.

    Returns:
        best (m,) int32, runner-up (m,) int32, status (m,) int8: 0, 1 or 2+ others; and (m,) float32 each, below the distances
        to all centroids, and to all but `best`.
    """
    m = len(rows) if chosen is None else len(chosen)
    best, runner_up = (torch.empty(m, dtype=torch.int32, device=rows.device) for _ in range(2))
    status = torch.empty(m, dtype=torch.int8, device=rows.device)
    nearest_bound, next_bound = (torch.empty(m, device=rows.device) for _ in range(2))
    if not m:
        return best, runner_up, status, nearest_bound, next_bound
    wide = rows.shape[1] > _WIDE
    _best_two_kernel[(triton.cdiv(m, _BLOCK_ROWS),)](
        rows, status if chosen is None else chosen, centroids, norms, lengths, squares, best, runner_up, status,
        nearest_bound, next_bound, m, len(centroids), *limits, length_share(rows.shape[1]), unit,
        ALL=chosen is None, WIDTH=rows.shape[1], ROWS=_BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS if wide else BLOCK_COLUMNS // 2,
        INNER=BLOCK_WIDTH, num_warps=8 if wide else 4, num_stages=4 if wide else 3,
    )  # fmt: skip
    return best, runner_up, status, nearest_bound, next_bound


def length_share(width: int) -> float:
    """What part of a float32 |x|^2 is certainly not more than |x|^2, by the errors of a sum in any order."""
    return 1.0 - (width + 16) * 2.0**-23


@triton.jit  # type: ignore[untyped-decorator]
def _own_kernel(  # type: ignore[no-untyped-def]
    rows, centroids, lengths, squares, labels, drift, upper, n, growth, slack, absolute, inverse,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    numbers = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = numbers < n
    label = tl.load(labels + numbers, mask=inside, other=0).to(tl.int64)
    unknown = tl.load(upper + numbers, mask=inside, other=0.0) > 1e30
    needed = inside & (unknown | (tl.load(drift + label, mask=inside, other=0.0) > 0))
    total = tl.zeros((ROWS, INNER), tl.float32)
    for first in range(0, WIDTH, INNER):
        at = first + tl.arange(0, INNER)
        x = tl.load(rows + numbers[:, None] * WIDTH + at[None, :], mask=needed[:, None], other=0.0).to(tl.float32)
        c = tl.load(centroids + label[:, None] * WIDTH + at[None, :], mask=needed[:, None], other=0.0).to(tl.float32)
        difference = x + 0.5 * c
        total += difference * difference
    distance = tl.sqrt(tl.sum(total, axis=1)) * inverse * growth
    lengths_of_both = tl.sqrt(tl.load(lengths + numbers, mask=needed, other=0.0)) + tl.sqrt(
        tl.load(squares + label, mask=needed, other=0.0)
    )
    tl.store(upper + numbers, distance + slack * lengths_of_both + absolute, mask=needed)


def own_distances(
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
    """Set `upper` (n,) float32 to upper bounds of the distances of rows to their centroids, where it is > 1e30 or that moved.

    Args:
        rows, centroids, lengths, squares: as for `best_two`.
        labels: (n,) int32; drift: (K,) float32, how far each centroid moved.
        errors: relative error of a distance in float32, relative one of rows and centroids, and an absolute one.
        scale: what a distance of 1 is in the units of `rows`.
    """
    growth, slack, absolute = errors
    _own_kernel[(triton.cdiv(len(rows), _OWN_ROWS),)](
        rows, centroids, lengths, squares, labels, drift, upper, len(rows), 1.0 + growth, slack, absolute, 1.0 / scale,
        WIDTH=rows.shape[1], ROWS=_OWN_ROWS, INNER=BLOCK_WIDTH, num_warps=4,
    )  # fmt: skip


@triton.jit
def _whole(value):  # type: ignore[no-untyped-def]
    """The nearest whole number of a float64, half to even."""
    return tl.where(tl.abs(value) < 2e15, (value + 6755399441055744.0) - 6755399441055744.0, value)


@triton.jit  # type: ignore[untyped-decorator]
def _centroid_kernel(  # type: ignore[no-untyped-def]
    old, sums, sizes, words, points, inputs, single, squares, norms, drift,
    k, width, padded, scale, row_scale, per_square, norm_scale, MEANS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    exists = number < k
    low = tl.zeros((BLOCK,), tl.int64)
    near, square, moved = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    if MEANS:
        size = tl.load(sizes + number, mask=exists, other=0.0)
    for start in range(0, padded, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = exists & (at < width)
        point = tl.load(old + number * width + at, mask=inside, other=0)
        if MEANS:
            sum_of = tl.load(sums + number * width + at, mask=inside, other=0.0) * scale
            crossed = 2 * sum_of.to(tl.int64) - size.to(tl.int64) * point
            low += point * crossed
            near += point.to(tl.float64) * crossed.to(tl.float64)
            mean = _whole(sum_of / tl.maximum(size, 1.0)).to(tl.int64)
            before = point
            point = tl.where(size > 0, mean, point)
            step = (point - before).to(tl.float64)
            moved += step * step
            tl.store(points + number * width + at, point, mask=inside)
        scaled = point.to(tl.float64) / scale
        square += scaled * scaled
        tl.store(single + number * width + at, scaled.to(tl.float32), mask=inside)
        turned = (scaled * (-2.0 * row_scale)).to(tl.float32).to(inputs.dtype.element_ty)
        tl.store(inputs + number * padded + at, turned, mask=at < padded)
    total = tl.sum(square, axis=0)
    tl.store(squares + number, total.to(tl.float32))
    tl.store(norms + number, tl.where(exists, total * per_square * norm_scale, 1e37).to(tl.float32))
    if MEANS:
        word, approximate = tl.sum(low, axis=0), tl.sum(near, axis=0)
        unsigned = word.to(tl.float64) + tl.where(word < 0, 18446744073709551616.0, 0.0)
        high = _whole((approximate - unsigned) / 18446744073709551616.0).to(tl.int64)
        tl.store(words + number, high, mask=exists)
        tl.store(words + k + number, word, mask=exists)
        tl.store(words + 2 * k + number, size.to(tl.int64), mask=exists)
        distance = tl.sqrt(tl.sum(moved, axis=0)) / scale * 1.000001
        tl.store(drift + number, distance.to(tl.float32), mask=exists)


@triton.jit  # type: ignore[untyped-decorator]
def _square_kernel(  # type: ignore[no-untyped-def]
    rows, high, low, width, scale, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.int64)
    near = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = (tl.load(rows + row * width + at, mask=at < width, other=0.0).to(tl.float64) * scale).to(tl.int64)
        total += x * x
        near += x.to(tl.float64) * x.to(tl.float64)
    word, approximate = tl.sum(total, axis=0), tl.sum(near, axis=0)
    unsigned = word.to(tl.float64) + tl.where(word < 0, 18446744073709551616.0, 0.0)
    tl.store(high + row, _whole((approximate - unsigned) / 18446744073709551616.0).to(tl.int64))
    tl.store(low + row, word)


def squares(rows: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """High and low words (n,) int64 of the exact |x|^2 of rows (n, d) float32, multiples of 2**-bits, in squared steps."""
    width = rows.shape[1]
    high, low = (torch.empty(len(rows), dtype=torch.int64, device=rows.device) for _ in range(2))
    block = min(1024, triton.next_power_of_2(width))
    _square_kernel[(len(rows),)](rows, high, low, width, 2.0**bits, BLOCK=block, num_warps=4)
    return high, low


def centroids(
    points: Tensor, sums: Tensor | None, sizes: Tensor | None, bits: int, padded: int, dtype: torch.dtype,
    row_scale: float, per_square: float, words: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """New centroids, which are the means of clusters, and what a search among them takes; of `points` themselves without sums.

    Args:
        points: (K, d) int64, the old centroids; an empty cluster keeps its own.
        sums, sizes: (K, d) and (K,) float64.
        bits: of the grid.
        padded, dtype, row_scale: w, type of the inputs, and their scale.
        per_square: the part of |c|^2 that is added to a score.
        words: (3 K,) int64 or longer, for high and low words of the inner products of `points` and 2 S - n C, and the sizes.

    Returns:
        points (K, d) int64, inputs (K', w), single (K, d) float32, squares (K',), norms (K',) and drift (K,), float32: how far
        each centroid moved, rounded up.
    """
    (k, width), device = points.shape, points.device
    rows = triton.cdiv(k, BLOCK_COLUMNS) * BLOCK_COLUMNS
    means = sums is not None
    found = torch.empty_like(points) if means else points
    inputs = torch.empty(rows, padded, dtype=dtype, device=device)
    single = torch.empty(k, width, device=device)
    squares, norms, drift = (torch.empty(rows, device=device) for _ in range(3))
    _centroid_kernel[(rows,)](
        points, sums if means else single, sizes if means else single, words if means else found, found,
        inputs, single, squares, norms, drift, k, width, padded, 2.0**bits, row_scale, per_square, row_scale**2,
        MEANS=means, BLOCK=min(1024, triton.next_power_of_2(padded)), num_warps=4,
    )  # fmt: skip
    return found, inputs, single, squares, norms, drift[:k]


@triton.jit  # type: ignore[untyped-decorator]
def _nearer_of(row_at, p_at, q_at, p, q, width, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The nearer of the centroids numbered p and q, whose coordinates begin at p_at and q_at; ties: the lower number."""
    low = tl.zeros((BLOCK,), tl.int64)
    near = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        x = (tl.load(row_at + at, mask=inside, other=0.0).to(tl.float64) * scale).to(tl.int64)
        one, other = tl.load(p_at + at, mask=inside, other=0), tl.load(q_at + at, mask=inside, other=0)
        left, right = other - one, 2 * x - one - other
        low += left * right
        near += left.to(tl.float64) * right.to(tl.float64)
    # D(x, p) - D(x, q) = (q - p) (2 x - p - q): its low word decides unless it is so large that float64 is certain.
    difference, approximate = tl.sum(low, axis=0), tl.sum(near, axis=0)
    certain = tl.abs(approximate) > 4e18
    smaller = tl.where(certain, approximate < 0, difference < 0)
    equal = (difference == 0) & (certain == 0)
    return tl.where(equal, tl.minimum(p, q), tl.where(smaller, p, q))


@triton.jit  # type: ignore[untyped-decorator]
def _nearer_kernel(  # type: ignore[no-untyped-def]
    rows, points, chosen, one, other, nearer, width, scale, BLOCK: tl.constexpr
):  # fmt: skip
    place = tl.program_id(0)
    row = tl.load(chosen + place).to(tl.int64)
    a, b = tl.load(one + place).to(tl.int64), tl.load(other + place).to(tl.int64)
    found = _nearer_of(rows + row * width, points + a * width, points + b * width, a, b, width, scale, BLOCK)
    tl.store(nearer + place, found.to(tl.int32))


def nearer(rows: Tensor, points: Tensor, chosen: Tensor, one: Tensor, other: Tensor, bits: int) -> Tensor:
    """The nearer (m,) of two centroids by exact squared distances, for the rows numbered `chosen` (m,); ties: the lower.

    Args:
        rows: (n, d) float32, multiples of 2**-bits.
        points: (K, d) int64.
        one, other: (m,) int32, numbers of centroids.
    """
    found = torch.empty(len(chosen), dtype=torch.int32, device=rows.device)
    if len(chosen):
        width = rows.shape[1]
        block = min(1024, triton.next_power_of_2(width))
        _nearer_kernel[(len(chosen),)](rows, points, chosen, one, other, found, width, 2.0**bits, BLOCK=block, num_warps=4)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def _decide_kernel(  # type: ignore[no-untyped-def]
    rows, points, single, squares, lengths, status, best, runner_up, count, k, width, scale, per_length, error,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    unclear = tl.load(status + row)
    if unclear > 0:
        tl.atomic_add(count, 1, sem="relaxed")
        row_at = rows + row * width
        a, b = tl.load(best + row).to(tl.int64), tl.load(runner_up + row).to(tl.int64)
        a = _nearer_of(row_at, points + a * width, points + b * width, a, b, width, scale, BLOCK)
        if unclear > 1:
            # float32 scores of all centroids, and exact comparisons of those that could be nearer than the nearest so far.
            length = tl.load(lengths + row)
            lowest = tl.full((), 1e38, tl.float32)
            inner, column = tl.arange(0, INNER), tl.arange(0, COLUMNS)
            for start in range(0, k, COLUMNS):
                number = start + column
                exists = number < k
                products = tl.zeros((COLUMNS,), tl.float32)
                for first in range(0, width, INNER):
                    at = first + inner
                    inside = at < width
                    x = tl.load(row_at + at, mask=inside, other=0.0)
                    c = tl.load(
                        single + number[:, None].to(tl.int64) * width + at[None, :],
                        mask=exists[:, None] & inside[None, :],
                        other=0.0,
                    )
                    products += tl.sum(c * x[None, :], axis=1)
                square = tl.load(squares + number, mask=exists, other=0.0)
                margin = error * (per_length * length + 2 * square)
                scores = square - 2 * products
                lowest = tl.minimum(lowest, tl.min(tl.where(exists, scores + margin, 1e38), axis=0))
                left = tl.where(exists & (scores - margin <= lowest), 1, 0)
                while tl.sum(left, axis=0) > 0:
                    chosen = tl.max(tl.where(left > 0, COLUMNS - column, 0), axis=0)
                    other = (start + COLUMNS - chosen).to(tl.int64)
                    left = tl.where(column == COLUMNS - chosen, 0, left)
                    a = _nearer_of(row_at, points + a * width, points + other * width, a, other, width, scale, BLOCK)
        tl.store(best + row, a.to(tl.int32))


def decide(
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
    """Replace `best` (n,) by the exact nearest centroid, in place, for rows of which `best_two` left that open.

    One launch whose size does not depend on how many they are; for few rows, since each compares all centroids alone.

    Args:
        rows: (n, d) float32; points: (K, d) int64; single: (K, d), the points in the units of rows, float32.
        squares, lengths, status, best, runner_up: as for `best_two`.
        count: (1,) int64, to which the number of these rows is added.
    """
    width = rows.shape[1]
    terms = (width + 16) * 2.0**-23
    _decide_kernel[(len(rows),)](
        rows, points, single, squares, lengths, status, best, runner_up, count, len(points), width,
        2.0**bits, 1.0 + 2.0**-10, terms,
        BLOCK=min(1024, triton.next_power_of_2(width)), COLUMNS=32, INNER=min(128, triton.next_power_of_2(width)), num_warps=4,
    )  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _move_kernel(  # type: ignore[no-untyped-def]
    rows, old, new, sums, sizes, moved, width, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    source, target = tl.load(old + row).to(tl.int64), tl.load(new + row).to(tl.int64)
    if source != target:
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < width
            x = tl.load(rows + row * width + at, mask=inside, other=0.0).to(tl.float64)
            tl.atomic_add(sums + target * width + at, x, mask=inside, sem="relaxed")
            if source >= 0:
                tl.atomic_add(sums + source * width + at, -x, mask=inside, sem="relaxed")
        tl.atomic_add(sizes + target, 1.0, sem="relaxed")
        if source >= 0:
            tl.atomic_add(sizes + source, -1.0, sem="relaxed")
        tl.atomic_add(moved, 1, sem="relaxed")
        tl.store(old + row, target.to(tl.int32))


def move(rows: Tensor, old: Tensor, new: Tensor, sums: Tensor, sizes: Tensor, moved: Tensor) -> None:
    """Move rows whose label changed between `sums` (K, d) and `sizes` (K,), both float64, in place; exact in any order.

    `old` (n,) becomes `new` (n,), and `moved` (1,) int64 counts the changes.
    """
    width = rows.shape[1]
    _move_kernel[(len(rows),)](
        rows, old, new, sums, sizes, moved, width, BLOCK=min(1024, triton.next_power_of_2(width)), num_warps=4
    )


@triton.jit(do_not_specialize=["count"])  # type: ignore[untyped-decorator]
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
