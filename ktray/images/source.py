"""The records that data sets hand over and that stages read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray


class Unreadable(Exception):
    """One image cannot be decoded; it is counted, listed and left out."""


@dataclass(frozen=True)
class Source:
    """The images of one split before decoding.

    Attributes:
        names: (N,) relative path or row name of each image; unique.
        read: index -> pixels (h, w, 3) uint8, of any h and w; several threads may call it. Raises Unreadable.
        labels: (N,) int64 in [0, len(classes)), or None.
        classes: names of the classes, or empty.
        boxes: one (n_i, 5) float32 array of [x0, y0, x1, y1, class] in pixels of what `read` gives per image, or None.
        encoded: index -> encoded bytes, only where reading in arbitrary order is dear (rows of a parquet file). A data set too
            large for a memmap then keeps a copy of these bytes, and `decode` of them must be what `read` gives.
    """

    names: tuple[str, ...]
    read: Callable[[int], NDArray[np.uint8]]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    boxes: tuple[NDArray[np.float32], ...] | None = None
    encoded: Callable[[int], bytes] | None = None


@dataclass(frozen=True, eq=False)  # by identity: what a listing holds is too large to be compared
class Splits:
    """What `datasets/<kind>.load` returns; where `val` is None, a seeded stratified part of `train` becomes it.

    Attributes:
        files: (name relative to the data set's root, path) of every file whose bytes determine the pixels.
        identity: sha256 hex, instead of `files`, if the content is known without a file (generated data).
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
        read: ascending or arbitrary indices (B,) int64 -> (B, H, W, 3) uint8, a fresh array.
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
