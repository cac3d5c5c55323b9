"""Make the sheets of `fashion_mnist_mini` from the whole Fashion-MNIST.

python -m ktray.datasets.fashion_mnist_mini.build /usr/share/datasets/fashion-mnist    (Debian: dataset-fashion-mnist)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ktray import plugins
from ktray.datasets.fashion_mnist_mini import COLUMNS, SIDE
from ktray.images import Source

PER_CLASS = {"train": 600, "test": 100}


def first_of_each_class(source: Source, count: int) -> list[int]:
    """Ascending indices of the first `count` images of every class."""
    assert source.labels is not None
    chosen = [np.flatnonzero(source.labels == label)[:count] for label in range(len(source.classes))]
    return sorted(int(index) for of_class in chosen for index in of_class)


def build(path: str, out: Path) -> None:
    """Write `train.png`, `test.png` and `labels.json` into `out`; a sheet's last row is filled up with black tiles."""
    module = plugins.module("dataset", "fashion_mnist")
    splits = module.load(module.Spec(path=path))
    described: dict[str, object] = {"classes": splits.train.classes}
    for split, count in PER_CLASS.items():
        source = getattr(splits, split)
        chosen = first_of_each_class(source, count)
        rows = -(-len(chosen) // COLUMNS)
        tiles = np.zeros((rows * COLUMNS, SIDE, SIDE), np.uint8)
        tiles[: len(chosen)] = [source.read(index)[:, :, 0] for index in chosen]
        sheet = tiles.reshape(rows, COLUMNS, SIDE, SIDE).swapaxes(1, 2).reshape(rows * SIDE, COLUMNS * SIDE)
        Image.fromarray(sheet).save(out / f"{split}.png", optimize=True)
        described[split] = "".join(str(source.labels[index]) for index in chosen)
    (out / "labels.json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    build(sys.argv[1], Path(__file__).parent)
