"""The records through which data sets provide images and stages read them; the split of a data set, and its identity.

`identity` hashes the content of a data set, wherever it is stored.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import plugins
from ktray.checksums import json_text, read_json
from ktray.fingerprint import file_sha256, file_version, fingerprint, version_is_reliable
from ktray.images.folder_tree import SUFFIXES
from ktray.images.image_formats import large_and_no_image
from ktray.spec import DataSpec, Split


class Unreadable(Exception):
    """An image cannot be decoded. Such images are counted, listed and left out."""


DIFFICULT, TRUNCATED, CROWD = 0, 1, 2
"""Columns of `box_flags`: hard to recognise, so that VOC does not score it; cut off by the edge; a group in one box (COCO)."""

VOID = 255
"""Value of a mask's pixels that belong to no class and are not scored."""


@dataclass(frozen=True)
class Source:
    """The images of one split before decoding.

    Attributes:
        names: (N,) unique relative paths or row names.
        read: index -> pixels (h, w, 3) uint8 with any h and w; thread-safe. Raises Unreadable.
        labels: (N,) int64 in [0, len(classes)), or None.
        classes: names of the classes, or empty.
        boxes: for each image an (n_i, 5) float32 array of [x0, y0, x1, y1, class], in pixels; or None. x0 = 0 is the left edge
            of the first pixel and x1 = w the right edge of the last, of the output of `read` or of an image of its `sizes`.
        encoded: index -> encoded bytes, only if random access is slow (rows of a parquet file). A data set too large for a
            memmap then stores a copy of these bytes; `decode` must turn them into the output of `read`.
        original: index -> path or encoded bytes of what `read` decodes, so that its format can be looked at; or None.
        presence: (N, C) int8, where an image may show several classes: 1 present, -1 absent, 0 present only in difficult
            objects, so that the image counts neither way; or None.
        sizes: (N, 2) int64 [height, width] of the images that boxes and masks were drawn on; `read` may have decoded fewer
            pixels, but never turned or cropped the image. None without `box_flags` and masks.
        box_flags: for each image (n_i, 3) bool, the columns DIFFICULT, TRUNCATED and CROWD of its boxes; or None.
        mask: index -> (h, w) uint8 of this image's size: 0 background, c + 1 the class c, 255 void; thread-safe; or None.
            Raises Unreadable. `load` has compared its size with the image's.
    """

    names: tuple[str, ...]
    read: Callable[[int], NDArray[np.uint8]]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    boxes: tuple[NDArray[np.float32], ...] | None = None
    encoded: Callable[[int], bytes] | None = None
    original: Callable[[int], bytes | Path] | None = None
    presence: NDArray[np.int8] | None = None
    sizes: NDArray[np.int64] | None = None
    box_flags: tuple[NDArray[np.bool_], ...] | None = None
    mask: Callable[[int], NDArray[np.uint8]] | None = None


