"""Squared distances, sums and inertia are whole numbers, whatever the values; what does not fit on a grid is refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from ktray.clustering import grid, nearest_centroids
from ktray.clustering.grid import Codebook, Grid
from tests.awkward_rows import tables


def grid_of(rows: NDArray[np.float32], total: int | None = None) -> Grid:
    centre = np.partition(rows, (len(rows) - 1) // 2, axis=0)[(len(rows) - 1) // 2]
    return Grid.around(rows, centre, float(np.abs(rows.astype(np.float64) - centre).max()), total or len(rows))


def as_integers(words: grid.Words) -> list[int]:
    return [(int(high) << 64) + int(low) for high, low in zip(*words, strict=True)]


@pytest.mark.parametrize("table", list(tables()))
def test_rows_move_by_half_a_step_at_most_and_stay_within_one(table: str) -> None:
    rows = tables()[table]
    made = grid_of(rows)
    on_grid = made.rows(rows)
    assert on_grid.dtype == np.float32
    assert 0.5 <= np.abs(on_grid).max() <= 1
    step = Fraction(2) ** (made.exponent - made.bits)
    whole = made.whole(on_grid)
    for row, numbers in list(zip(rows, whole, strict=True))[::40]:
        for value, centre, number in zip(row, made.centre, numbers, strict=True):
            exact = Fraction(float(value)) - Fraction(float(centre))
            assert abs(exact - int(number) * step) <= step / 2 + abs(exact) * Fraction(2) ** -23
    assert (whole * 2.0**-made.bits == on_grid).all()


@pytest.mark.parametrize("width", [1, 3, 512, 9217])
@pytest.mark.parametrize("size", [2**10, 2**30, 2**41])
def test_inner_products_are_those_of_python_integers(width: int, size: int) -> None:
    rng = np.random.default_rng(width)
    left, right = rng.integers(-size, size + 1, (2, 7, width))
    left[0], right[0], right[1] = size, size, -size
    right[2] = left[2]
    expected = [sum(int(a) * int(b) for a, b in zip(*pair, strict=True)) for pair in zip(left, right, strict=True)]
    words = grid.inner_products(left, right)
    assert as_integers(words) == expected
    assert grid.total_of(words) == sum(expected)
    order = rng.permutation(width)
    assert as_integers(grid.inner_products(left[:, order], right[:, order])) == expected
    squares = grid.inner_products(left, left)
    np.testing.assert_allclose(grid.as_float(squares), [float(value) for value in as_integers(squares)], rtol=2.0**-51)


def check_search(rows: NDArray[np.float32], codebook: Codebook, count: int) -> None:
    """The search agrees with Python integers, for the lowest numbers among equals."""
    whole = codebook.grid.whole(rows).astype(object)
    squared = np.stack([((whole - point) ** 2).sum(axis=1) for point in codebook.points.astype(object)], axis=1)
    order = np.argsort(squared, axis=1, kind="stable")[:, :count]
    numbers, distances = nearest_centroids.nearest(rows, codebook, count)
    assert (numbers == order).all()
    expected = np.take_along_axis(squared, order, axis=1).astype(np.float64) * codebook.grid.square
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(distances, expected.astype(np.float32), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("table", list(tables()))
def test_the_nearest_of_awkward_rows_are_those_of_python_integers(table: str, count: int) -> None:
    rows = tables()[table]
    made = grid_of(rows)
    on_grid = made.rows(rows)
    points = made.whole(on_grid)[:30]
    points[20:] = (points[:10] + points[10:20]) // 2
    check_search(on_grid[:200], Codebook(made, points), count)


VALUES = st.one_of(
    st.integers(-3, 3).map(float), st.floats(-1, 1, width=32), st.sampled_from([1e-6, -1e-6, 0.5, 100.0, 1024.0, -1000.0])
)


def a_table(width: int):
    return st.integers(4, 12).flatmap(lambda n: arrays(np.float32, (n, width), elements=VALUES))


def check_any(rows: NDArray[np.float32], count: int, other: NDArray[np.float32]) -> None:
    if (rows == rows[0]).all():
        return
    try:
        made = grid_of(rows)
    except ValueError as error:  # one value is far from all others: the test of refusals says when
        if "a grid that reaches them is too coarse for the rest" not in str(error):
            raise
        return
    points = made.whole(made.rows(rows))
    codebook = Codebook(made, np.concatenate([points[::2], points[:1], (points[:1] + points[-1:]) // 2]))
    check_search(made.rows(rows), codebook, min(count, len(codebook.points)))
    within = np.abs(other.astype(np.float64) - made.centre).max(axis=1) < 1000 * 2.0**made.exponent
    check_search(made.rows(other[within]), codebook, 1)


TABLES = st.integers(1, 5).flatmap(lambda width: st.tuples(a_table(width), st.integers(1, 4), a_table(width)))


@settings(max_examples=60, deadline=None)
@given(TABLES)
def test_the_nearest_of_any_rows_are_those_of_python_integers(drawn) -> None:
    check_any(*drawn)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(TABLES)
def test_the_nearest_of_many_more_rows_are_those_of_python_integers(drawn) -> None:
    check_any(*drawn)


def test_a_codebook_survives_a_file(tmp_path: Path) -> None:
    rows = tables()["plain"]
    made = grid_of(rows)
    written = Codebook(made, made.whole(made.rows(rows[:9])))
    written.save(tmp_path / "codebook.npz")
    read = Codebook.load(tmp_path / "codebook.npz")
    assert (read.points == written.points).all()
    assert (read.grid.centre == made.centre).all()
    assert (read.grid.exponent, read.grid.bits) == (made.exponent, made.bits)
    np.testing.assert_allclose(read.centroids, rows[:9], atol=1e-6)


@pytest.mark.parametrize(("total", "width", "bits"), [(300, 24, 30), (1 << 21, 24, 30), (10**8, 24, 24), (600, 1 << 17, 28)])
def test_the_grid_is_as_fine_as_exact_sums_allow(total: int, width: int, bits: int) -> None:
    made = Grid.around(np.zeros((1, width), np.float32), np.zeros(width, np.float32), 1.0, total)
    assert made.bits == bits
    assert total * 2**bits <= 2**51
    assert 2 * (bits + 11) + 2 * (width - 1).bit_length() <= 53 + 63


def test_what_no_grid_can_hold_is_refused() -> None:
    rows = tables()["plain"]
    broken = rows.copy()
    broken[100, 3] = 1e9
    with pytest.raises(ValueError, match=r"e\+08 times as far .* \(largest deviation 1e\+09, usually .*`l2: true`"):
        grid_of(broken)
    broken[100, 3] = 1e5
    assert grid_of(broken).bits == 30
    with pytest.raises(ValueError, match="300 rows of 16777216 features are too many"):
        Grid.around(np.zeros((1, 1 << 24), np.float32), np.zeros(1 << 24, np.float32), 1.0, 300)
