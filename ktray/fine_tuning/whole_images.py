"""Whole images for a detector or for label maps, at their own aspect ratio, and the objects in them; decoded ones are kept.

Legend: N images, m objects of one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ktray.images import CROWD, DIFFICULT, Images, WholeImages
from ktray.scoring.detection_scores import Objects

KEPT_BYTES = 4 << 30  # of decoded images, which then are not decoded for every batch again
_THREADS = 4


def whole_of(images: Images) -> WholeImages:
    """The images at their own aspect ratio.

    Raises:
        ValueError: these images come from no data set.
    """
    if images.whole is None:
        raise ValueError("these images have no whole ones: they come from no data set")
    return images.whole()


class Reader:
    """Reads whole images (h, w, 3) uint8 by index, and keeps those that fit in memory. They are not to be changed."""

    def __init__(self, whole: WholeImages, longest: int | None = None) -> None:
        self.whole, self.longest = whole, longest
        self._kept: dict[int, NDArray[np.uint8]] = {}
        self._room = KEPT_BYTES

    def read(self, index: int) -> NDArray[np.uint8]:
        """One image."""
        if index in self._kept:
            return self._kept[index]
        pixels = self.whole.read(index, self.longest)
        if pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._kept[index] = pixels
        return pixels

    def read_all(self, indices: Sequence[int] | NDArray[np.int64]) -> list[NDArray[np.uint8]]:
        """Several images, decoded in threads."""
        numbers = [int(index) for index in indices]
        if all(number in self._kept for number in numbers):
            return [self._kept[number] for number in numbers]
        with ThreadPoolExecutor(_THREADS) as threads:
            return list(threads.map(self.read, numbers))


def objects_of(whole: WholeImages, count: int) -> list[Objects]:
    """The objects of each image, in pixels of the whole image.

    Raises:
        ValueError: the data set has no boxes.
    """
    if whole.boxes is None:
        raise ValueError("detection needs images with boxes")
    found = []
    for index in range(count):
        rows = whole.boxes[index]
        flags = np.zeros((len(rows), 3), np.bool_) if whole.box_flags is None else whole.box_flags[index]
        found.append(Objects(rows[:, :4].astype(np.float64), rows[:, 4].astype(np.int64), flags[:, DIFFICULT], flags[:, CROWD]))
    return found
