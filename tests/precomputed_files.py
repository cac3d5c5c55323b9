"""A folder of noise and files of ready-made features for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

from ktray import plugins
from tests.pictures import noise

COUNT, WIDTH = 40, 6


def photos(root: Path, count: int = COUNT, seed: int = 0) -> dict[str, Any]:
    """A folder of images in two folders, as a data set."""
    for index in range(count):
        path = root / f"{'ab'[index % 2]}/{index:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(28, 28, seed=seed + index)).save(path)
    return {"kind": "folder", "path": str(root), "size": 28}


def paths(data: dict[str, Any]) -> list[str]:
    """Paths of the training images, before a part is held out."""
    return list(plugins.module("dataset", data["kind"]).load(plugins.parse("dataset", data)).train.names)


def numbers(count: int = COUNT, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, WIDTH)).astype(np.float32)


def npy(at: Path, values: np.ndarray, names: list[str] | None) -> dict[str, Any]:
    at.mkdir(parents=True, exist_ok=True)
    np.save(at / "clip.npy", values)
    if names is None:
        return {"features": str(at / "clip.npy")}
    (at / "clip.txt").write_text("\n".join(names) + "\n")
    return {"features": str(at / "clip.npy"), "names": str(at / "clip.txt")}


def npy_names(at: Path, values: np.ndarray, names: list[str]) -> dict[str, Any]:
    npy(at, values, None)
    np.save(at / "names.npy", np.array(names))
    return {"features": str(at / "clip.npy"), "names": str(at / "names.npy")}


def table(at: Path, values: np.ndarray, names: list[str], fixed: bool = False) -> dict[str, Any]:
    at.mkdir(parents=True, exist_ok=True)
    kind = pyarrow.list_(pyarrow.float32(), values.shape[1]) if fixed else pyarrow.list_(pyarrow.from_numpy_dtype(values.dtype))
    columns = {"image": names, "clip": pyarrow.array(list(values), kind)}
    parquet.write_table(pyarrow.table(columns), at / "clip.parquet", row_group_size=7)
    return {"features": str(at / "clip.parquet"), "columns": {"path": "image", "features": "clip"}}
