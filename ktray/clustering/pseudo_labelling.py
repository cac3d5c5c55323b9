"""Pseudo-labels: the nearest cluster of each image of the transfer data, their quality measures and a contact sheet.

Source: Noroozi, Vinjimoor, Favaro, Pirsiavash, CVPR 2018, arXiv:1805.00385, figure 2 (c).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import progress
from ktray.clustering import grid, nearest_centroids, projection
from ktray.clustering.grid import Codebook
from ktray.clustering.projection import apply, finite_rows
from ktray.fingerprint import seed_of
from ktray.images import Images
from ktray.plots import optional_plot
from ktray.pool import Pool

IDENTITY, REVISION = "pseudo_labelling", 3
TOOLS = (grid, nearest_centroids, projection)


def assign(shards: Sequence[Path], codebook: Codebook, projection: Mapping[str, NDArray[Any]], pool: Pool) -> NDArray[np.int64]:
    """The nearest centroid of every row of the shards, in their order: (N,) int64 in [0, K).

    Args:
        shards: files of (n, D) features, not yet projected.
        codebook: the centroids, of projected rows.
        projection: the projection that was used to find the centroids.

    Raises:
        ValueError: the features do not have the width of the clustered features, a feature is not finite, or a row is too far
            from the clustered rows.
    """
    return np.concatenate(pool.map(_assign_shard, list(shards), (codebook, projection)))


def _assign_shard(shard: Path, shared: tuple[Codebook, Mapping[str, NDArray[Any]]]) -> NDArray[np.int64]:
    codebook, projection = shared
    return nearest_centroids.search_among(codebook)(_on_grid(shard, codebook, projection))[0][:, 0]


def _on_grid(shard: Path, codebook: Codebook, projection: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
    progress.advance("shards")
    rows = finite_rows(shard)
    width = projection["components"].shape[1] if "components" in projection else codebook.points.shape[1]
    if rows.shape[1] != width:
        raise ValueError(f"{shard.name} has {rows.shape[1]} features per image, but the clustered features had {width}")
    return codebook.grid.rows(apply(projection, rows), shard.name)


def nearest(
    shards: Sequence[Path],
    codebook: Codebook,
    projection: Mapping[str, NDArray[Any]],
    count: int,
    pool: Pool,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The `count` nearest clusters of every row, nearest first, and their squared distances: (N, count) each.

    Args:
        shards, codebook, projection: as for `assign`.
        count: 1 <= count <= K.

    Raises:
        ValueError: as `assign`.
    """
    numbers, squared = zip(*pool.map(_nearest_of_shard, list(shards), (codebook, projection, count)), strict=True)
    return np.concatenate(numbers), np.concatenate(squared)


