"""Fashion-MNIST: 60,000 + 10,000 grey images of clothes, 28 x 28, ten classes.

Reads torchvision's folder, or the same four idx files in one folder, compressed or not (Debian's package
`dataset-fashion-mnist` installs them in /usr/share/datasets/fashion-mnist).

Source: Xiao, Rasul, Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017.
"""

from __future__ import annotations

import gzip
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ktray.errors import UserError
from ktray.images import Source, Splits, data_folder, download
from ktray.spec import Split
from ktray.strict import StrictSpec

REVISION = 1
LOCATION: tuple[str, ...] = ("path", "download")
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class Spec(StrictSpec):
    """`path` contains `FashionMNIST/raw/` or the idx files themselves; null means KTRAY_DATA or ./data."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"
    path: str | None = None
    download: bool = Field(default=False, description="let torchvision download missing files")
    size: int = Field(default=28, ge=8, le=2048, description="side in pixels to which images are resized")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")


def load(spec: Spec) -> Splits:
    """Find the files and read the labels; pixels are decompressed when the first image is read.

    Raises:
        UserError: files are missing, or could not be downloaded.
    """
    root = data_folder(spec.path)
    if _file(root, "train-images-idx3-ubyte") is None and spec.download:
        download("FashionMNIST", root)
    files = {name: _file(root, name) for part in ("train", "t10k") for name in _names(part)}
    missing = [name for name, path in files.items() if path is None]
    if missing:
        raise UserError(
            f"Fashion-MNIST is not in {root}: {missing[0]} is missing",
            where="data.path",
            instead="Set 'download: true', or put the four idx files there, compressed or not; on Debian: apt install "
            "dataset-fashion-mnist, path: /usr/share/datasets/fashion-mnist.",
        )
    present = {name: path for name, path in files.items() if path is not None}
    sources = {part: _source(part, *(present[name] for name in _names(part))) for part in ("train", "t10k")}
    return Splits(train=sources["train"], test=sources["t10k"], files=tuple(sorted(present.items())))


def _names(part: str) -> tuple[str, str]:
    return f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"


def _file(root: Path, name: str) -> Path | None:
    folders = (root / "FashionMNIST" / "raw", root)
    candidates = [folder / f"{name}{suffix}" for folder in folders for suffix in ("", ".gz")]
    return next((path for path in candidates if path.is_file()), None)


def _source(part: str, images: Path, labels: Path) -> Source:
    numbers = _idx(labels).astype(np.int64)
    pixels = cache(lambda: _idx(images))
    return Source(
        names=tuple(f"{part}/{index:05d}" for index in range(len(numbers))),
        read=lambda index: np.repeat(pixels()[index][:, :, None], 3, axis=2),
        labels=numbers,
        classes=CLASSES,
    )


def _idx(path: Path) -> NDArray[np.uint8]:
    """The array in an idx file: two zero bytes, 8 (uint8), the number of axes, their lengths (big-endian int32), the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        axes = content[3]
        shape = np.frombuffer(content, ">i4", count=axes, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged: {error}", instead="Remove it and fetch it again.") from error
