"""A few images of a data set, laid down like all of them: what a rehearsal of the stages reads."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ktray import plugins
from ktray.images.decoding import fit, fit_boxes
from ktray.images.listing import with_absolute_path
from ktray.images.source import Source, Unreadable
from ktray.images.splitting import split_rows
from ktray.images.writing import write_metadata


def write_sample(spec: Any, out: Path, count: int) -> dict[str, float]:
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
        kept, pixels, boxes = _read(source, rows[np.unique(np.linspace(0, len(rows) - 1, count).astype(np.int64))], spec.size)
        if not len(kept):
            raise ValueError(f"of {min(count, len(rows))} images of the {name} split none can be read")
        np.save(out / f"{name}.npy", pixels)
        write_metadata(out, name, source, kept, boxes)
        written += len(kept)
        unreadable += min(count, len(rows)) - len(kept)
    summary = {"size": spec.size, "streamed": False, "splits": list(found), "unreadable": []}
    (out / "splits.json").write_text(json.dumps(summary, indent=1))
    return {"count": float(written), "unreadable": float(unreadable)}


def _read(
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