def _nearest_of_shard(
    shard: Path, shared: tuple[Codebook, Mapping[str, NDArray[Any]], int]
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    codebook, projection, count = shared
    return nearest_centroids.nearest(_on_grid(shard, codebook, projection), codebook, count)


def drop_small(labels: NDArray[np.int64], k: int, min_size: int) -> NDArray[np.int64]:
    """Labels (N,) with -1 for images of clusters smaller than `min_size`; the other clusters keep their numbers."""
    sizes = np.bincount(labels[labels >= 0], minlength=k)
    small = np.append(sizes < min_size, False)  # the last entry is for labels that are already -1
    return np.where(small[labels], -1, labels)


def merge_small(labels: NDArray[np.int64], codebook: Codebook, min_size: int) -> NDArray[np.int64]:
    """Labels (N,) with clusters smaller than `min_size` merged into the nearest one that is not, by their centroids.

    Other clusters keep their numbers and images. If no cluster has `min_size` images, all images are left out (-1).
    """
    sizes = np.bincount(labels[labels >= 0], minlength=len(codebook.points))
    large = np.flatnonzero(sizes >= min_size)
    if not len(large):
        return np.full_like(labels, -1)
    remaining = Codebook(codebook.grid, codebook.points[large])
    target = np.append(large[nearest_centroids.search_among(remaining)(codebook.centroid_rows)[0][:, 0]], -1)
    target[large] = large
    return target[labels]


def most_frequent(dense: NDArray[np.int64]) -> NDArray[np.int64]:
    """The most frequent label of each image, (N,) int64, of labels of positions (N, positions); ties: the smallest."""
    width = int(dense.max()) + 1
    return np.array([np.bincount(row, minlength=width).argmax() for row in dense], np.int64)


def entropy(labels: NDArray[np.int64]) -> float:
    """Entropy in nats of the cluster sizes of labels (N,), ignoring -1; exp(entropy) is the effective number of clusters."""
    sizes = np.bincount(labels[labels >= 0])
    shares = sizes[sizes > 0] / sizes.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def kept_share(labels: NDArray[np.int64]) -> float:
    """Share of the labels (N,) that are not -1, in [0, 1]."""
    return float((labels >= 0).mean())


def nmi(labels: NDArray[np.int64], classes: NDArray[np.int64]) -> float:
    """Normalised mutual information (arithmetic mean), in [0, 1], of labels (N,) and classes (N,), ignoring -1.

    Without any image, or with one cluster and one class, it is 1, as in scikit-learn, whose import would take a second.

    Source: Strehl and Ghosh, "Cluster Ensembles" (2002), section 2, with the mean of both entropies in the denominator.
    """
    known = (labels >= 0) & (classes >= 0)
    width = int(classes.max(initial=0)) + 1
    pairs, counts = np.unique(labels[known] * width + classes[known], return_counts=True)
    if len(pairs) == 0:
        return 1.0
    sizes = np.bincount(pairs // width, counts), np.bincount(pairs % width, counts)
    total = counts.sum()
    expected = sizes[0][pairs // width] * sizes[1][pairs % width] / total
    information = float((counts * np.log(counts / expected)).sum() / total)
    mean = sum(float((size * np.log(total / size)).sum() / total) for size in (size[size > 0] for size in sizes)) / 2
    if mean == 0:
        return 1.0
    return min(1.0, max(0.0, information / mean))


def write_contact_sheet(
    images: Images, labels: NDArray[np.int64], path: Path, rows: int = 16, columns: int = 16, pixels: int = 56
) -> None:
    """Write a PNG with one row per cluster, from the largest to the smallest, that shows images of the cluster.

    Args:
        labels: (N,) int64, -1 = left out.
        path: of the PNG.
        rows: number of clusters shown, evenly spaced by rank of size; all if there are fewer.
        columns: number of images shown per cluster, drawn with a seed that depends only on the number of the cluster.
        pixels: side of each image on the sheet.
    """
    from PIL import Image

    sizes = np.bincount(labels[labels >= 0])
    ranked = np.argsort(-sizes, kind="stable")[: int((sizes > 0).sum())]
    shown = ranked[np.unique(np.linspace(0, len(ranked) - 1, min(rows, len(ranked))).round().astype(int))]
    tiles = []
    for cluster in shown:
        members = np.flatnonzero(labels == cluster)
        generator = np.random.default_rng(seed_of("sheet", int(cluster)))
        chosen = np.sort(generator.choice(members, min(columns, len(members)), replace=False))
        blocks = map(Image.fromarray, images.read(chosen))
        tiles.append([block.resize((pixels, pixels), Image.Resampling.BICUBIC) for block in blocks])
    with optional_plot(path):
        _draw_sheet(tiles, [f"cluster {cluster}\n{sizes[cluster]} images" for cluster in shown], path, columns, pixels)


def _draw_sheet(tiles: Sequence[Sequence[Any]], names: Sequence[str], path: Path, columns: int, pixels: int) -> None:
    from PIL import Image, ImageDraw

    margin, gap = 96, 2
    canvas = Image.new("RGB", (margin + columns * (pixels + gap), max(1, len(tiles)) * (pixels + gap)), "white")
    canvas_draw = ImageDraw.Draw(canvas)
    for row, name in enumerate(names):
        top = row * (pixels + gap)
        canvas_draw.text((4, top + pixels // 2 - 12), name, fill="black")
        for column, tile in enumerate(tiles[row]):
            canvas.paste(tile, (margin + column * (pixels + gap), top))
    canvas.save(path, compress_level=1)  # no larger than by default, in half the time
