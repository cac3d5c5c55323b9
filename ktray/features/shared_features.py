"""Features that evaluations of one network share: the latest ones stay in this process, so that each image goes through once.

They are no artifact: a search would fill the disk with them, and a worker that has lost them extracts them again in less time
than a stage of their own would take to be scheduled.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import conditions, fingerprint
from ktray.checksums import version_of
from ktray.features import extraction
from ktray.images import Images

LIMIT_BYTES = 1 << 30  # of all rows that are kept; less on a machine with less than 8 GiB per core

View = Mapping[str, Any]


@dataclass(frozen=True)
class Judged:
    """Whose features are asked for.

    Attributes:
        weights: directory of a snapshot, or None.
        state: directory of a fitted descriptor's state, or None.
        device: torch device.
        max_batch_size: as in `StageContext`.
    """

    weights: Path | None
    state: Path | None
    device: str
    max_batch_size: int | None


@dataclass(frozen=True)
class _Kept:
    rows: NDArray[np.float32]
    seconds: float
    noted: Mapping[str, Any]


_kept: OrderedDict[str, _Kept] = OrderedDict()  # the least recently used first


def rows_of(
    judged: Judged,
    views: Sequence[View],
    others: Sequence[View],
    images: Images,
    origin: tuple[Path, str] | None,
    expected: int,
) -> list[NDArray[np.float32]]:
    """The features (N, D) float32 of each view, which cannot be written to.

    Args:
        views: `extraction.network_view` or `extraction.teacher_view`; several are of one network.
        others: views that will be asked for soon. They are extracted in the same pass, if there is memory to keep them.
        images: the images.
        origin: directory of the artifact that they are a split of, and the split; None for images from elsewhere, whose
            features are not kept.
        expected: number of images that this network is going to see.

    Raises:
        UserError, ValueError: as `extraction.extract_views`.
    """
    names = {_name(judged, view, origin): view for view in views}
    found = {name: _kept[name] for name in names if name in _kept}
    missing = {name: view for name, view in names.items() if name not in found}
    if missing:
        also = {_name(judged, view, origin): view for view in others} if origin else {}
        also = {name: view for name, view in also.items() if name not in names and name not in _kept}
        found |= _extracted(judged, missing, also, images, origin, expected)
    elif names:
        conditions.add(conditions.KEPT_ROWS, {"seconds": max(kept.seconds for kept in found.values())})
        for kept in found.values():
            for name, value in kept.noted.items():
                conditions.note(name, value)
    if origin:
        for name, kept in found.items():
            _kept[name] = kept
            _kept.move_to_end(name)
        _keep_within_limit()
    return [found[_name(judged, view, origin)].rows for view in views]


def _extracted(
    judged: Judged,
    wanted: Mapping[str, View],
    also: Mapping[str, View],
    images: Images,
    origin: tuple[Path, str] | None,
    expected: int,
) -> dict[str, _Kept]:
    """The wanted rows, and those of `also` that there is memory for. A pass costs as much as its deepest view."""
    began = time.perf_counter()
    with conditions.collecting() as noted:
        rows = extraction.extract_views(
            [*wanted.values(), *also.values()],
            judged.weights,
            judged.state,
            images,
            judged.device,
            judged.max_batch_size,
            expected=expected,
            wanted=len(wanted),
            extra_bytes=limit_bytes() // 2,
        )
    for name, value in noted.items():
        conditions.note(name, value)
    seconds = time.perf_counter() - began
    for each in rows:
        if each is not None:
            each.setflags(write=False)
    return {name: _Kept(each, seconds, noted) for name, each in zip([*wanted, *also], rows, strict=True) if each is not None}


def _name(judged: Judged, view: View, origin: tuple[Path, str] | None) -> str:
    """Everything that the rows depend on, so that none are used any more once an artifact was damaged and computed again."""
    artifacts = [judged.weights, judged.state, origin[0] if origin else None]
    versions = [[str(path), list(version_of(path))] if path else None for path in artifacts]
    return fingerprint.canonical([view, versions, origin[1] if origin else None, judged.device, judged.max_batch_size])


def _keep_within_limit() -> None:
    """Let go of the rows that were not used for longest; the rows of a large data set may be too many even alone."""
    while sum(kept.rows.nbytes for kept in _kept.values()) > limit_bytes():
        _kept.popitem(last=False)


def limit_bytes() -> int:
    """Most bytes that the kept rows may take together."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(LIMIT_BYTES, memory // (8 * (os.cpu_count() or 1)))


def forget() -> None:
    """Let go of all rows."""
    _kept.clear()
