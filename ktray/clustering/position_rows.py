"""Rows of positions: feature maps (N, C * grid * grid) as one row of C features per position, for dense clusters.

Clusters are fitted to a seeded sample of the positions, or to the means of whole images; all positions are then assigned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import rmtree

import numpy as np
from numpy.typing import NDArray

from ktray.checksums import intact
from ktray.fingerprint import seed_of

IDENTITY, REVISION = "position_rows", 1

_FILE_ROWS = 1 << 16  # rows of a file, which is read at once
_FOLDER = "positions"


def of_maps(maps: NDArray[np.floating], grid: int) -> NDArray[np.floating]:
    """Maps (n, C * grid * grid) as rows (n * grid * grid, C): image by image, its positions row by row.

    Raises:
        ValueError: the features are no maps of this grid.
    """
    if maps.shape[1] % grid**2:
        raise ValueError(f"the teacher has {maps.shape[1]} features per image, which are no maps of {grid} x {grid}")
    return maps.reshape(len(maps), -1, grid**2).transpose(0, 2, 1).reshape(len(maps) * grid**2, -1)


def means(maps: NDArray[np.floating], grid: int) -> NDArray[np.float32]:
    """The mean over the positions of each image, (n, C) float32."""
    found: NDArray[np.float32] = (
        of_maps(maps, grid).reshape(len(maps), grid**2, -1).mean(axis=1, dtype=np.float64).astype(np.float32)
    )
    return found


def sampled(count: int, most: int, seed: int) -> NDArray[np.int64]:
    """Which of `count` positions centroids are fitted to, ascending: all, or `most` drawn by the seed."""
    if count <= most:
        return np.arange(count, dtype=np.int64)
    drawn = np.random.default_rng(seed_of(seed, "positions", count)).choice(count, most, replace=False)
    return np.sort(drawn.astype(np.int64))


@contextmanager
def position_files(
    shards: Sequence[Path], grid: int, out: Path, sample: tuple[int, int] | None = None, whole: bool = False
) -> Iterator[list[Path]]:
    """Files of rows within a `with`, in a folder below `out` that all workers see.

    Args:
        shards: files of (n, C * grid * grid) features.
        sample: (most rows, seed) of the sample that is written; None for all positions.
        whole: write the mean of each image instead of its positions.
    """
    folder = out / _FOLDER
    folder.mkdir()
    try:
        yield list(_written(shards, grid, folder, sample, whole))
    finally:
        rmtree(folder)


def _written(shards: Sequence[Path], grid: int, folder: Path, sample: tuple[int, int] | None, whole: bool) -> Iterator[Path]:
    lengths = [len(np.load(intact(shard), mmap_mode="r", allow_pickle=False)) * (1 if whole else grid**2) for shard in shards]
    chosen = None if sample is None else sampled(sum(lengths), *sample)
    start = number = 0
    for shard, length in zip(shards, lengths, strict=True):
        maps = np.load(intact(shard), allow_pickle=False)
        rows = means(maps, grid) if whole else of_maps(maps, grid)
        if chosen is not None:
            rows = rows[chosen[(chosen >= start) & (chosen < start + length)] - start]
        start += length
        for at in range(0, len(rows), _FILE_ROWS):
            path = folder / f"features-{number:05d}.npy"
            np.save(path, rows[at : at + _FILE_ROWS])
            number += 1
            yield path
