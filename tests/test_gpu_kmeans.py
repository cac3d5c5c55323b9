"""k-means on a torch device gives the same bits as on CPUs, with any screener, in any number of pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ktray.clustering import gpu_kmeans, kmeans
from ktray.clustering.projection import finite_rows
from ktray.pool import LocalPool
from tests.awkward_rows import K, tables

DEVICES = ["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else [])]


def write(directory: Path, rows: NDArray) -> list[Path]:
    shards = [directory / f"{start:05d}.npy" for start in range(0, len(rows), 90)]
    for start, shard in zip(range(0, len(rows), 90), shards, strict=True):
        np.save(shard, rows[start : start + 90])
    return shards


def iterate(shards: list[Path], made: kmeans.Clusters, k: int, iterations: int, device: str, **rest) -> gpu_kmeans.Found:
    """The iterations of `kmeans.fit` from the same seeds, on the grid of what it made."""
    grid = made.codebook.grid
    rows = grid.rows(np.concatenate([np.load(shard) for shard in shards]))
    counts = [len(np.load(shard)) for shard in shards]
    seeds = grid.whole(rows[kmeans.seed_rows(len(rows), k, 0)])

    options = {name: rest.pop(name) for name in ("screener", "budget") if name in rest}
    engine = gpu_kmeans.Engine(shards, counts, finite_rows, device, **options)
    if made.iterations % 2:  # rows that are read before there is a grid, and rows that are not
        deviations = np.concatenate([np.load(shard) for shard in shards]).astype(np.float64) - grid.centre
        assert engine.largest_distance(grid.centre) == np.abs(deviations).max()
    return gpu_kmeans.iterate(engine, seeds, grid, iterations, kmeans.plan_repairs, **rest)


def check(shards: list[Path], k: int, iterations: int, device: str, **rest) -> gpu_kmeans.Found:
    made = kmeans.fit(shards, k, seed=0, iterations=iterations, projection={}, pool=LocalPool())
    found = iterate(shards, made, k, iterations, device, **rest)
    assert found.inertia == made.inertia
    assert found.empty == made.empty
    assert (found.points == made.codebook.points).all()
    assert (found.sizes == made.sizes).all()
    assert found.converged == made.converged
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("screener", list(gpu_kmeans.SCREENERS))
@pytest.mark.parametrize("table", list(tables()))
def test_awkward_rows_give_the_same_bits_as_on_cpus(tmp_path: Path, table: str, screener: str, device: str) -> None:
    check(write(tmp_path, tables()[table]), K, 6, device, screener=screener)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_that_do_not_fit_into_memory_are_read_again(tmp_path: Path, device: str) -> None:
    check(write(tmp_path, tables()["plain"]), K, 6, device, budget=20_000)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("width", "k"), [(1, 7), (70, 3), (130, 2), (16, 1), (200, 300)])
def test_any_width_and_number_of_clusters_gives_the_same_bits(tmp_path: Path, width: int, k: int, device: str) -> None:
    rows = np.random.default_rng(width).normal(size=(700, width)).astype(np.float32)
    found = check(write(tmp_path, rows), k, 20, device)
    assert 0 <= found.decided_again < 0.5


@pytest.mark.parametrize("device", DEVICES)
def test_only_a_few_rows_are_decided_again(tmp_path: Path, device: str) -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(40, 64))[rng.integers(0, 40, 3000)] + 0.3 * rng.normal(size=(3000, 64))).astype(np.float32)
    shares = {name: check(write(tmp_path, rows), 40, 5, device, screener=name).decided_again for name in gpu_kmeans.SCREENERS}
    assert shares["float32"] <= shares["float16"] <= shares["bfloat16"]
    assert shares["float16"] < 0.05


@pytest.mark.parametrize("device", DEVICES)
def test_a_killed_clustering_goes_on_with_the_same_bits(tmp_path: Path, monkeypatch, device: str) -> None:
    monkeypatch.setattr(gpu_kmeans, "_AHEAD", 2)
    shards = write(tmp_path, tables()["plain"])
    states: list[dict] = []
    whole = check(shards, K, 20, device, keep=lambda _, fields: states.append(fields()))
    assert len(states) > 1
    for state in (states[0], states[-1]):
        assert check(shards, K, 20, device, start=state).decided_again == whole.decided_again


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "fast"), [(40, False), (600, True)])
def test_rows_whose_label_cannot_change_are_not_searched_for(
    tmp_path: Path, monkeypatch, k: int, fast: bool, device: str
) -> None:
    monkeypatch.setattr(gpu_kmeans, "_SMALL_ROWS", 0)
    searched: list[tuple[int, int]] = []  # numbers of rows and of centroids, padded to 256
    whole_search = gpu_kmeans.Engine.best_two

    def recording(self, piece, candidates, chosen=None):
        searched.append((len(piece.rows) if chosen is None else len(chosen), len(candidates.norms)))
        return whole_search(self, piece, candidates, chosen)

    monkeypatch.setattr(gpu_kmeans.Engine, "best_two", recording)
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(k, 64))[np.minimum(rng.integers(0, 2 * k, 4000), k - 1)]
    rows = (centres + 0.2 * rng.normal(size=(4000, 64))).astype(np.float32)
    check(write(tmp_path, rows), k, 15, device)
    padded = -(-k // 256) * 256
    assert searched[0] == (4000, padded)
    assert any(count < 2000 for count, among in searched if among == padded)
    assert any(among == 256 for _, among in searched) == (fast or padded == 256)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("table", ["plain", "lattice", "duplicates", "midpoints"])
def test_one_iteration_at_a_time_gives_the_same_bits(tmp_path: Path, monkeypatch, table: str, device: str) -> None:
    monkeypatch.setattr(gpu_kmeans, "_SMALL_ROWS", 0)
    check(write(tmp_path, tables()[table]), K, 20, device)
