"""The projection agrees with scikit-learn in each step and is bitwise identical for any number of workers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize

from ktray.clustering import projection
from ktray.pool import LocalPool
from tests.pools import ShuffledPool

ROWS = (np.random.default_rng(0).normal(size=(700, 12)) @ np.diag(np.linspace(3, 0.3, 12)) + 2).astype(np.float32)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return write(tmp_path, ROWS)


def write(directory: Path, rows: np.ndarray) -> list[Path]:
    paths = [directory / f"features-{index:05d}.npy" for index in range(-(-len(rows) // 90))]
    for index, path in enumerate(paths):
        np.save(path, rows[index * 90 : index * 90 + 90])
    return paths


def fit(shards: list[Path], pool=None, *, l2=False, pca: int | None = None, whiten=False, l2_after=False):
    return projection.fit(shards, l2=l2, pca=pca, whiten=whiten, l2_after=l2_after, pool=pool or LocalPool())


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("l2", [False, True])
def test_pca_agrees_with_scikit_learn_up_to_signs(shards: list[Path], whiten: bool, l2: bool) -> None:
    ours = projection.apply(fit(shards, l2=l2, pca=5, whiten=whiten), ROWS)
    rows = normalize(ROWS.astype(np.float64)) if l2 else ROWS.astype(np.float64)
    oracle = PCA(5, whiten=whiten, svd_solver="full").fit(rows)
    theirs = oracle.transform(rows)
    signs = np.sign((ours * theirs).sum(axis=0))
    np.testing.assert_allclose(ours * signs, theirs, atol=2e-5 if not whiten else 2e-4)
    np.testing.assert_allclose(fit(shards, l2=l2, pca=5)["explained"], oracle.explained_variance_ratio_, rtol=1e-5)


def test_the_steps_are_applied_in_order(shards: list[Path]) -> None:
    steps = projection.apply(fit(shards, l2=True, pca=4, whiten=True), ROWS)
    np.testing.assert_allclose(
        projection.apply(fit(shards, l2=True, pca=4, whiten=True, l2_after=True), ROWS), normalize(steps), atol=1e-6
    )
    np.testing.assert_allclose(projection.apply(fit(shards, l2=True), ROWS), normalize(ROWS), atol=1e-6)
    assert (projection.apply(fit(shards), ROWS) == ROWS).all()
    assert (projection.apply({}, ROWS) == ROWS).all()


def test_each_component_is_positive_where_it_is_largest(shards: list[Path]) -> None:
    components = fit(shards, pca=12)["components"]
    assert (components[np.arange(12), np.abs(components).argmax(axis=1)] > 0).all()


@pytest.mark.parametrize("pca", [12, 500])
def test_a_pca_of_the_full_width_is_marked_as_a_rotation(shards: list[Path], pca: int) -> None:
    rotation = fit(shards, pca=pca)
    assert rotation["rotation"]
    assert not fit(shards, pca=11)["rotation"]
    turned = projection.apply(rotation, ROWS).astype(np.float64)
    before, after = ROWS[:50] - ROWS[:50, None], turned[:50] - turned[:50, None]
    np.testing.assert_allclose((after**2).sum(2), (before**2).sum(2), atol=1e-3)


def test_whitening_makes_unit_variances_and_leaves_dead_units_near_zero(tmp_path: Path) -> None:
    rows = np.concatenate([ROWS, np.zeros((len(ROWS), 3), np.float32)], axis=1)
    white = projection.apply(fit(write(tmp_path, rows), whiten=True), rows)
    np.testing.assert_allclose(np.cov(white[:, :12].T), np.eye(12), atol=1e-3)
    assert np.abs(white[:, 12:]).max() < 0.01


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_results_are_bitwise_identical_for_any_number_of_workers(shards: list[Path], workers: int) -> None:
    alone, together = fit(shards, l2=True, pca=7, whiten=True), fit(shards, ShuffledPool(workers), l2=True, pca=7, whiten=True)
    assert {name: array.tobytes() for name, array in alone.items()} == {n: a.tobytes() for n, a in together.items()}


@pytest.mark.parametrize("size", [1, 64, 100, 699])
def test_rows_do_not_depend_on_the_batch(shards: list[Path], size: int) -> None:
    fitted = fit(shards, l2=True, pca=7, whiten=True, l2_after=True)
    pieces = [projection.apply(fitted, ROWS[at : at + size]) for at in range(0, len(ROWS), size)]
    assert (np.concatenate(pieces) == projection.apply(fitted, ROWS)).all()


def test_a_row_of_zeros_is_kept(shards: list[Path]) -> None:
    assert (projection.apply(fit(shards, l2=True), np.zeros((2, 12), np.float32)) == 0).all()


def test_equal_rows_and_features_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="all 200 rows of the features are equal"):
        fit(write(tmp_path, np.full((200, 4), 0.1, np.float32)), pca=2)
    rows = ROWS.copy()
    rows[100, 3] = np.inf
    with pytest.raises(ValueError, match=r"features-00001.npy: 1 row is not finite, the first is row 10"):
        fit(write(tmp_path, rows), pca=2)


def test_the_projection_survives_an_npz_file(shards: list[Path], tmp_path: Path) -> None:
    fitted = fit(shards, l2=True, pca=3)
    np.savez(tmp_path / "projection.npz", **fitted)
    with np.load(tmp_path / "projection.npz", allow_pickle=False) as file:
        assert (projection.apply(dict(file), ROWS) == projection.apply(fitted, ROWS)).all()


def test_moments_on_a_torch_device_are_those_of_the_workers(shards: list[Path]) -> None:
    normalised = {"l2": np.array(True), "l2_after": np.array(False)}
    _, centre, radius = projection.centre_and_radius(shards, normalised, LocalPool())
    shared = normalised, centre, radius * 2.0**-21
    for here, there in zip(
        projection._block_moments(shards, shared), projection._moments_on("cpu", shards, shared), strict=True
    ):
        assert (np.asarray(here) == np.asarray(there)).all()
