"""7,000 real images of Fashion-MNIST that come with ktray: 600 per class to train, 100 to test, 28 x 28 grey.

The first images of each class of either split of the whole set, in its order, as one lossless sheet per split; `build.py` made
them. Nothing is downloaded.

Source: Xiao, Rasul, Vollgraf, Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms, 2017 (MIT,
see LICENSE beside this file).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from ktray.images import Source, Splits
from ktray.spec import Split
from ktray.strict import StrictSpec

REVISION = 1
LOCATION: tuple[str, ...] = ()
SIDE = 28
COLUMNS = 60
_HERE = Path(__file__).parent
_FILES = ("labels.json", "test.png", "train.png")


class Spec(StrictSpec):
    """The embedded images; 28 keeps the pixels as they are."""

    kind: Literal["fashion_mnist_mini"] = "fashion_mnist_mini"
    size: int = Field(default=SIDE, ge=8, le=2048, description="side in pixels that images are decoded to")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="share")


def load(spec: Spec) -> Splits:
    """The sources of train (6,000) and test (1,000)."""
    described = json.loads((_HERE / "labels.json").read_text())
    sources = {
        split: Source(
            names=tuple(f"{split}/{index:04d}" for index in range(len(described[split]))),
            read=lambda index, split=split: np.repeat(_tiles(split)[index][:, :, None], 3, axis=2),  # type: ignore[misc]
            labels=np.array([int(digit) for digit in described[split]], np.int64),
            classes=tuple(described["classes"]),
        )
        for split in ("train", "test")
    }
    return Splits(train=sources["train"], test=sources["test"], files=tuple((name, _HERE / name) for name in _FILES))


@lru_cache(maxsize=2)
def _tiles(split: str) -> NDArray[np.uint8]:
    """All images (N, 28, 28) of a split, cut out of its sheet row by row."""
    sheet = np.asarray(Image.open(_HERE / f"{split}.png"))
    return sheet.reshape(-1, SIDE, COLUMNS, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE)
