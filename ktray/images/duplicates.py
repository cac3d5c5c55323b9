"""Images that show the same picture twice: the same file, the same pixels, or nearly the same by a perceptual hash.

The hash is that of the discrete cosine transform: the whole image in grey is reduced to 32 x 32, and of its 8 x 8 lowest
frequencies each of the 63 but the mean gives one bit, whether it lies above their median. Two images are nearly the same if at
most 4 bits differ and if their thumbnails of 16 x 16 colours, each less its mean, differ by less than 4 of 255 as root mean
square. Such are copies in another format, size, quality or brightness; not mirrored, turned or cropped ones. Images of nearly
one colour, such as blank pages, are compared by their pixels alone.

Source: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), section 3.2.1.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ktray.fingerprint import file_sha256

MOST_BITS = 4
MOST_DIFFERENCE = 4.0  # of 255, root mean square over a thumbnail
MOST_COMPARED = 100_000  # images; pairs are looked for among so many at most
_GRID, _LOW, _THUMBNAIL = 32, 8, 16
_PARTS = MOST_BITS + 1  # two hashes that differ in fewer bits than there are parts agree in one part
_MOST_IN_BUCKET = 2000  # of images that agree in one part; in a larger bucket, such as that of blank pages, only neighbours


@dataclass(frozen=True)
class Signature:
    """What is kept of an image, to compare it with others.

    Attributes:
        pixels: hash of its pixels.
        bits: the perceptual hash, 63 bits.
        thumbnail: (256, 3) uint8, 16 x 16 colours.
    """

    pixels: bytes
    bits: int
    thumbnail: NDArray[np.uint8]


def signature(pixels: NDArray[np.uint8]) -> Signature:
    """The signature of an image (h, w, 3) uint8."""
    image = Image.fromarray(pixels)
    grey = np.asarray(image.convert("L").resize((_GRID, _GRID), Image.Resampling.BOX), np.float64)
    basis = _cosines()
    low = (basis @ grey @ basis.T).ravel()[1:]
    bits = int.from_bytes(np.packbits(np.concatenate([[False], low > np.median(low)])).tobytes(), "big")
    thumbnail = np.asarray(image.resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)).reshape(-1, 3)
    content = hashlib.blake2b(f"{pixels.shape}".encode(), digest_size=16)
    content.update(pixels.tobytes())
    return Signature(content.digest(), bits, thumbnail)


@lru_cache(maxsize=1)
def _cosines() -> NDArray[np.float64]:
    """(8, 32): the lowest frequencies of the discrete cosine transform of type II."""
    frequencies, places = np.arange(_LOW)[:, None], np.arange(_GRID)[None, :]
    return np.asarray(np.cos(np.pi * frequencies * (2 * places + 1) / (2 * _GRID)))


@dataclass(frozen=True)
class Duplicates:
    """Groups of images that are the same picture; each image is in at most one group, the strictest that holds it.

    Attributes:
        same_file: groups of indices whose files are equal byte for byte.
        same_pixels: groups whose files differ and whose decoded pixels do not.
        near: groups of nearly the same pictures.
    """

    same_file: tuple[tuple[int, ...], ...] = ()
    same_pixels: tuple[tuple[int, ...], ...] = ()
    near: tuple[tuple[int, ...], ...] = ()


def find_duplicates(signatures: Sequence[Signature], original: Callable[[int], bytes | Path | None]) -> Duplicates:
    """The groups among some images.

    Args:
        signatures: at most `MOST_COMPARED` of them are compared, the first ones.
        original: index -> file or encoded bytes; None where an image has neither.
    """
    signatures = signatures[:MOST_COMPARED]
    by_pixels: dict[bytes, list[int]] = defaultdict(list)
    for index, each in enumerate(signatures):
        by_pixels[each.pixels].append(index)
    same_file: list[tuple[int, ...]] = []
    same_pixels: list[tuple[int, ...]] = []
    for group in (found for found in by_pixels.values() if len(found) > 1):
        contents = [_content(original(index)) for index in group]
        (same_file if None not in contents and len(set(contents)) == 1 else same_pixels).append(tuple(group))
    firsts = [group[0] for group in by_pixels.values()]
    firsts = [index for index in firsts if _difference(signatures[index].thumbnail, 0) >= MOST_DIFFERENCE]
    near = _components(_near_pairs([signatures[index] for index in firsts]))
    return Duplicates(
        tuple(same_file), tuple(same_pixels), tuple(tuple(sorted(firsts[each] for each in group)) for group in near)
    )


def _content(original: bytes | Path | None) -> str | None:
    if isinstance(original, Path):
        return file_sha256(original)
    return None if original is None else hashlib.sha256(original).hexdigest()


def _near_pairs(signatures: Sequence[Signature]) -> Iterator[tuple[int, int]]:
    """Pairs of indices of images that are nearly the same; a pair may come several times."""
    if len(signatures) < 2:
        return
    bits = np.array([each.bits for each in signatures], np.uint64)
    thumbnails = np.stack([each.thumbnail for each in signatures])
    edges = np.linspace(0, 64, _PARTS + 1).astype(np.uint64)
    for low, high in pairwise(edges):
        part = (bits >> low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(part, kind="stable")
        starts = np.flatnonzero(np.diff(part[order], prepend=part[order[0]] + np.uint64(1)))
        for start, stop in zip(starts, [*starts[1:], len(order)], strict=True):
            for at in range(start, stop - 1):
                others = order[at + 1 : min(stop, at + 1 + _MOST_IN_BUCKET)]
                first = order[at]
                for other in others[np.bitwise_count(bits[others] ^ bits[first]) <= MOST_BITS]:
                    if _difference(thumbnails[first], thumbnails[other]) < MOST_DIFFERENCE:
                        yield int(first), int(other)


def _difference(one: NDArray[np.uint8], other: NDArray[np.uint8] | int) -> float:
    """Root mean square of the difference of two thumbnails, each channel less its mean; of one alone from 0."""
    difference = one.astype(np.float32) - other
    return float(np.sqrt(((difference - difference.mean(axis=0)) ** 2).mean()))


def _components(pairs: Iterator[tuple[int, int]]) -> list[list[int]]:
    """Groups of indices that are connected by pairs."""
    root: dict[int, int] = {}

    def find(index: int) -> int:
        while (above := root.setdefault(index, index)) != index:
            root[index] = root[above]
            index = root[index]
        return index

    for one, other in pairs:
        root[find(one)] = find(other)
    groups: dict[int, list[int]] = defaultdict(list)
    for index in sorted(root):
        groups[find(index)].append(index)
    return [group for group in groups.values() if len(group) > 1]
