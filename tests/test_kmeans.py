"""k-means agrees with scikit-learn and faiss, and is bitwise identical for any number of workers."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import faiss
import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.cluster import KMeans

from ktray.clustering import kmeans, nearest_centroids, projection
from ktray.clustering.grid import Codebook, Grid
from ktray.pool import LocalPool
from tests.pools import ShuffledPool
from tests.source import ROOT


def write(directory: Path, rows: NDArray, shard_rows: int = 100) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for start in range(0, len(rows), shard_rows):
        paths.append(directory / f"features-{start // shard_rows:05d}.npy")
        np.save(paths[-1], rows[start : start + shard_rows])
    return paths


def mixture(count: int = 1230, width: int = 20, centres: int = 40, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    means = rng.normal(size=(centres, width)) * 2
    return (means[rng.integers(0, centres, count)] + rng.normal(size=(count, width)) + 5).astype(np.float32)


def fit(shards: list[Path], k: int, *, seed: int = 0, iterations: int = 100, pool=None, project=None, **rest):
    return kmeans.fit(shards, k, seed=seed, iterations=iterations, projection=project or {}, pool=pool or LocalPool(), **rest)


def codebook_around(centroids: NDArray[np.float32], rows: NDArray[np.float32]) -> Codebook:
    """These centroids, rounded to a grid that reaches them and the rows."""
    both = np.concatenate([rows, centroids])
    centre = np.median(rows, axis=0).astype(np.float32)
    made = Grid.around(rows, centre, float(np.abs(both.astype(np.float64) - centre).max()), len(both))
    return Codebook(made, made.whole(made.rows(centroids)))


def squared_steps(rows: NDArray[np.float32], codebook: Codebook) -> NDArray:
    """(n, K) exact squared distances of rows on the grid, as Python integers."""
    whole = codebook.grid.whole(rows).astype(object)
    return np.stack([((whole - point) ** 2).sum(axis=1) for point in codebook.points.astype(object)], axis=1)


def assign(rows: NDArray[np.float32], codebook: Codebook) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    numbers, squared = nearest_centroids.nearest(codebook.grid.rows(rows), codebook, 1)
    return numbers[:, 0], squared[:, 0]


@pytest.mark.parametrize("project", [False, True])
def test_results_are_bitwise_identical_for_any_number_of_workers(tmp_path: Path, project: bool) -> None:
    shards = write(tmp_path, mixture())
    fitted = projection.fit(shards, l2=True, pca=8, whiten=True, l2_after=False, pool=LocalPool()) if project else {}
    reference = fit(shards, 30, project=fitted)
    for workers in (1, 2, 3, 7, 50):
        parallel = fit(shards, 30, project=fitted, pool=ShuffledPool(workers))
        assert parallel.centroids.tobytes() == reference.centroids.tobytes()
        assert (parallel.inertia, parallel.empty) == (reference.inertia, reference.empty)
        assert (parallel.sizes == reference.sizes).all()


def test_a_worker_without_a_cache_gives_bitwise_identical_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write(tmp_path, mixture())
    cached = fit(shards, 30)
    change = kmeans._sum_change

    def without_cache(group, shared):
        kmeans._release_cache(0, shared[0].key)
        return change(group, shared)

    monkeypatch.setattr(kmeans, "CACHE_BYTES", 0)
    monkeypatch.setattr(kmeans, "_sum_change", without_cache)
    uncached = fit(shards, 30)
    assert uncached.centroids.tobytes() == cached.centroids.tobytes()
    assert uncached.inertia == cached.inertia


def test_two_fits_on_one_worker_do_not_interfere(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", mixture(seed=1)), write(tmp_path / "two", mixture(seed=2))
    reference = fit(one, 20)
    during = []
    mixed = fit(one, 20, on_iteration=lambda *_: during.append(fit(two, 20, iterations=1)))
    assert mixed.centroids.tobytes() == reference.centroids.tobytes()
    assert len({each.centroids.tobytes() for each in during}) == 1


def test_centroids_agree_with_scikit_learn_from_the_same_initial_rows(tmp_path: Path) -> None:
    rows = mixture()
    ours = fit(write(tmp_path, rows), 30, iterations=300)
    start = rows[kmeans.seed_rows(len(rows), 30, 0)]
    theirs = KMeans(30, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(rows)
    np.testing.assert_allclose(ours.centroids, theirs.cluster_centers_, atol=1e-4)
    assert ours.converged
    assert ours.inertia[-1] == pytest.approx(theirs.inertia_ / len(rows), rel=1e-5)
    assert (assign(rows, ours.codebook)[0] == theirs.labels_).all()
    assert (ours.sizes == np.bincount(theirs.labels_, minlength=30)).all()


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("width", [3, 20, 130])
def test_inertia_of_every_iteration_agrees_with_scikit_learn(tmp_path: Path, width: int) -> None:
    rows = mixture(2000, width)
    ours = fit(write(tmp_path, rows), 30, iterations=8)
    start = rows[kmeans.seed_rows(len(rows), 30, 0)].astype(np.float64)
    for updates in range(1, len(ours.inertia)):
        theirs = KMeans(30, init=start, n_init=1, algorithm="lloyd", tol=0, max_iter=updates).fit(rows.astype(np.float64))
        assert ours.inertia[updates] == pytest.approx(theirs.inertia_ / len(rows), rel=1e-6)


def test_inertia_of_every_iteration_agrees_with_faiss(tmp_path: Path) -> None:
    rows = mixture()
    ours = fit(write(tmp_path, rows), 30, iterations=10)
    theirs = faiss.Kmeans(20, 30, niter=10, min_points_per_centroid=1, max_points_per_centroid=10**6)
    theirs.train(rows, init_centroids=rows[kmeans.seed_rows(len(rows), 30, 0)])
    np.testing.assert_allclose(ours.inertia[:10], np.array(theirs.obj) / len(rows), rtol=1e-5)
    assert ours.iterations == 10
    assert not ours.converged
    assert all(after <= before for before, after in zip(ours.inertia, ours.inertia[1:], strict=False))


def test_sizes_and_inertia_belong_to_the_returned_centroids(tmp_path: Path) -> None:
    rows = mixture()
    for iterations in (0, 3, 100):
        found = fit(write(tmp_path, rows), 30, iterations=iterations)
        labels, distances = assign(rows, found.codebook)
        assert (np.bincount(labels, minlength=30) == found.sizes).all()
        assert distances.mean(dtype=np.float64) == pytest.approx(found.inertia[-1], rel=1e-5)
        assert len(found.inertia) == found.iterations + 1


def test_a_large_constant_offset_does_not_change_the_clusters(tmp_path: Path) -> None:
    rows = np.round(mixture() * 512) / 512  # still exact after adding 8,000, where the plain expansion has errors of 30
    near, far = fit(write(tmp_path / "near", rows), 30), fit(write(tmp_path / "far", rows + np.float32(8_000)), 30)
    assert far.inertia == pytest.approx(near.inertia, rel=1e-4)
    assert (far.sizes == near.sizes).all()


def test_float16_shards_give_the_same_result_as_their_values_in_float32(tmp_path: Path) -> None:
    half = mixture().astype(np.float16)
    stored, widened = fit(write(tmp_path / "half", half), 10), fit(write(tmp_path / "wide", half.astype(np.float32)), 10)
    assert stored.centroids.tobytes() == widened.centroids.tobytes()


@pytest.mark.parametrize("count", [1, 5])
def test_the_nearest_centroids_do_not_depend_on_the_batch(count: int) -> None:
    rows = mixture(3000, 37)
    codebook = codebook_around(mixture(211, 37, seed=5), rows)
    on_grid = codebook.grid.rows(rows)
    numbers, distances = nearest_centroids.nearest(on_grid, codebook, count)
    for size in (1, 63, 700, 1025):
        pieces = [nearest_centroids.nearest(on_grid[at : at + size], codebook, count) for at in range(0, len(rows), size)]
        assert (np.concatenate([piece[0] for piece in pieces]) == numbers).all()
        assert (np.concatenate([piece[1] for piece in pieces]) == distances).all()


@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("width", [1, 6, 130])
def test_rows_between_two_centroids_get_the_nearest_by_whole_numbers(width: int, outlier: bool) -> None:
    """float32 cannot decide these: duplicates, midpoints, and some of them moved by one step of the grid."""
    rng = np.random.default_rng(width)
    centroids = np.round(rng.normal(size=(90, width)) * 64).astype(np.float32) / 64 + 100
    centroids[70:80] = centroids[:10]
    if outlier:
        centroids[80] = 1e4  # it must not affect the others
    rows = (centroids[rng.integers(0, 70, 1000)] + centroids[rng.integers(0, 70, 1000)]) / 2
    codebook = codebook_around(centroids, rows)
    on_grid = codebook.grid.rows(rows)
    on_grid[::3, 0] -= np.float32(2.0**-codebook.grid.bits)
    squared = squared_steps(on_grid, codebook)
    order = np.argsort(squared, axis=1, kind="stable")
    for count in (1, 4, 90):
        numbers, distances = nearest_centroids.nearest(on_grid, codebook, count)
        assert (numbers == order[:, :count]).all()
        nearest = np.take_along_axis(squared, order[:, :count], axis=1).astype(np.float64)
        np.testing.assert_allclose(distances, nearest * codebook.grid.square, rtol=1e-7)


def test_labels_are_the_nearest_centroid_and_ties_go_to_the_first() -> None:
    rows, centroids = mixture(500, 6), mixture(50, 6, seed=3)
    squared = ((rows[:, None].astype(np.float64) - centroids[None]) ** 2).sum(2)
    labels, distances = assign(rows, codebook_around(centroids, rows))
    assert (labels == squared.argmin(1)).all()
    np.testing.assert_allclose(distances, squared.min(1), rtol=1e-4)
    doubled, _ = assign(rows, codebook_around(np.concatenate([centroids, centroids]), rows))
    assert (doubled == labels).all()


def test_inertia_is_that_of_whole_numbers(tmp_path: Path) -> None:
    rows = mixture(300, 5)
    found = fit(write(tmp_path, rows), 7, iterations=3)
    squared = squared_steps(found.codebook.grid.rows(rows), found.codebook)
    assert found.inertia[-1] == int(squared.min(axis=1).sum()) / len(rows) * found.codebook.grid.square


def test_a_centroid_is_the_mean_of_its_rows_rounded_to_the_grid(tmp_path: Path) -> None:
    rows = mixture(300, 5)
    before, after = (fit(write(tmp_path, rows), 7, iterations=iterations).codebook for iterations in (2, 3))
    whole = before.grid.whole(before.grid.rows(rows))
    labels = assign(rows, before)[0]
    for cluster in range(7):
        members = whole[labels == cluster]
        exact = [round(Fraction(int(total), len(members))) for total in members.sum(axis=0)]
        assert after.points[cluster].tolist() == exact


def test_an_empty_cluster_takes_the_farthest_row(tmp_path: Path) -> None:
    """Two equal initial rows leave the second cluster empty; the far row at 100 is not an initial row."""
    rows = np.array([[0.0], [0.0], [0.0], [1.0], [100.0], [0.5]], np.float32)
    seed = next(s for s in range(100) if set(kmeans.seed_rows(6, 3, s)) == {0, 1, 3})
    found = fit(write(tmp_path, rows, 2), 3, seed=seed)
    assert found.empty[0] == 1
    assert found.empty[-1] == 0
    assert 100.0 in found.centroids
    assert sorted(found.sizes) == [1, 1, 4] or sorted(found.sizes) == [1, 2, 3]


def test_no_cluster_stays_empty_when_rows_are_repeated(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
    rows = np.repeat(values, 25, axis=0)
    for seed in range(5):
        one = fit(write(tmp_path, rows, 64), 12, seed=seed)
        many = fit(write(tmp_path, rows, 64), 12, seed=seed, pool=ShuffledPool(3))
        assert one.centroids.tobytes() == many.centroids.tobytes()
        assert one.empty == many.empty
        assert (one.sizes > 0).all()
        assert sum(one.empty) > 0


@pytest.mark.parametrize(
    ("rows", "k", "message"),
    [
        (mixture(10), 11, "k = 11 .* have 10"),
        (mixture(10), 0, "k = 0"),
        (np.full((10, 3), 7, np.float32), 2, "all 10 rows .* equal"),
        (np.repeat(mixture(3), 5, axis=0), 4, "only 3 distinct rows"),
        (np.where(np.arange(30).reshape(10, 3) == 13, np.nan, 1.0).astype(np.float32), 2, "not finite.* row 0"),
    ],
)
def test_invalid_inputs_are_refused(tmp_path: Path, rows: NDArray, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(write(tmp_path, rows, 4), k)


def test_seeds_are_distinct_rows_that_depend_on_the_seed_and_on_n() -> None:
    rows = kmeans.seed_rows(1000, 400, 3)
    assert len(set(rows.tolist())) == 400
    assert (rows == kmeans.seed_rows(1000, 400, 3)).all()
    assert (rows != kmeans.seed_rows(1000, 400, 4)).any()
    assert sorted(kmeans.seed_rows(7, 7, 0)) == list(range(7))


def test_on_iteration_is_called_after_every_assignment(tmp_path: Path) -> None:
    calls: list[tuple[int, float]] = []
    found = fit(write(tmp_path, mixture()), 5, iterations=4, on_iteration=lambda *call: calls.append(call))
    assert calls == list(enumerate(found.inertia))


class Killed(Exception):
    """Ends a clustering between two iterations."""


@pytest.mark.parametrize(("killed_after", "repeated"), [(1, False), (4, False), (1, True)])
def test_a_killed_clustering_goes_on_with_the_same_bits(tmp_path: Path, killed_after: int, repeated: bool) -> None:
    rows = np.repeat(mixture(40), 30, axis=0) if repeated else mixture()  # repeated rows leave clusters empty
    shards, whole = write(tmp_path / "shards", rows), []
    reference = fit(shards, 30, iterations=9, on_iteration=lambda *call: whole.append(call))

    def save(updates: int, write_to) -> None:
        write_to(tmp_path / "state.npz")
        if updates == killed_after:
            raise Killed

    with pytest.raises(Killed):
        fit(shards, 30, iterations=9, save=save)
    calls: list[tuple[int, float]] = []
    for pool in (LocalPool(), ShuffledPool(3)):
        calls.clear()
        options = {"pool": pool, "start": tmp_path / "state.npz", "on_iteration": lambda *call: calls.append(call)}
        resumed = fit(shards, 30, iterations=9, **options)
        assert resumed.centroids.tobytes() == reference.centroids.tobytes()
        assert (resumed.inertia, resumed.empty, resumed.converged) == (reference.inertia, reference.empty, reference.converged)
        assert (resumed.sizes == reference.sizes).all()
        assert resumed.decided_again == reference.decided_again
        assert calls == whole[killed_after:]
    other = write(tmp_path / "other", mixture(seed=4))
    assert fit(other, 30, iterations=9, start=tmp_path / "state.npz").inertia == fit(other, 30, iterations=9).inertia


MEMORY = """
import sys
from pathlib import Path
from tests.child import peak_memory
from ktray.clustering import kmeans, lower_bounds
from ktray.pool import LocalPool
import scipy.sparse, torch
lower_bounds.product_type()
before = peak_memory()
kmeans.fit(sorted(Path(sys.argv[1]).glob("*.npy")), 300, seed=0, iterations=2, projection={}, pool=LocalPool())
print(peak_memory() - before)
"""


def test_a_worker_needs_little_more_memory_than_its_rows(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(60_000, 512)).astype(np.float32)
    write(tmp_path, rows, 4096)
    arguments = [sys.executable, "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < rows.nbytes + (256 << 20)
