"""The images of a data set, decoded once and laid down for all stages that follow."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import plugins, progress
from ktray.fingerprint import fingerprint
from ktray.images.decoding import decode, fit, fit_boxes
from ktray.images.listing import with_absolute_path
from ktray.images.source import Source, Unreadable
from ktray.images.splitting import Part, split_rows
from ktray.pool import Pool
from ktray.spec import DataSpec

_BLOCK_BYTES = 32 << 20
_BLOCK_ROWS = 1024
_HEADER = 128  # bytes before the pixels of a .npy file; numpy pads its header to a multiple of 64

Block = tuple[str, int, int]  # split, first and last + 1 offset in it
Place = Callable[[int, int], NDArray[np.uint8]]  # (offset in the split, row of the source) -> pixels as the source gives them


def write(spec: DataSpec, out: Path, pool: Pool, memmap_bytes: int = 20 << 30) -> dict[str, float]:
    """Decode every image once and lay each split down in `out`.

    Pixels that fit go into `<split>.npy` (N, size, size, 3) uint8. Larger data is decoded here only to find what is unreadable,
    and again whenever it is read. Beside it lie `<split>.json` (names, classes), labels, boxes, rows of the source, and
    `splits.json` with what was left out. No process holds the pixels of more than one image at a time.

    Args:
        spec: a data spec.
        out: folder to write into; made if missing.
        pool: where blocks of images are decoded; the result does not depend on it.
        memmap_bytes: limit for the pixels of all splits together.

    Returns:
        "count" of images that were written, and of "unreadable" ones.

    Raises:
        UserError: the data are not where the spec says.
        ValueError: more than `spec.max_unreadable` of the images are unreadable; names the first few.
    """
    spec = with_absolute_path(spec)
    out.mkdir(parents=True, exist_ok=True)
    found = split_rows(plugins.module_of("dataset", spec).load(spec), spec.split)
    total = sum(len(rows) for _, rows in found.values())
    streamed = total * spec.size**2 * 3 > memmap_bytes
    if not streamed:
        for name, (_, rows) in found.items():
            _reserve(out / f"{name}.npy", (len(rows), spec.size, spec.size, 3))
    blocks = _blocks(found, spec.size)
    shared = {"spec": spec.model_dump(mode="json"), "out": str(out), "streamed": streamed, "listing": _listing(found)}
    reports = list(zip(blocks, pool.map(_decode_block, blocks, shared), strict=True))

    left_out: list[dict[str, str]] = []
    splits: list[str] = []
    for name, (source, rows) in found.items():
        own = [report for block, report in reports if block[0] == name]
        reasons = {offset: why for report in own for offset, why in report["unreadable"]}
        left_out += [{"split": name, "name": source.names[rows[i]], "why": why} for i, why in reasons.items()]
        kept = np.setdiff1d(np.arange(len(rows)), np.array(list(reasons), np.int64))
        if not streamed and reasons:
            _close_gaps(out / f"{name}.npy", kept)
        splits += [name] if len(kept) else []
        write_metadata(out, name, source, rows[kept], [boxes for report in own for boxes in report["boxes"]])
    _refuse_many(left_out, total, spec.max_unreadable if "train" in splits else None)
    summary = {"size": spec.size, "streamed": streamed, "splits": splits, "unreadable": left_out}
    (out / "splits.json").write_text(json.dumps(summary, indent=1))
    return {"count": float(total - len(left_out)), "unreadable": float(len(left_out))}


def _refuse_many(left_out: list[dict[str, str]], total: int, limit: float | None) -> None:
    """Refuse more than the share `limit` of all images; any at all where it is None: no training image is left."""
    if len(left_out) <= (limit or 0.0) * total:
        return
    first = "; ".join(f"{entry['name']} ({entry['why']})" for entry in left_out[:3])
    allowed = "and no training image is left" if limit is None else f"more than max_unreadable={limit:g} allows"
    instead = "Mend or remove these files" + ("" if limit is None else ", or set max_unreadable of the data set higher")
    raise ValueError(f"{len(left_out)} of {total} images are unreadable, {allowed}: {first}. {instead}.")


def _blocks(found: dict[str, Part], size: int) -> list[Block]:
    """Fixed stretches of each split: they depend on the data alone, never on the workers."""
    length = max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // (size**2 * 3)))
    return [
        (name, start, min(start + length, len(rows)))
        for name, (_, rows) in found.items()
        for start in range(0, len(rows), length)
    ]


def _listing(found: dict[str, Part]) -> str:
    """Hash of which images go where: workers list the data themselves and must see the same."""
    return fingerprint({name: [source.names, rows.tolist()] for name, (source, rows) in found.items()})


@lru_cache(maxsize=1)
def _found(spec: str, out: str, listing: str) -> dict[str, Part]:
    """The splits as a worker lists them, once per `write`: `out` is in the key because data may change between two."""
    ready = plugins.parse("dataset", json.loads(spec))
    found = split_rows(plugins.module_of("dataset", ready).load(ready), ready.split)
    if _listing(found) != listing:
        raise ValueError(f"the data set {ready.kind!r} changed while it was read, or is not the same for all workers")
    return found


def _decode_block(block: Block, shared: dict[str, Any]) -> dict[str, Any]:
    """Decode the images of a block and write what is kept of them at its place; this is what a worker runs.

    Returns:
        "unreadable" [(offset in the split, reason)], "boxes" of the readable images, empty if the data have none.
    """
    name, start, stop = block
    source, rows = _found(json.dumps(shared["spec"]), shared["out"], shared["listing"])[name]
    size = shared["spec"]["size"]
    keep = _pixels if not shared["streamed"] else _checked if source.encoded is None else _encoded
    unreadable, boxes = [], []
    with keep(Path(shared["out"]), block, source, size) as place:
        for offset in range(start, stop):
            progress.advance("images")
            row = int(rows[offset])
            try:
                height, width = place(offset, row).shape[:2]
            except Unreadable as error:
                unreadable.append((offset, str(error)))
                continue
            if source.boxes is not None:
                boxes.append(fit_boxes(source.boxes[row], height, width, size))
    return {"unreadable": unreadable, "boxes": boxes}


@contextmanager
def _pixels(out: Path, block: Block, source: Source, size: int) -> Iterator[Place]:
    """Decoded squares go to their offsets in the split's .npy: written, not mapped, so that they leave the memory."""
    with open(out / f"{block[0]}.npy", "r+b") as file:

        def place(offset: int, row: int) -> NDArray[np.uint8]:
            pixels = source.read(row)
            file.seek(_HEADER + offset * size**2 * 3)
            file.write(fit(pixels, size).tobytes())
            return pixels

        yield place


