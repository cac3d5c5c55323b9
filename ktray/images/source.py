"""The records through which data sets provide images and stages read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Unreadable(Exception):
    """An image cannot be decoded. Such images are counted, listed and left out."""


@dataclass(frozen=True)
class Source:
    """The images of one split before decoding.

    Attributes:
        names: (N,) unique relative paths or row names.
        read: index -> pixels (h, w, 3) uint8 with any h and w; thread-safe. Raises Unreadable.
        labels: (N,) int64 in [0, len(classes)), or None.
        classes: names of the classes, or empty.
        boxes: for each image an (n_i, 5) float32 array of [x0, y0, x1, y1, class], in pixels of the output of `read`; or None.
        encoded: index -> encoded bytes, only if random access is slow (rows of a parquet file). A data set too large for a
            memmap then stores a copy of these bytes; `decode` must turn them into the output of `read`.
    """

    names: tuple[str, ...]
    read: Callable[[int], NDArray[np.uint8]]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    boxes: tuple[NDArray[np.float32], ...] | None = None
    encoded: Callable[[int], bytes] | None = None


@dataclass(frozen=True, eq=False)  # compared by identity: the contents are too large to compare
class Splits:
    """The result of `datasets/<kind>.load`; if `val` is None, a seeded, stratified part of `train` takes its place.

    Attributes:
        files: (name relative to the data set's root, path) of every file with bytes that affect the pixels.
        identity: sha256 hex, in place of `files`, for content that does not come from files (generated data).
    """

    train: Source
    val: Source | None = None
    test: Source | None = None
    files: tuple[tuple[str, Path], ...] = ()
    identity: str | None = None


@dataclass(frozen=True)
class Images:
    """Decoded images of one split, all of one size.

    Attributes:
        count: N.
        size: side H = W in pixels.
        read: indices (B,) int64 in any order -> (B, H, W, 3) uint8, a fresh array.
        labels: (N,) int64, or None.
        classes: names of the classes, or empty.
        names: (N,) relative paths.
        boxes: as in Source, in pixels of the decoded image, or None.
    """

    count: int
    size: int
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    boxes: tuple[NDArray[np.float32], ...] | None = None

    def __len__(self) -> int:
        return self.count
