"""The search by lower bounds returns the exact nearest centroids, whatever is multiplied, and never bounds from above."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from ktray.clustering import lower_bounds
from ktray.clustering.grid import Codebook, Grid
from tests.awkward_rows import K, tables

TYPES = [torch.bfloat16, torch.float32]


def on_grid(rows: NDArray[np.float32]) -> tuple[Grid, NDArray[np.float32]]:
    centre = np.partition(rows, (len(rows) - 1) // 2, axis=0)[(len(rows) - 1) // 2]
    made = Grid.around(rows, centre, float(np.abs(rows.astype(np.float64) - centre).max()), len(rows))
    return made, made.rows(rows)


def nearest(rows: NDArray[np.float32], codebook: Codebook) -> NDArray[np.int64]:
    """The nearest centroids (n,) by Python's whole numbers, the first of equals."""
    whole = codebook.grid.whole(rows).astype(object)
    return np.stack([((whole - point) ** 2).sum(axis=1) for point in codebook.points.astype(object)], axis=1).argmin(axis=1)


def bounds_and_distances(rows: NDArray[np.float32], codebook: Codebook, basis: lower_bounds.Basis | None):
    """Lower bounds by the product, and squared distances (n, K) in the same units, in long double."""
    of_rows = lower_bounds.coarse(rows, basis, 1 << 30)
    search = lower_bounds.Search(codebook, basis)
    assert of_rows.inputs is not None
    found = (of_rows.inputs @ search._inputs).double().numpy()
    wide, points = rows.astype(np.longdouble), codebook.centroid_rows.astype(np.longdouble)
    return found, np.stack([((wide - point) ** 2).sum(axis=1) for point in points], axis=1)


@pytest.mark.parametrize("with_basis", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("table", list(tables()))
def test_awkward_rows_get_the_nearest_centroid_by_whole_numbers(monkeypatch, table, dtype, with_basis) -> None:
    monkeypatch.setattr(lower_bounds, "product_type", lambda: dtype)
    monkeypatch.setattr(lower_bounds, "DIRECTIONS", 5)
    made, rows = on_grid(tables()[table])
    codebook = Codebook(made, made.whole(rows[:: len(rows) // K][:K]))
    basis = lower_bounds.Basis.of(rows) if with_basis else None
    for room in (0, 1 << 30):
        found, decided_again = lower_bounds.Search(codebook, basis)(rows, lower_bounds.coarse(rows, basis, room))
        assert (found == nearest(rows, codebook)).all()
        assert 0 <= decided_again <= len(rows)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("directions", [None, 3, 40])
@pytest.mark.parametrize("width", [7, 40, 700])
def test_bounds_are_below_the_distances_and_mostly_close(monkeypatch, width, directions, dtype) -> None:
    monkeypatch.setattr(lower_bounds, "product_type", lambda: dtype)
    monkeypatch.setattr(lower_bounds, "DIRECTIONS", directions)
    rng = np.random.default_rng(width)
    made, rows = on_grid((rng.normal(size=(400, width)) * np.arange(1, width + 1) ** -0.5).astype(np.float32))
    codebook = Codebook(made, made.whole(rows[:50]))
    basis = lower_bounds.Basis.of(rows) if directions else None
    found, exact = bounds_and_distances(rows, codebook, basis)
    assert (found <= exact * (1 + 2.0 ** (-8 if dtype == torch.bfloat16 else -23)) + 2.0**-60).all()
    if not directions or directions >= width:
        lengths = (rows**2).sum(axis=1)[:, None] + (codebook.centroid_rows**2).sum(axis=1)
        assert (exact - found <= (0.03 if dtype == torch.bfloat16 else 1e-3) * lengths + 2.0**-8 * exact).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 30), st.sampled_from(TYPES), st.booleans(), st.floats(-20, 20))
def test_any_rows_get_the_nearest_centroid(seed, width, k, dtype, with_basis, scale) -> None:
    rng = np.random.default_rng(seed)
    rows = np.round(rng.normal(size=(90, width)) * 2 ** rng.integers(0, 6)) * np.float32(2.0**scale)
    rows[0] += np.float32(2.0**scale)
    made, rows = on_grid(rows.astype(np.float32))
    codebook = Codebook(made, made.whole(rows[rng.integers(0, 90, k)]) + rng.integers(-1, 2, (k, width)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lower_bounds, "product_type", lambda: dtype)
        patch.setattr(lower_bounds, "DIRECTIONS", 4)
        basis = lower_bounds.Basis.of(rows) if with_basis else None
        found, _ = lower_bounds.Search(codebook, basis)(rows, lower_bounds.coarse(rows, basis))
    assert (found == nearest(rows, codebook)).all()


def test_most_rows_of_a_mixture_need_no_whole_numbers(monkeypatch) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, 300)) * np.arange(1, 301) ** -0.5
    rows = centres[rng.integers(0, 60, 3000)] + 0.3 * rng.normal(size=(3000, 300)) * np.arange(1, 301) ** -0.5
    made, rows = on_grid(rows.astype(np.float32))
    codebook = Codebook(made, made.whole(rows[:60]))
    expected = nearest(rows[:200], codebook)
    for dtype in TYPES:
        monkeypatch.setattr(lower_bounds, "product_type", lambda dtype=dtype: dtype)
        basis = lower_bounds.Basis.of(rows)
        search = lower_bounds.Search(codebook, basis)
        found, decided_again = search(rows, lower_bounds.coarse(rows, basis, 1 << 30))
        assert (found[:200] == expected).all()
        assert decided_again < 0.02 * len(rows)
        assert search._compared < 0.3 * len(rows) * 60