@dataclass(frozen=True)
class Layout:
    """What `load` assumed about the files of a data set, and what it left out. For people: no part of the identity.

    Attributes:
        read_from: split -> {folder or file, relative to the data set's root: number of its images}.
        classes: where the names and numbers of the classes come from, as a phrase; empty without labels.
        order: the order of the images in a split, as a phrase.
        left_out: what was left out, as a suffix or a phrase -> number of files.
        warnings: sentences about what looks wrong.
        nested: path of the folder that looks like the right one, if the one that was given looks wrong; else empty.
        annotations: how boxes, masks and several labels were understood, as a phrase; empty without any.
    """

    read_from: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    classes: str = ""
    order: str = ""
    left_out: Mapping[str, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    nested: str = ""
    annotations: str = ""


@dataclass(frozen=True, eq=False)  # compared by identity: the contents are too large to compare
class Splits:
    """The result of `datasets/<kind>.load`; if `val` is None, a seeded, stratified part of `train` takes its place.

    Attributes:
        files: (name relative to the data set's root, path) of every file with bytes that affect the pixels.
        identity: sha256 hex, in place of `files`, for content that does not come from files (generated data).
        layout: what was assumed and left out, for `ktray data check` and the record of the images.
    """

    train: Source
    val: Source | None = None
    test: Source | None = None
    files: tuple[tuple[str, Path], ...] = ()
    identity: str | None = None
    layout: Layout = Layout()


@dataclass(frozen=True)
class Recognised:
    """A data set that a path may be, as a kind of data set sees it.

    Attributes:
        fields: of its Spec, `path` included.
        because: what speaks for it, as a phrase: ``5 folders that hold images``.
        strength: how much the layout says; of several kinds that recognise a path, the strongest is right. 0: any folder with
            images; 1: folders that may be classes; 2: files of this kind; 3: a layout that nothing else has.
    """

    fields: Mapping[str, Any]
    because: str
    strength: int


@dataclass(frozen=True)
class WholeImages:
    """The images of one split at their own aspect ratio, and what was drawn on them; decoded from the data set on demand.

    Attributes:
        read: (index, longest side in pixels or None) -> (h, w, 3) uint8, the whole image, shrunk if a side is longer;
            thread-safe. Raises ValueError if the data set has changed.
        sizes: (N, 2) int64 [height, width] of the images before they are shrunk, or None if the data set does not state them.
        boxes: as in Source, in pixels of the image before it is shrunk, or None.
        box_flags: as in Source, or None.
        mask: index -> (h, w) uint8, as in Source, of the image before it is shrunk, or None.
    """

    read: Callable[[int, int | None], NDArray[np.uint8]]
    sizes: NDArray[np.int64] | None = None
    boxes: tuple[NDArray[np.float32], ...] | None = None
    box_flags: tuple[NDArray[np.bool_], ...] | None = None
    mask: Callable[[int], NDArray[np.uint8]] | None = None


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
        presence: (N, C) int8 as in Source, or None.
        box_flags: as in Source, of `boxes`, or None.
        whole: opens the same images at their own aspect ratio, with boxes and masks; it lists the data set, so call it once.
            None for images that come from no data set.
        stored: the same images before `read` resizes them to `size`, for callers that resize on their device
            (`resizing.resized`); None if nothing is resized.
    """

    count: int
    size: int
    read: Callable[[NDArray[np.int64]], NDArray[np.uint8]]
    labels: NDArray[np.int64] | None = None
    classes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    boxes: tuple[NDArray[np.float32], ...] | None = None
    presence: NDArray[np.int8] | None = None
    box_flags: tuple[NDArray[np.bool_], ...] | None = None
    whole: Callable[[], WholeImages] | None = None
    stored: Images | None = None

    def __len__(self) -> int:
        return self.count


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


_THREADS = 8
_FILES_PER_TASK = 64  # files per task of a thread


def identity(spec: DataSpec, cache: Path | None = None) -> str:
    """sha256 (64 hex digits) of the data set's content: its files' names, sizes and bytes, and its labels.

    Neither the location of the data nor the spec's processing (size, split) affects it. Files are hashed in threads.

    Args:
        spec: a data spec.
        cache: folder for a JSON file of known hashes by absolute path and version of the file; None hashes everything.

    Raises:
        UserError: there are no data at the location in the spec.
        ValueError: the kind provides neither files nor an identity.
    """
    module = plugins.module_of("dataset", spec)
    splits = module.load(spec)
    if splits.identity is None and not splits.files:
        raise ValueError(f"the data set kind {spec.kind!r} provides neither files nor an identity")
    named = {"train": splits.train, "val": splits.val, "test": splits.test}
    location = {field: getattr(spec, field) for field in module.LOCATION}
    cache_file = cache / f"contents-{fingerprint([spec.kind, location])[:12]}.json" if cache else None
    return fingerprint(
        {
            "files": _manifest(splits.files, cache_file),
            "identity": splits.identity,
            "splits": {name: _annotations(source) for name, source in named.items() if source is not None},
        }
    )


def _annotations(source: Source) -> dict[str, Any]:
    """What was stated of the images besides their pixels. Masks are files, so that their content counts already."""
    further = {
        "presence": None if source.presence is None else source.presence.tolist(),
        "sizes": None if source.sizes is None else source.sizes.tolist(),
        "box_flags": None if source.box_flags is None else [flags.tolist() for flags in source.box_flags],
    }
    return {
        **{name: value for name, value in further.items() if value is not None},
        "names": source.names,
        "labels": None if source.labels is None else source.labels.tolist(),
        "classes": source.classes,
        "boxes": None if source.boxes is None else [boxes.tolist() for boxes in source.boxes],
    }


def _manifest(files: tuple[tuple[str, Path], ...], cache_file: Path | None) -> list[list[Any]]:
    """Sorted [name, size, sha256] of each file."""
    known = _cached_entries(cache_file)
    paths = [str(path) for _, path in files]
    chunks = [paths[start : start + _FILES_PER_TASK] for start in range(0, len(paths), _FILES_PER_TASK)]

    def hash_all(chunk: list[str]) -> list[list[Any]]:
        return [_entry(path, known) for path in chunk]

    with ThreadPoolExecutor(_THREADS) as threads:
        entries = [entry for of_chunk in threads.map(hash_all, chunks) for entry in of_chunk]
    if cache_file is not None:
        lines = {
            path: entry
            for path, entry in zip(paths, entries, strict=True)
            if entry[-1] != _UNREADABLE and version_is_reliable(entry)
        }
        if lines != known:
            cache_file.parent.mkdir(parents=True, exist_ok=True)
            scratch = cache_file.with_suffix(f".{os.getpid()}")
            scratch.write_text(json_text(lines))
            scratch.replace(cache_file)
    return sorted([name, entry[0], entry[-1]] for (name, _), entry in zip(files, entries, strict=True))


_UNREADABLE = "unreadable"


def _entry(path: str, known: dict[str, list[Any]]) -> list[Any]:
    """[*file_version, sha256] of a file; a fixed entry if it is unreadable, which decoding reports.

    An entry of `known` from an earlier form of the version differs from every one of now.
    """
    try:
        if path.lower().endswith(SUFFIXES) and large_and_no_image(Path(path)):
            return [-1, _UNREADABLE]
        version = [*file_version(os.stat(path))]
        cached = known.get(path)
        if cached and cached[:-1] == version:
            return cached
        return [*version, file_sha256(Path(path))]
    except OSError:
        return [-1, _UNREADABLE]


def _cached_entries(cache_file: Path | None) -> dict[str, list[Any]]:
    if cache_file is None or not cache_file.exists():
        return {}
    try:
        return read_json(cache_file)
    except ValueError:
        return {}  # damaged, or truncated by a full disk: everything is hashed again
