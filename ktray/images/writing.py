"""Writing of a data set's images: decoded once, for all later stages."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import plugins, progress
from ktray.fingerprint import fingerprint
from ktray.images.data_files import with_absolute_path
from ktray.images.decoding import decoder, fit, fit_boxes
from ktray.images.own_crop import OwnCrop, cropped, decoder_of_crops
from ktray.images.source import Part, Source, Splits, Unreadable, split_rows
from ktray.pool import Pool
from ktray.spec import DataSpec
from ktray.text import some_of

_BLOCK_BYTES = 32 << 20
_BLOCK_ROWS = 1024
_HEADER = 128  # bytes before the pixels of a .npy file; numpy pads its header to a multiple of 64

Block = tuple[str, int, int]  # split, start and end (exclusive) of the offsets in it
Decode = Callable[[bytes], NDArray[np.uint8]]
StoreImage = Callable[[int, int], NDArray[np.uint8]]  # (offset in the split, row of the source) -> pixels from the source


def write(spec: DataSpec, out: Path, pool: Pool, memmap_bytes: int = 20 << 30, own: OwnCrop | None = None) -> dict[str, float]:
    """Decode every image once and write each split to `out`.

    Pixels that fit are stored in `<split>.npy` (N, size, size, 3) uint8. Larger data sets are decoded here only to find
    unreadable images, and again whenever they are read. Other files: `<split>.json` (names, classes), labels, presence, sizes,
    boxes and their flags, rows of the source, and `splits.json` with the unreadable images and what was assumed of the data.
    Boxes are those of the decoded square, or of the whole image where there are `sizes`. Masks are not copied. No process
    holds the pixels of more than one image at a time.

    Args:
        spec: a data spec.
        out: folder to write to, created if missing.
        pool: decodes blocks of images; the result does not depend on it.
        memmap_bytes: limit for the pixels of all splits together.
        own: the crop of a pretrained network, in place of squares of the data's size.

    Returns:
        "count" of images written, and number of "unreadable" images.

    Raises:
        UserError: there are no data at the location in the spec.
        ValueError: more than `spec.max_unreadable` of the images are unreadable, or all those of a class in a split; the
            message names the first few.
    """
    spec = with_absolute_path(spec)
    out.mkdir(parents=True, exist_ok=True)
    listed = plugins.module_of("dataset", spec).load(spec)
    found = split_rows(listed, spec.split)
    total = sum(len(rows) for _, rows in found.values())
    side = spec.size if own is None else int(own["size"])
    streamed = total * side**2 * 3 > memmap_bytes
    if not streamed:
        for name, (_, rows) in found.items():
            _reserve(out / f"{name}.npy", (len(rows), side, side, 3))
    blocks = _blocks(found, side)
    shared = {"spec": spec.model_dump(mode="json"), "out": str(out), "streamed": streamed, "listing": _listing(found)}
    shared |= {"own": own} if own is not None else {}
    reports = list(zip(blocks, pool.map(_decode_block, blocks, shared), strict=True))

    left_out: list[dict[str, str]] = []
    splits: list[str] = []
    for name, (source, rows) in found.items():
        of_split = [report for block, report in reports if block[0] == name]
        reasons = {offset: why for report in of_split for offset, why in report["unreadable"]}
        left_out += [{"split": name, "name": source.names[rows[i]], "why": why} for i, why in reasons.items()]
        kept = np.setdiff1d(np.arange(len(rows)), np.array(list(reasons), np.int64))
        if name == "train" or source is not listed.train:
            _require_every_class(name, source, rows, kept, reasons)
        if not streamed and reasons:
            _close_gaps(out / f"{name}.npy", kept)
        splits += [name] if len(kept) else []
        boxes = [boxes for report in of_split for boxes in report["boxes"]]
        write_metadata(out, name, source if own is None else cropped(source, spec, own), rows[kept], boxes)
    _require_readable(left_out, total, spec.max_unreadable if "train" in splits else None)
    summary = {"size": side, "streamed": streamed, "splits": splits, "unreadable": left_out, **_assumed(listed)}
    summary |= {"own_crop": dict(own)} if own is not None else {}
    (out / "splits.json").write_text(json.dumps(summary, indent=1))
    return {"count": float(total - len(left_out)), "unreadable": float(len(left_out))}


def _require_readable(left_out: list[dict[str, str]], total: int, limit: float | None) -> None:
    """Raise if more than the share `limit` of images is unreadable; None means that no training image is readable."""
    if len(left_out) <= (limit or 0.0) * total:
        return
    first = "; ".join(f"{entry['name']} ({entry['why']})" for entry in left_out[:3])
    allowed = "and no training image is left" if limit is None else f"more than max_unreadable={limit:g} allows"
    instead = "Repair or remove these files" + ("" if limit is None else ", or raise max_unreadable of the data set")
    raise ValueError(f"{some_of(len(left_out), total, 'image', ('is', 'are'))} unreadable, {allowed}: {first}. {instead}.")


def _require_every_class(
    split: str, source: Source, rows: NDArray[np.int64], kept: NDArray[np.int64], reasons: dict[int, str]
) -> None:
    """Raise if all images of a class in a split are unreadable: without a word, there would be one class fewer."""
    if not reasons or not len(kept):  # a split without any image is dealt with elsewhere
        return
    if source.presence is not None:
        shown = source.presence[rows] == 1
        for label in np.flatnonzero(shown.any(axis=0) & ~shown[kept].any(axis=0)).tolist():
            offsets = [offset for offset in reasons if shown[offset, label]]
            _refuse_lost_class(split, source, rows, label, offsets, reasons)
    if source.labels is None:
        return
    labels = source.labels[rows]
    lost = np.setdiff1d(labels, labels[kept])
    if len(lost):
        offsets = [offset for offset in reasons if labels[offset] == lost[0]]
        _refuse_lost_class(split, source, rows, int(lost[0]), offsets, reasons)


def _refuse_lost_class(
    split: str, source: Source, rows: NDArray[np.int64], label: int, offsets: list[int], reasons: dict[int, str]
) -> None:
    first = "; ".join(f"{source.names[rows[offset]]} ({reasons[offset]})" for offset in offsets[:3])
    raise ValueError(
        f"all {len(offsets)} images of the class {source.classes[label]!r} in {split} are unreadable: {first}. "
        "Repair them, or remove the class."
    )


def _assumed(listed: Splits) -> dict[str, Any]:
    """What was assumed of the files of a data set, for a person who looks at the artifact."""
    layout = asdict(listed.layout)
    stated = ("read_from", "classes", "order", "left_out", "warnings", *(["annotations"] if listed.layout.annotations else []))
    return {"assumed": {name: layout[name] for name in stated}}


def _blocks(found: dict[str, Part], size: int) -> list[Block]:
    """Blocks of consecutive images of each split; they depend only on the data, not on the number of workers."""
    length = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (size**2 * 3)))
    return [
        (name, start, min(start + length, len(rows)))
        for name, (_, rows) in found.items()
        for start in range(0, len(rows), length)
    ]


def _listing(found: dict[str, Part]) -> str:
    """Hash of the images in each split. Workers list the data themselves and check that they see the same images."""
    return fingerprint({name: [source.names, rows.tolist()] for name, (source, rows) in found.items()})


@lru_cache(maxsize=1)
def _listed_splits(spec: str, out: str, listing: str) -> dict[str, Part]:
    """The splits as listed by a worker, once per `write`; `out` is in the cache key because data may change between calls."""
    ready = plugins.parse("dataset", json.loads(spec))
    found = split_rows(plugins.module_of("dataset", ready).load(ready), ready.split)
    if _listing(found) != listing:
        raise ValueError(f"the data set {ready.kind!r} changed while it was read, or differs between workers")
    return found


def _decode_block(block: Block, shared: dict[str, Any]) -> dict[str, Any]:
    """Decode the images of a block and store them; runs in a worker.

    Returns:
        "unreadable" [(offset in the split, reason)], "boxes" of the readable images; empty without boxes, or with `sizes`.
    """
    name, start, stop = block
    source, rows = _listed_splits(json.dumps(shared["spec"]), shared["out"], shared["listing"])[name]
    data, own = plugins.parse("dataset", shared["spec"]), shared.get("own")
    size, read = shared["spec"]["size"], decoder(data)
    if own is not None:
        size, read, source = own["size"], decoder_of_crops(data, own), cropped(source, data, own)
    store = _store_pixels if not shared["streamed"] else _store_nothing if source.encoded is None else _store_encoded
    unreadable, boxes = [], []
    with store(Path(shared["out"]), block, source, size, read) as store_image:
        for offset in range(start, stop):
            progress.advance("images")
            row = int(rows[offset])
            try:
                height, width = store_image(offset, row).shape[:2]
            except Unreadable as error:
                unreadable.append((offset, str(error)))
                continue
            if source.boxes is not None and source.sizes is None:
                boxes.append(fit_boxes(source.boxes[row], height, width, size))
    return {"unreadable": unreadable, "boxes": boxes}


@contextmanager
def _store_pixels(out: Path, block: Block, source: Source, size: int, decode: Decode) -> Iterator[StoreImage]:
    """Store decoded squares at their offsets in the split's .npy, by file writes: a memmap would keep them in memory."""
    with open(out / f"{block[0]}.npy", "r+b") as file:

        def store_image(offset: int, row: int) -> NDArray[np.uint8]:
            pixels = source.read(row)
            file.seek(_HEADER + offset * size**2 * 3)
            file.write(fit(pixels, size).tobytes())
            return pixels

        yield store_image


