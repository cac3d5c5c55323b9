"""Image files in one folder per class, optionally under folders train, val and test.

The outermost of the other folders names the class; images may be nested deeper.

Source: your own files, in the layout of `torchvision.datasets.ImageFolder`.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from ktray.errors import UserError
from ktray.images import Source, Splits, data_folder, decode, list_images
from ktray.spec import Split
from ktray.strict import StrictSpec

REVISION = 1
LOCATION: tuple[str, ...] = ("path",)
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Spec(StrictSpec):
    """Labelled images. If there is a folder `train`, then `val` (or `valid`, `validation`) and `test` are splits too."""

    kind: Literal["imagefolder"] = "imagefolder"
    path: str
    size: int = Field(default=64, ge=8, le=2048, description="side in pixels to which images are resized")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")


def load(spec: Spec) -> Splits:
    """List the folders; classes are the sorted names of the folders with training images.

    Raises:
        UserError: the folder does not exist or has no training images, an image lies outside a class folder, or a class has no
            training images.
    """
    root = data_folder(spec.path)
    files = list_images(root)
    has_splits = (root / "train").is_dir()
    by_split: dict[str, list[tuple[str, str, Path]]] = defaultdict(list)
    for name, path in files:
        split, label = _split_and_class(name, root, has_splits)
        by_split[split].append((label, name, path))
    if not by_split["train"]:
        raise UserError(f"there are no training images in {root}", instead="Expected are files such as CLASS/NAME.jpg.")
    classes = tuple(sorted({label for label, _, _ in by_split["train"]}))
    sources = {split: _source(entries, classes, spec.size, root) for split, entries in by_split.items()}
    return Splits(train=sources["train"], val=sources.get("val"), test=sources.get("test"), files=files)


def _split_and_class(name: str, root: Path, has_splits: bool) -> tuple[str, str]:
    """Split and class of the image with this relative path."""
    folders = name.split("/")[:-1]
    if has_splits and (not folders or folders[0] not in _SPLITS):
        raise UserError(
            f"{root / name} belongs to no split, although {root} has a folder 'train'",
            instead=f"The folders of splits are: {', '.join(_SPLITS)}.",
        )
    split = _SPLITS[folders.pop(0)] if has_splits else "train"
    if not folders:
        raise UserError(
            f"{root / name} lies outside every class folder",
            instead="Move it into one, or use the kind 'folder' for images without labels.",
        )
    return split, folders[0]


def _source(entries: list[tuple[str, str, Path]], classes: tuple[str, ...], size: int, root: Path) -> Source:
    numbers = {label: number for number, label in enumerate(classes)}
    unknown = {label for label, _, _ in entries} - set(classes)
    if unknown:
        raise UserError(f"the class {min(unknown)!r} in {root} has no training images", instead="Give it some, or remove it.")
    return Source(
        names=tuple(name for _, name, _ in entries),
        read=lambda index: decode(entries[index][2], size),
        labels=np.array([numbers[label] for label, _, _ in entries], np.int64),
        classes=classes,
    )
