"""Sets of permutations of nine tiles that stay apart, for jigsaw puzzles."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from ktray.fingerprint import seed_of

REVISION = 1

TILES = 9


@functools.lru_cache(maxsize=8)
def far_apart(count: int, distance: int) -> NDArray[np.int64]:
    """The first `count` of a fixed sequence of permutations that differ from all before them at `distance` places or more.

    The sequence is pseudo-random by hashing, the same on every machine and for every release of numpy, and a longer set begins
    with the shorter one. Two random permutations of nine differ at 8 places on average, and so do these.

    Args:
        count: P, 1 or more; at a distance of 3 about 10,000 are found within seconds.
        distance: smallest Hamming distance of two rows, 0 to 9.

    Returns:
        (P, 9) int64, read-only; row p says which tile stands at each of the nine places.

    Raises:
        ValueError: a hundred thousand candidates in a row were too near to those already taken.

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
    """The permutation with this number, taken modulo 9!, in lexicographic order (the factorial number system)."""
    left, row = list(range(TILES)), []
    digits = []
    for base in range(1, TILES + 1):
        number, digit = divmod(number, base)
        digits.append(digit)
    for digit in reversed(digits):
        row.append(left.pop(digit))
    return row
