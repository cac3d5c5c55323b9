"""Sets of permutations of nine tiles with a minimum Hamming distance, for jigsaw puzzles."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray

from ktray.fingerprint import seed_of

IDENTITY, REVISION = "permutations", 1

TILES = 9


@functools.lru_cache(maxsize=8)
def hashed_permutations(count: int, distance: int) -> NDArray[np.int64]:
    """The first `count` permutations of a fixed sequence, each at a Hamming distance of `distance` or more from all before it.

    The sequence is pseudo-random by hashing, so it is the same on every machine and with every release of numpy, and a larger
    set starts with the smaller one. Two random permutations of nine differ at 8 positions on average, and so do these.

    Args:
        count: P, 1 or more; at a distance of 3, about 10,000 are found within seconds.
        distance: minimum Hamming distance between two rows, 0 to 9.

    Returns:
        (P, 9) int64, read-only; row p lists the tile at each of the nine positions.

    Raises:
        ValueError: 100,000 candidates in a row were too close to the permutations already taken.

    Source: the properties of Jigsaw++'s 701 permutations, Noroozi et al., CVPR 2018 (arXiv:1805.00385).
        The construction is ours.
    """
    taken = np.empty((count, TILES), dtype=np.int64)
    size = candidate = refused = 0
    while size < count:
        row = _permutation(seed_of("permutations", candidate))
        candidate += 1
        if size and ((taken[:size] != row).sum(axis=1) < max(distance, 1)).any():
            refused += 1
            if refused == 100_000:
                raise ValueError(f"found only {size} of {count} permutations at Hamming distances of {distance} or more")
            continue
        taken[size] = row
        size, refused = size + 1, 0
    taken.setflags(write=False)
    return taken


def _permutation(number: int) -> list[int]:
    """The permutation with this number (modulo 9!) in lexicographic order, by the factorial number system."""
    left, row = list(range(TILES)), []
    digits = []
    for base in range(1, TILES + 1):
        number, digit = divmod(number, base)
        digits.append(digit)
    for digit in reversed(digits):
        row.append(left.pop(digit))
    return row


@functools.lru_cache(maxsize=4)
def farthest_permutations(count: int, distance: int) -> NDArray[np.int64]:
    """Permutations chosen one by one, each with the largest mean Hamming distance to those before it.

    Ties go to the first in a fixed shuffle of all 9! permutations, so a larger set starts with the smaller one.

    Args:
        count: P, 1 to 7,000; 1,000 take a few seconds.
        distance: minimum Hamming distance between two rows, 0 to 9; closer candidates are skipped.

    Returns:
        (P, 9) int64, read-only; row p lists the tile at each of the nine positions.

    Raises:
        ValueError: fewer than `count` permutations are `distance` apart.

    Source: Noroozi & Favaro, ECCV 2016, arXiv:1603.09246, algorithm 1.
    """
    columns = np.ascontiguousarray(_shuffled().T)
    total = columns.shape[1]
    agreeing = np.zeros(total, np.uint16)  # positions shared with each row taken so far, added up
    excluded = np.zeros(total, bool)
    taken = np.empty((count, TILES), np.int64)
    for size in range(count):
        best = int(np.where(excluded, np.uint16(65535), agreeing).argmin())
        if excluded[best]:
            raise ValueError(f"found only {size} of {count} permutations at Hamming distances of {distance} or more")
        taken[size] = columns[:, best]
        alike = np.zeros(total, np.uint8)
        for column, tile in zip(columns, taken[size], strict=True):
            alike += column == tile
        agreeing += alike
        excluded |= alike > TILES - max(distance, 1)
    taken.setflags(write=False)
    return taken


def require_permutations(count: int, distance: int) -> None:
    """Raise if `farthest_permutations` cannot find this set; it is only run if the sphere-packing bound does not settle it.

    Raises:
        ValueError: fewer than `count` permutations are `distance` apart.
    """
    nearer = sum(math.comb(TILES, moved) * _derangements(moved) for moved in range(distance))
    if count * nearer > math.factorial(TILES):
        farthest_permutations(count, distance)


def _derangements(count: int) -> int:
    number: float = sum((-1) ** i * math.factorial(count) / math.factorial(i) for i in range(count + 1))
    return round(number)


def _shuffled() -> NDArray[np.uint8]:
    """All permutations of the nine tiles (9!, 9), in a pseudo-random order that does not depend on numpy's generators."""
    rows = np.zeros((1, 1), np.uint8)
    for size in range(1, TILES):  # insert the new tile at each position of all permutations of the tiles before it
        rows = np.concatenate([np.insert(rows, place, size, axis=1) for place in range(size + 1)])
    mixed = np.arange(len(rows), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)  # SplitMix64, Steele et al., OOPSLA 2014
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    shuffled: NDArray[np.uint8] = rows[np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")]
    return shuffled
