"""Results that must not depend on other rows or the number of workers do not depend on the BLAS kernel either."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from ktray.clustering import kmeans, projection, pseudo_labelling
from ktray.ops import blas
from tests.awkward_rows import K, N, tables
from tests.pools import ShuffledPool
from tests.source import ROOT

KERNELS = ("Haswell", "SkylakeX", "Zen", "Sandybridge")
TAKEN_AS = {"Zen": {"Zen", "Haswell"}}  # many builds of OpenBLAS serve Zen with Haswell's kernels and name those
TESTS = [
    "tests/test_kmeans.py::test_results_are_bitwise_identical_for_any_number_of_workers",
    "tests/test_kmeans.py::test_a_worker_without_a_cache_gives_bitwise_identical_results",
    "tests/test_kmeans.py::test_the_nearest_centroids_do_not_depend_on_the_batch",
    "tests/test_kmeans.py::test_rows_between_two_centroids_get_the_nearest_by_whole_numbers",
    "tests/test_grid.py::test_the_nearest_of_awkward_rows_are_those_of_python_integers",
    "tests/test_projection.py::test_results_are_bitwise_identical_for_any_number_of_workers",
    "tests/test_projection.py::test_rows_do_not_depend_on_the_batch",
    "tests/test_pseudo_labels.py::test_labels_of_the_clustered_rows_equal_those_of_the_clustering",
    "tests/test_pseudo_labels.py::test_the_nearest_clusters_and_their_distances_agree_with_scikit_learn",
]


def run_with(kernel: str, *arguments: str) -> str:
    """The output of Python with these arguments, where NumPy's OpenBLAS is asked to use a processor's kernels."""
    environment = {**os.environ, "OPENBLAS_CORETYPE": kernel}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


def skip_unless_taken(kernel: str) -> None:
    architecture = "import numpy, threadpoolctl; print(*{i.get('architecture') for i in threadpoolctl.threadpool_info()})"
    taken = run_with(kernel, "-c", architecture)
    if not TAKEN_AS.get(kernel, {kernel}) & {*taken.split()}:
        pytest.skip(f"BLAS uses kernels for {taken} here")


def digests(workers: int = 1) -> list[str]:
    """sha256 of the clusters, inertia and labels of awkward rows, and of projected rows; the same on every machine."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in tables().items():
            shards = [Path(folder) / f"{start:03d}.npy" for start in range(0, N, 90)]
            for start, shard in zip(range(0, N, 90), shards, strict=True):
                np.save(shard, rows[start : start + 90])
            pool = ShuffledPool(workers)
            made = kmeans.fit(shards, K, seed=0, iterations=5, projection={}, pool=pool)
            labels = pseudo_labelling.assign(shards, made.codebook, {}, pool)
            nearest, squared = pseudo_labelling.nearest(shards, made.codebook, {}, 3, pool)
            of_grid = f"{made.codebook.grid.exponent} {made.codebook.grid.bits} {made.inertia} {made.empty}".encode()
            arrays = (made.codebook.points, made.codebook.grid.centre, made.sizes, labels, nearest, squared)
            found.append(f"{name}: {hashlib.sha256(of_grid + b''.join(array.tobytes() for array in arrays)).hexdigest()}")
    rng = np.random.default_rng(0)
    rows, components = (rng.normal(size=shape).astype(np.float32) for shape in ((1500, 160), (24, 160)))
    flags = {flag: np.array(True) for flag in ("l2", "l2_after")}
    fitted = {**flags, "mean": rows.mean(axis=0), "components": components, "scale": np.ones(24, np.float32)}
    return [*found, f"projected: {hashlib.sha256(projection.apply(fitted, rows).tobytes()).hexdigest()}"]


@pytest.mark.parametrize("workers", [2, 3, 7])
def test_clusters_of_awkward_rows_are_the_same_on_any_number_of_workers(workers: int) -> None:
    assert digests(workers) == digests()


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_do_not_depend_on_their_batch_or_the_number_of_workers(kernel: str) -> None:
    skip_unless_taken(kernel)
    assert " passed" in run_with(kernel, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", *TESTS, "-v")


@pytest.mark.parametrize("kernel", KERNELS)
def test_clusters_labels_distances_and_projected_rows_are_the_same_with_every_kernel(kernel: str) -> None:
    skip_unless_taken(kernel)
    script = "from tests import test_blas_kernels; print(*test_blas_kernels.digests(2), sep='\\n')"
    assert run_with(kernel, "-c", script).splitlines() == digests()


@pytest.mark.parametrize("width", [1, 37, 512, 9217])
def test_the_exact_product_does_not_depend_on_the_order_and_is_as_precise_as_float32(width: int) -> None:
    rng = np.random.default_rng(width)
    rows, matrix = (rng.normal(size=shape).astype(np.float32) for shape in ((65, width), (width, 9)))
    rows *= np.logspace(-30, 30, 65, dtype=np.float32)[:, None]
    rows[7] = 0
    product = blas.exact_product(rows, matrix)
    order = rng.permutation(width)
    assert (blas.exact_product(np.ascontiguousarray(rows[:, order]), matrix[order]) == product).all()
    assert (np.concatenate([blas.exact_product(rows[at : at + 1], matrix) for at in range(65)]) == product).all()
    expected = rows.astype(np.float64) @ matrix.astype(np.float64)
    lengths = np.sqrt(np.outer(blas.squared_lengths(rows), blas.squared_lengths(matrix.T)))
    assert (np.abs(product - expected) <= 2.0**-21 * lengths).all()


@pytest.mark.parametrize("width", [1, 9, 37, 1000, 9217])
def test_squared_lengths_do_not_depend_on_the_batch(width: int) -> None:
    rows: NDArray[np.float32] = np.tile(np.random.default_rng(0).normal(size=width), (300, 1)).astype(np.float32)
    squared = blas.squared_lengths(rows)
    assert (squared == blas.squared_lengths(rows[:1])).all()
    np.testing.assert_allclose(squared[0], (rows[0].astype(np.float64) ** 2).sum(), rtol=1e-12)