@contextmanager
def _checked(out: Path, block: Block, source: Source, size: int) -> Iterator[Place]:
    """Nothing is kept: the source is read again whenever the images are."""
    yield lambda offset, row: source.read(row)


@contextmanager
def _encoded(out: Path, block: Block, source: Source, size: int) -> Iterator[Place]:
    """The readable images' encoded bytes go into one file per block, their lengths beside it."""
    assert source.encoded is not None
    copy, lengths = source.encoded, []
    path = out / f"{block[0]}-{block[1]:010d}.bin"
    with open(path, "wb") as file:

        def place(offset: int, row: int) -> NDArray[np.uint8]:
            encoded = copy(row)
            pixels = decode(encoded, size)
            lengths.append(file.write(encoded))
            return pixels

        yield place
    np.save(path.with_suffix(".npy"), np.array(lengths, np.int64))


def _reserve(path: Path, shape: tuple[int, int, int, int]) -> None:
    """A .npy file of zeros that takes no disk until it is written."""
    with open(path, "wb") as file:
        _head(file, shape)
        file.truncate(_HEADER + int(np.prod(shape, dtype=np.int64)))


def _head(file: Any, shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    if file.tell() != _HEADER:
        raise ValueError(f"numpy wrote a header of {file.tell()} bytes instead of {_HEADER}")


def _close_gaps(path: Path, kept: NDArray[np.int64]) -> None:
    """Move the kept rows together, in place, and cut the file: unreadable images leave no black ones behind."""
    pixels = np.load(path, mmap_mode="r+", allow_pickle=False)
    shape = (len(kept), *pixels.shape[1:])
    step = max(1, _BLOCK_BYTES // int(np.prod(shape[1:])))
    for start in range(0, len(kept), step):
        # kept ascends, so a block's rows lie at or after the place they go to, and later blocks' rows behind both.
        rows = kept[start : start + step]
        pixels[start : start + len(rows)] = pixels[rows]
    pixels.flush()
    del pixels
    with open(path, "r+b") as file:
        _head(file, shape)
        file.truncate(_HEADER + int(np.prod(shape, dtype=np.int64)))


def write_metadata(out: Path, name: str, source: Source, rows: NDArray[np.int64], boxes: list[NDArray[np.float32]]) -> None:
    """All of a split but its pixels; `rows` and `boxes` are those of the readable images."""
    names = [source.names[row] for row in rows]
    (out / f"{name}.json").write_text(json.dumps({"names": names, "classes": source.classes}))
    np.save(out / f"{name}-rows.npy", rows)
    if source.labels is not None:
        np.save(out / f"{name}-labels.npy", source.labels[rows].astype(np.int64))
    if source.boxes is not None:
        np.save(out / f"{name}-boxes.npy", np.concatenate([*boxes, np.zeros((0, 5), np.float32)]))
        np.save(out / f"{name}-box-counts.npy", np.array([len(of_image) for of_image in boxes], np.int64))


def write_sample(spec: DataSpec, out: Path, count: int) -> dict[str, float]:
    """Write up to `count` images of each split as `write` does, from all over it; unreadable ones are passed over.

    Args:
        spec: a data spec.
        out: folder to write into.

    Returns:
        "count" of images that were written, and of "unreadable" ones among those that were tried.

    Raises:
        UserError: the data are not where the spec says.
        ValueError: no image of a split can be read.
    """
    spec = with_absolute_path(spec)
    found = split_rows(plugins.module_of("dataset", spec).load(spec), spec.split)
    written, unreadable = 0, 0
    for name, (source, rows) in found.items():
        kept, pixels, boxes = _read_sample(
            source, rows[np.unique(np.linspace(0, len(rows) - 1, count).astype(np.int64))], spec.size
        )
        if not len(kept):
            raise ValueError(f"of {min(count, len(rows))} images of the {name} split none can be read")
        np.save(out / f"{name}.npy", pixels)
        write_metadata(out, name, source, kept, boxes)
        written += len(kept)
        unreadable += min(count, len(rows)) - len(kept)
    summary = {"size": spec.size, "streamed": False, "splits": list(found), "unreadable": []}
    (out / "splits.json").write_text(json.dumps(summary, indent=1))
    return {"count": float(written), "unreadable": float(unreadable)}


def _read_sample(
    source: Source, rows: NDArray[np.int64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8], list[NDArray[np.float32]]]:
    """The rows (n,) that can be read, their squares (n, size, size, 3) and, where there are any, their boxes."""
    kept, squares, boxes = [], [], []
    for row in rows:
        with contextlib.suppress(Unreadable):
            pixels = source.read(int(row))
            kept.append(int(row))
            squares.append(fit(pixels, size))
            if source.boxes is not None:
                boxes.append(fit_boxes(source.boxes[row], pixels.shape[0], pixels.shape[1], size))
    return np.array(kept, np.int64), np.array(squares, np.uint8), boxes
