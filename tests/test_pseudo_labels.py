"""Pseudo-labels are nearest centroids, small clusters are left out, and the sheet shows what is in a cluster."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import normalized_mutual_info_score, pairwise_distances_argmin
from sklearn.neighbors import NearestNeighbors

from ktray.clustering import kmeans, projection, pseudo_labelling
from ktray.clustering.grid import Codebook, Grid
from ktray.pool import LocalPool
from tests.pools import ShuffledPool
from tests.toy_images import toy_images

ROWS = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"features-{index:05d}.npy" for index in range(5)]
    for index, path in enumerate(paths):
        np.save(path, ROWS[index * 100 : index * 100 + 100])
    return paths


def codebook(centroids: np.ndarray) -> Codebook:
    return Codebook(Grid(np.zeros(centroids.shape[1], np.float32), 3, 24), np.rint(centroids * 2.0**21).astype(np.int64))


def test_labels_of_the_clustered_rows_equal_those_of_the_clustering(shards: list[Path]) -> None:
    fitted = projection.fit(shards, l2=True, pca=6, whiten=False, l2_after=True, pool=LocalPool())
    found = kmeans.fit(shards, 9, seed=0, iterations=50, projection=fitted, pool=LocalPool())
    labels = pseudo_labelling.assign(shards, found.codebook, fitted, LocalPool())
    assert labels.dtype == np.int64
    assert (np.bincount(labels, minlength=9) == found.sizes).all()
    squared = ((projection.apply(fitted, ROWS)[:, None] - found.centroids[None]) ** 2).sum(2)
    assert (labels == squared.argmin(1)).all()
    for workers in (2, 3, 7):
        assert (pseudo_labelling.assign(shards, found.codebook, fitted, ShuffledPool(workers)) == labels).all()


def test_features_of_another_width_are_refused(shards: list[Path]) -> None:
    with pytest.raises(ValueError, match="has 16 features per image, but the clustered features had 5"):
        pseudo_labelling.assign(shards, codebook(np.eye(3, 5)), {}, LocalPool())


def test_rows_far_outside_of_what_was_clustered_are_refused(shards: list[Path]) -> None:
    found = kmeans.fit(shards, 9, seed=0, iterations=5, projection={}, pool=LocalPool()).codebook
    np.save(shards[2], np.load(shards[2]) * 100)
    assert len(pseudo_labelling.assign(shards, found, {}, LocalPool())) == len(ROWS)
    np.save(shards[2], np.load(shards[2]) * 1e30)
    with pytest.raises(ValueError, match=r"features-00002.npy: row 0 is more than 1024 times as far .* as any row that was"):
        pseudo_labelling.assign(shards, found, {}, LocalPool())


def test_small_clusters_are_left_out_and_the_others_keep_their_number() -> None:
    labels = np.array([0, 0, 0, 1, 2, 2, -1, 4])
    assert pseudo_labelling.drop_small(labels, 5, 2).tolist() == [0, 0, 0, -1, 2, 2, -1, -1]
    assert pseudo_labelling.drop_small(labels, 5, 1).tolist() == labels.tolist()
    assert pseudo_labelling.kept_share(pseudo_labelling.drop_small(labels, 5, 2)) == 5 / 8


def test_entropy_counts_clusters_of_equal_size() -> None:
    assert np.exp(pseudo_labelling.entropy(np.repeat(np.arange(7), 5))) == pytest.approx(7)
    assert pseudo_labelling.entropy(np.zeros(9, np.int64)) == 0
    assert pseudo_labelling.entropy(np.array([-1, -1, 3, 3, 4, 4])) == pytest.approx(np.log(2))


def test_nmi_agrees_with_scikit_learn_on_the_images_that_are_kept() -> None:
    rng = np.random.default_rng(0)
    labels, classes = rng.integers(-1, 6, 300), rng.integers(0, 4, 300)
    known = labels >= 0
    expected = normalized_mutual_info_score(classes[known], labels[known])
    assert pseudo_labelling.nmi(labels, classes) == pytest.approx(expected, abs=1e-12)
    assert pseudo_labelling.nmi(classes, classes) == pytest.approx(1)


def test_the_sheet_shows_the_largest_cluster_first_and_only_its_images(tmp_path: Path) -> None:
    images = toy_images(40)
    labels = np.where(np.arange(40) < 25, 3, np.where(np.arange(40) < 35, 1, -1))
    pseudo_labelling.write_contact_sheet(images, labels, tmp_path / "sheet.png", rows=4, columns=6, pixels=28)
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (2 * 30, 96 + 6 * 30, 3)
    pixels = images.read(np.arange(40))
    for row, members in enumerate([range(25), range(25, 35)]):
        for column in range(6):
            tile = sheet[row * 30 : row * 30 + 28, 96 + column * 30 : 124 + column * 30]
            assert any((tile == pixels[member]).all() for member in members)
    before = (tmp_path / "sheet.png").read_bytes()
    pseudo_labelling.write_contact_sheet(images, labels, tmp_path / "sheet.png", rows=4, columns=6, pixels=28)
    assert (tmp_path / "sheet.png").read_bytes() == before


def test_the_sheet_of_a_cluster_with_few_images_has_gaps(tmp_path: Path) -> None:
    pseudo_labelling.write_contact_sheet(
        toy_images(3), np.array([0, 0, -1]), tmp_path / "sheet.png", rows=2, columns=4, pixels=28
    )
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert (sheet[:28, 96 + 2 * 30 :] == 255).all()


def test_small_clusters_are_merged_into_the_nearest_large_one() -> None:
    rng = np.random.default_rng(3)
    centroids = rng.normal(size=(12, 4)).astype(np.float32)
    labels = rng.choice(12, 200, p=rng.dirichlet(np.ones(12) * 0.5))
    labels[:5] = -1
    sizes = np.array([(labels == cluster).sum() for cluster in range(12)])
    large = [cluster for cluster in range(12) if sizes[cluster] >= 15]
    home = [c if c in large else large[pairwise_distances_argmin(centroids[[c]], centroids[large])[0]] for c in range(12)]
    merged = pseudo_labelling.merge_small(labels, codebook(centroids), 15)
    assert 1 < len(large) < (sizes > 0).sum()
    assert merged.tolist() == [-1 if label == -1 else home[label] for label in labels]
    assert (pseudo_labelling.merge_small(labels, codebook(centroids), 1) == labels).all()
    assert (pseudo_labelling.merge_small(labels, codebook(centroids), 1000) == -1).all()


def test_the_nearest_clusters_and_their_distances_agree_with_scikit_learn(shards: list[Path]) -> None:
    fitted = projection.fit(shards, l2=True, pca=6, whiten=True, l2_after=False, pool=LocalPool())
    found = kmeans.fit(shards, 9, seed=0, iterations=5, projection=fitted, pool=LocalPool()).codebook
    found.points[4] = found.points[2]  # equally near: the first comes first
    numbers, squared = pseudo_labelling.nearest(shards, found, fitted, 4, LocalPool())
    neighbours = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(found.centroids)
    distances, theirs = neighbours.kneighbors(projection.apply(fitted, ROWS))
    np.testing.assert_allclose(squared, distances**2, atol=1e-4)
    twins = np.where(theirs == 4, 2, theirs)
    assert (np.sort(np.where(numbers == 4, 2, numbers)) == np.sort(twins)).mean() > 0.99
    assert (numbers[:, 0] == pseudo_labelling.assign(shards, found, fitted, LocalPool())).all()
    places = np.argwhere(numbers == 2)
    assert all(place == 3 or numbers[row, place + 1] == 4 for row, place in places)
    for workers in (2, 7):
        again = pseudo_labelling.nearest(shards, found, fitted, 4, ShuffledPool(workers))
        assert (again[0] == numbers).all()
        assert (again[1] == squared).all()
