"""The split of a data set into training, validation and test images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ktray.images.source import Source, Splits
from ktray.spec import Split

Part = tuple[Source, NDArray[np.int64]]  # a source, and the ascending rows (n,) of it that form a split


@lru_cache(maxsize=16)  # called for every draw from a space; 50,000 names take 0.2 s
def split_rows(splits: Splits, split: Split) -> dict[str, Part]:
    """Name of each split ("train", "val", "test") -> its source and the ascending rows (n,) of that source.

    The data set's own val is used if there is one, otherwise the share `split.val` of train, stratified if there are labels.
    """
    train = np.arange(len(splits.train.names))
    found: dict[str, Part] = {}
    if splits.val is not None:
        found["val"] = (splits.val, np.arange(len(splits.val.names)))
    elif split.val > 0:
        val = held_out(splits.train.names, splits.train.labels, split.val, split.seed)
        train = np.setdiff1d(train, val)
        found["val"] = (splits.train, val)
    if splits.test is not None:
        found["test"] = (splits.test, np.arange(len(splits.test.names)))
    for _, rows in (found := {"train": (splits.train, train), **found}).values():
        rows.setflags(write=False)  # shared by all callers
    return {name: part for name, part in found.items() if len(part[1])}


def held_out(names: Sequence[str], labels: NDArray[np.int64] | None, share: float, seed: int) -> NDArray[np.int64]:
    """Ascending indices of round(share * N) images: the share of every class, with the rest by largest remainders.

    Images are ranked by a hash of (seed, name), not by a permutation, so an added image moves few others between the
    splits, and the result does not depend on the version of a random generator. Every class keeps a training image.
    """
    ranks = [hashlib.sha256(f"{seed}\0{name}".encode()).digest() for name in names]
    groups = np.zeros(len(names), np.int64) if labels is None else labels
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    quotas = [int(share * len(member)) for member in members]
    by_remainder = sorted(range(len(members)), key=lambda c: (quotas[c] - share * len(members[c]), ranks[members[c][0]]))
    missing = round(share * len(names)) - sum(quotas)
    for group in by_remainder:
        if missing > 0 and quotas[group] + 1 < len(members[group]):
            quotas[group] += 1
            missing -= 1
    chosen = [sorted(member, key=ranks.__getitem__)[:quota] for member, quota in zip(members, quotas, strict=True)]
    return np.sort(np.array([index for group in chosen for index in group], np.int64))