@contextmanager
def _store_nothing(out: Path, block: Block, source: Source, size: int, decode: Decode) -> Iterator[StoreImage]:
    """Store nothing: images are decoded from the source on demand."""
    yield lambda offset, row: source.read(row)


@contextmanager
def _store_encoded(out: Path, block: Block, source: Source, size: int, decode: Decode) -> Iterator[StoreImage]:
    """Store the encoded bytes of readable images in one file per block, and their lengths in another."""
    assert source.encoded is not None
    copy, lengths = source.encoded, []
    path = out / f"{block[0]}-{block[1]:010d}.bin"
    with open(path, "wb") as file:

        def store_image(offset: int, row: int) -> NDArray[np.uint8]:
            encoded = copy(row)
            pixels = decode(encoded)
            lengths.append(file.write(encoded))
            return pixels

        yield store_image
    np.save(path.with_suffix(".npy"), np.array(lengths, np.int64))


def _reserve(path: Path, shape: tuple[int, int, int, int]) -> None:
    """Create a sparse .npy file of zeros, which takes no disk space until it is written."""
    with open(path, "wb") as file:
        _write_header(file, shape)
        file.truncate(_HEADER + int(np.prod(shape, dtype=np.int64)))


def _write_header(file: Any, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    if file.tell() != _HEADER:
        raise ValueError(f"numpy wrote a header of {file.tell()} bytes instead of {_HEADER}")


def _close_gaps(path: Path, kept: NDArray[np.int64]) -> None:
    """Close the gaps of unreadable images: move the kept rows together, in place, and truncate the file."""
    pixels = np.load(path, mmap_mode="r+", allow_pickle=False)
    shape = (len(kept), *pixels.shape[1:])
    step = max(1, _BLOCK_BYTES // int(np.prod(shape[1:])))
    for start in range(0, len(kept), step):
        # `kept` ascends, so rows only move towards the start and never overwrite rows that are still to be moved.
        rows = kept[start : start + step]
        pixels[start : start + len(rows)] = pixels[rows]
    pixels.flush()
    del pixels
    with open(path, "r+b") as file:
        _write_header(file, shape)
        file.truncate(_HEADER + int(np.prod(shape, dtype=np.int64)))


def write_metadata(out: Path, name: str, source: Source, rows: NDArray[np.int64], boxes: list[NDArray[np.float32]]) -> None:
    """Write everything of a split except its pixels; `rows` and `boxes` (without `sizes`) are those of the readable images."""
    names = [source.names[row] for row in rows]
    (out / f"{name}.json").write_text(json.dumps({"names": names, "classes": source.classes}))
    np.save(out / f"{name}-rows.npy", rows)
    if source.labels is not None:
        np.save(out / f"{name}-labels.npy", source.labels[rows].astype(np.int64))
    if source.presence is not None:
        np.save(out / f"{name}-presence.npy", source.presence[rows].astype(np.int8))
    if source.sizes is not None:
        np.save(out / f"{name}-sizes.npy", source.sizes[rows].astype(np.int64))
    if source.box_flags is not None:
        flags = [source.box_flags[row] for row in rows]
        np.save(out / f"{name}-box-flags.npy", np.concatenate([*flags, np.zeros((0, 3), np.bool_)]))
    if source.boxes is not None:
        boxes = boxes if source.sizes is None else [source.boxes[row] for row in rows]
        np.save(out / f"{name}-boxes.npy", np.concatenate([*boxes, np.zeros((0, 5), np.float32)]))
        np.save(out / f"{name}-box-counts.npy", np.array([len(of_image) for of_image in boxes], np.int64))


def write_sample(spec: DataSpec, out: Path, count: int, own: OwnCrop | None = None) -> dict[str, float]:
    """Write up to `count` images of each split, evenly spaced, in the format of `write`; unreadable images are skipped.

    Args:
        spec: a data spec.
        out: existing folder to write to.
        own: as in `write`.

    Returns:
        "count" of images written, and number of "unreadable" images among those tried.

    Raises:
        UserError: there are no data at the location in the spec.
        ValueError: a split has no readable image.
    """
    spec = with_absolute_path(spec)
    listed = plugins.module_of("dataset", spec).load(spec)
    found = split_rows(listed, spec.split)
    side = spec.size if own is None else int(own["size"])
    written, unreadable = 0, 0
    for name, (source, rows) in found.items():
        if own is not None:
            source = cropped(source, spec, own)
        kept, pixels, boxes = _read_sample(source, rows[np.unique(np.linspace(0, len(rows) - 1, count).astype(np.int64))], side)
        if not len(kept):
            raise ValueError(f"none of {min(count, len(rows))} images of the {name} split can be read")
        np.save(out / f"{name}.npy", pixels)
        write_metadata(out, name, source, kept, boxes)
        written += len(kept)
        unreadable += min(count, len(rows)) - len(kept)
    summary = {"size": side, "streamed": False, "splits": list(found), "unreadable": [], **_assumed(listed)}
    summary |= {"own_crop": dict(own)} if own is not None else {}
    (out / "splits.json").write_text(json.dumps(summary, indent=1))
    return {"count": float(written), "unreadable": float(unreadable)}


def _read_sample(
    source: Source, rows: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8], list[NDArray[np.float32]]]:
    """The readable rows (n,), their squares (n, size, size, 3), and their boxes if there are any."""
    kept, squares, boxes = [], [], []
    for row in rows:
        with contextlib.suppress(Unreadable):
            pixels = source.read(int(row))
            kept.append(int(row))
            squares.append(fit(pixels, size))
            if source.boxes is not None and source.sizes is None:
                boxes.append(fit_boxes(source.boxes[row], pixels.shape[0], pixels.shape[1], size))
    return np.array(kept, np.int64), np.array(squares, np.uint8), boxes
