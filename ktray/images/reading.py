"""Reading of written images by index."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import plugins, progress
from ktray.checksums import file_checks, intact
from ktray.errors import UserError
from ktray.images.data_files import with_absolute_path
from ktray.images.decoding import decode_whole, decoder, fit, fit_longest, fitted_boxes
from ktray.images.own_crop import OwnCrop, cropped, decoder_of_crops
from ktray.images.source import Images, Source, Unreadable, WholeImages, split_rows
from ktray.spec import DataSpec

_THREADS = min(32, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def open_split(directory: Path, split: str, spec: DataSpec) -> Images:
    """The images of one split.

    Args:
        directory: the output folder of `write`.
        split: "train", "val" or "test".
        spec: the data spec that was written; only used if images are decoded on demand, such as whole ones.

    Raises:
        UserError: the data set has no such split.
        ValueError: the source has changed since it was written; only if images are decoded on demand.
    """
    summary = json.loads(intact(directory / "splits.json").read_text())
    if split not in summary["splits"]:
        raise UserError(f"the data set has no {split!r} split", instead=f"It has {', '.join(summary['splits'])}.")
    described = json.loads(intact(directory / f"{split}.json").read_text())
    names, size = tuple(described["names"]), int(summary["size"])
    if not summary["streamed"]:
        read = _memmap_reader(directory, split)
    elif list(directory.glob(f"{split}-*.bin")):
        read = _parallel_reader(_copy_reader(directory, split, spec, summary.get("own_crop")), names, size)
    else:
        read = _parallel_reader(_source_reader(directory, split, spec, names, summary.get("own_crop")), names, size)
    boxes, flags = _boxes(directory, split), _box_flags(directory, split)
    sizes = _array(directory / f"{split}-sizes.npy")
    if summary.get("own_crop"):  # its boxes are those of whole images
        boxes = flags = None
    if boxes is not None and sizes is not None:
        fitted = [fitted_boxes(each, int(h), int(w), size) for each, (h, w) in zip(boxes, sizes, strict=True)]
        boxes = tuple(moved[inside] for moved, inside in fitted)
        flags = flags and tuple(of_image[inside] for of_image, (_, inside) in zip(flags, fitted, strict=True))
    return Images(
        count=len(names),
        size=size,
        read=read,
        labels=_array(directory / f"{split}-labels.npy"),
        classes=tuple(described["classes"]),
        names=names,
        boxes=boxes,
        presence=_array(directory / f"{split}-presence.npy"),
        box_flags=flags,
        whole=lambda: _whole_images(directory, split, spec, names),
    )


def _whole_images(directory: Path, split: str, spec: DataSpec, names: tuple[str, ...]) -> WholeImages:
    """The images as they are in the data set, with the boxes that were written."""
    source, rows = _listed_again(directory, split, spec, names)
    sizes, boxes = _array(directory / f"{split}-sizes.npy"), _boxes(directory, split)
    if sizes is None:  # what was written are the boxes of squares
        boxes = None if source.boxes is None else tuple(source.boxes[row] for row in rows)

    def read(index: int, longest: int | None) -> NDArray[np.uint8]:
        row = int(rows[index])
        encoded = source.original or source.encoded
        annotated = None if sizes is None else (int(sizes[index, 0]), int(sizes[index, 1]))
        with _readable_before(names[index]):
            if encoded is None:
                return fit_longest(source.read(row), longest)
            return decode_whole(encoded(row), spec, longest, annotated)

    def mask(index: int) -> NDArray[np.uint8]:
        assert source.mask is not None
        with _readable_before(names[index]):
            return source.mask(int(rows[index]))

    return WholeImages(read, sizes, boxes, _box_flags(directory, split), mask if source.mask is not None else None)


@contextmanager
def _readable_before(name: str) -> Iterator[None]:
    try:
        yield
    except Unreadable as error:
        raise ValueError(f"{name} was readable when the data were written, but is not any more: {error}") from error


def splits_of(directory: Path) -> tuple[str, ...]:
    """The splits in the output folder of `write`: "train", and "val" and "test" where they are."""
    return tuple(json.loads(intact(directory / "splits.json").read_text())["splits"])


def _memmap_reader(directory: Path, split: str) -> Callable[[NDArray[np.int64]], NDArray[np.uint8]]:
    """A function: indices in the split -> pixels. The blocks of the file that hold them are compared when first read."""
    file = open(directory / f"{split}.npy", "rb", buffering=0)  # noqa: SIM115 - closed when nothing reads from it any more
    checks = file_checks(directory, f"{split}.npy", file)
    if checks is not None:
        checks.require_rows(np.zeros(0, np.int64), 0, 1)
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    mapped = np.memmap(file, dtype, "r", file.tell(), shape)
    pixels, offset = mapped.view(np.ndarray), mapped.offset
    row_bytes = pixels[:1].nbytes

    def read(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        rows = np.arange(len(pixels))[indices]
        if checks is not None:
            checks.require_rows(rows, offset, row_bytes)
        return np.take(pixels, rows, axis=0)

    weakref.finalize(read, file.close)
    return read


def _array(path: Path) -> NDArray[Any] | None:
    return np.load(intact(path), allow_pickle=False) if path.exists() else None


def _boxes(directory: Path, split: str) -> tuple[NDArray[np.float32], ...] | None:
    counts = _array(directory / f"{split}-box-counts.npy")
    if counts is None:
        return None
    boxes = np.load(intact(directory / f"{split}-boxes.npy"), allow_pickle=False)
    return tuple(np.split(boxes, np.cumsum(counts)[:-1]))


def _box_flags(directory: Path, split: str) -> tuple[NDArray[np.bool_], ...] | None:
    flags, counts = _array(directory / f"{split}-box-flags.npy"), _array(directory / f"{split}-box-counts.npy")
    return None if flags is None or counts is None else tuple(np.split(flags, np.cumsum(counts)[:-1]))


def _source_reader(
    directory: Path, split: str, spec: DataSpec, names: tuple[str, ...], own: OwnCrop | None
) -> Callable[[int], NDArray[np.uint8]]:
    """A function: index in the split -> pixels, decoded from the data set itself."""
    source, rows = _listed_again(directory, split, spec, names)
    if own is not None:
        source = cropped(source, with_absolute_path(spec), own)
    return lambda index: source.read(int(rows[index]))


def _listed_again(directory: Path, split: str, spec: DataSpec, names: tuple[str, ...]) -> tuple[Source, NDArray[np.int64]]:
    """The source of a split, and its row for each image that was written.

    Raises:
        ValueError: the source lists other images than those that were written.
    """
    spec = with_absolute_path(spec)
    found = split_rows(plugins.module_of("dataset", spec).load(spec), spec.split)
    rows = np.load(intact(directory / f"{split}-rows.npy"), allow_pickle=False)
    source = found[split][0] if split in found else None
    if source is None or max(rows) >= len(source.names) or tuple(source.names[row] for row in rows) != names:
        raise ValueError(f"the {split!r} split of the data set {spec.kind!r} has changed since it was listed")
    return source, rows


def _copy_reader(directory: Path, split: str, spec: DataSpec, own: OwnCrop | None) -> Callable[[int], NDArray[np.uint8]]:
    """A function: index in the split -> pixels, decoded from the copies of the encoded images."""
    decode: Callable[[bytes], NDArray[np.uint8]] = decoder(spec) if own is None else decoder_of_crops(spec, own)
    files = sorted(directory.glob(f"{split}-*.bin"))
    lengths = [np.load(intact(path.with_suffix(".npy")), allow_pickle=False) for path in files]
    checks = [file_checks(directory, path.name) for path in files]
    first = np.cumsum([0, *(len(of_file) for of_file in lengths)])
    offsets = [np.cumsum([0, *of_file]) for of_file in lengths]

    def read(index: int) -> NDArray[np.uint8]:
        block = int(np.searchsorted(first, index, side="right")) - 1
        within, of_block = index - int(first[block]), checks[block]
        if of_block is not None:
            of_block.require_all()
        with open(files[block], "rb") as file:
            file.seek(int(offsets[block][within]))
            return decode(file.read(int(lengths[block][within])))

    return read


def _parallel_reader(
    read: Callable[[int], NDArray[np.uint8]], names: tuple[str, ...], size: int
) -> Callable[[NDArray[np.int64]], NDArray[np.uint8]]:
    """A reader of many images from a reader of one, with threads; decoding releases the interpreter lock."""

    def square(index: np.int64) -> NDArray[np.uint8]:
        with _readable_before(names[index]):
            return fit(read(int(index)), size)

    def read_all(indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        indices = np.arange(len(names))[indices]  # the same bounds and negative indices as a memmap
        squares = np.empty((len(indices), size, size, 3), np.uint8)

        def store(position: int) -> None:
            squares[position] = square(indices[position])

        for _ in _threads().map(store, range(len(indices))):
            progress.advance("read")
        return squares

    return read_all


@lru_cache(maxsize=1)
def _threads_of(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="ktray-decode")


def _threads() -> ThreadPoolExecutor:
    """The threads of this process that decode; a process that was forked has its own."""
    return _threads_of(os.getpid())
