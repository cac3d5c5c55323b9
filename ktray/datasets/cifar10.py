"""CIFAR-10: 50,000 + 10,000 colour images, 32 x 32, ten classes.

Reads the folder `cifar-10-batches-py`, as torchvision does, or the binary version, `cifar-10-batches-bin`. CIFAR-10 from a
data-set hub is usually stored as parquet: use the kind `parquet`.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import pickletools
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ktray.errors import UserError
from ktray.fingerprint import FileVersion, file_version
from ktray.images import Source, Splits, data_folder, download
from ktray.spec import Split
from ktray.strict import StrictSpec

REVISION = 1
LOCATION: tuple[str, ...] = ("path", "download")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_PIXELS = 3 * 32 * 32
_LAYOUTS = {"cifar-10-batches-py": "", "cifar-10-batches-bin": ".bin"}


class Spec(StrictSpec):
    """`path` contains `cifar-10-batches-py/` or `-bin/`, or is that folder; null means KTRAY_DATA or ./data."""

    kind: Literal["cifar10"] = "cifar10"
    path: str | None = None
    download: bool = Field(default=False, description="let torchvision download missing files")
    size: int = Field(default=32, ge=8, le=2048, description="side in pixels to which images are resized")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")


def load(spec: Spec) -> Splits:
    """Find the six batches and read them.

    Raises:
        UserError: the batches are missing or damaged, or could not be downloaded.
    """
    root = data_folder(spec.path)
    batches = _batches(root)
    if not batches and spec.download:
        download("CIFAR10", root)
        batches = _batches(root)
    if not batches:
        raise UserError(
            f"CIFAR-10 is not in {root}",
            where="data.path",
            instead="Set 'download: true', or unpack cifar-10-python.tar.gz or cifar-10-binary.tar.gz there.",
        )
    return Splits(
        train=_source("train", batches[:5]),
        test=_source("test", batches[5:]),
        files=tuple((path.name, path) for path in batches),
    )


def _batches(root: Path) -> list[Path]:
    """The five training batches and the test batch; an empty list if any is missing."""
    for layout, suffix in _LAYOUTS.items():
        for folder in (root / layout, root):
            paths = [folder / f"{name}{suffix}" for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")]
            if all(path.is_file() for path in paths):
                return paths
    return []


def _source(name: str, paths: list[Path]) -> Source:
    batches = [_batch(path, file_version(path.stat())) for path in paths]
    starts = np.cumsum([0, *(len(labels) for labels, _ in batches)])

    def read(index: int) -> NDArray[np.uint8]:
        batch = int(np.searchsorted(starts, index, side="right")) - 1
        return np.ascontiguousarray(batches[batch][1][index - starts[batch]].reshape(3, 32, 32).transpose(1, 2, 0))

    return Source(
        names=tuple(f"{name}/{index:05d}" for index in range(starts[-1])),
        read=read,
        labels=np.concatenate([labels for labels, _ in batches]),
        classes=CLASSES,
    )


@lru_cache(maxsize=6)
def _batch(path: Path, version: FileVersion) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Labels (n,) and pixels (n, 3072), channels first, of one batch; cached, because a data set is loaded more than once."""
    try:
        content = path.read_bytes()
        labels, pixels = _parse_binary(content) if path.suffix == ".bin" else _parse_pickle(content)
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"{path} is damaged: {error}", instead="Remove it and fetch it again.") from error
    if len(labels) != len(pixels) or not len(labels) or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise UserError(f"{path} is not a CIFAR-10 batch", instead="Remove it and fetch it again.")
    return labels, pixels


def _parse_binary(content: bytes) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Parse the binary version: each row is one byte of label and 3072 bytes of pixels."""
    rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + _PIXELS)
    return rows[:, 0].astype(np.int64), rows[:, 1:]


def _parse_pickle(content: bytes) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Parse a pickled batch without unpickling it: the pixels are its longest string, the labels small integers.

    `pickletools.genops` only disassembles, so a manipulated file can yield wrong pixels but cannot run code.
    """
    labels: list[int] = []
    longest: str | bytes | bytearray = b""
    in_labels = False
    for opcode, argument, _ in pickletools.genops(content):
        if isinstance(argument, str | bytes | bytearray):
            in_labels = argument in ("labels", b"labels")
            longest = max(longest, argument, key=len)
        elif in_labels and opcode.name.startswith("BININT") and isinstance(argument, int):
            labels.append(argument)
    pixels = longest.encode("latin-1") if isinstance(longest, str) else longest
    return np.array(labels, np.int64), np.frombuffer(pixels, np.uint8).reshape(-1, _PIXELS)
