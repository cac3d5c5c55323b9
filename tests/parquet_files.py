"""Parquet files of small images whose colour is their class, so that Pillow can say which class a row is."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image
from pyarrow import parquet

from ktray.images import Splits
from tests.pictures import png

COLOURS = {"zebra": (200, 0, 0), "ape": (0, 200, 0), "cow": (0, 0, 200), "dog": (200, 200, 0)}
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
CLASSES = ["zebra", "ape", "cow"]


@cache
def image_of(name: str) -> bytes:
    return png(np.full((8, 8, 3), COLOURS[name], np.uint8))


def hub(names: Any, column: str = "label") -> dict[str, Any]:
    """Metadata as the library `datasets` writes it, with these names of classes."""
    return {"info": {"features": {"image": {"_type": "Image"}, column: {"names": names, "_type": "ClassLabel"}}}}


def write_classes(
    path: Path, classes: Sequence[str], labels: Any = None, metadata: Any = None, more: dict[str, Any] | None = None
) -> Path:
    """A file with an image of each class; `labels` is an Arrow array or a list, `metadata` JSON or bytes."""
    columns = {"image": pa.array([{"bytes": image_of(name), "path": None} for name in classes], IMAGE), **(more or {})}
    if labels is not None:
        columns["label"] = labels if isinstance(labels, pa.Array | pa.ChunkedArray) else pa.array(labels)
    table = pa.table(columns)
    if metadata is not None:
        raw = metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode()
        table = table.replace_schema_metadata({b"huggingface": raw})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path)
    return path


def colours(path: Path) -> list[str]:
    """The class of each row of a file, which pyarrow reads and Pillow decodes."""
    of_colour = {colour: name for name, colour in COLOURS.items()}
    rows = parquet.read_table(path, columns=["image"]).column(0).to_pylist()
    return [of_colour[Image.open(io.BytesIO(row["bytes"])).getpixel((4, 4))] for row in rows]


def named_labels(splits: Splits, split: str, root: Path, rename: dict[str, str] | None = None) -> tuple[list[str], list[str]]:
    """What ktray calls each image of a split, and what its colour says."""
    source = getattr(splits, split)
    oracle = {name: colours(root / name) for name in splits.layout.read_from[split]}
    rows = [name.rsplit("#", 1) for name in source.names]
    said = [source.classes[label] for label in source.labels]
    return said, [(rename or {}).get(name, name) for name in (oracle[file][int(row)] for file, row in rows)]
