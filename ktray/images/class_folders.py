"""Labelled images in one folder per class, as ImageNet and Places keep their training images, and flat folders with a list."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ktray.errors import UserError
from ktray.images import folder_tree
from ktray.images.decoding import decoder
from ktray.images.folder_tree import WHERE, ImageFile, shown
from ktray.images.source import Source
from ktray.text import as_read, counted, written_differently


@dataclass(frozen=True)
class Labelled:
    """An image with the folder or name of its class.

    Attributes:
        name: relative to the root of the data set, with `/`.
        path: of the file.
        label: the folder of its class, such as ``n01440764``.
    """

    name: str
    path: Path
    label: str


def in_class_folders(root: Path, below: str, depth: int = 1) -> tuple[list[Labelled], dict[str, int]]:
    """The images of a split in folders of classes, in the order of torchvision's ImageFolder, and what was left out.

    Args:
        root: of the data set.
        below: folder of the split, such as ``train``.
        depth: how many folders name a class, at most; it ends at the folder with images.

    Raises:
        UserError: there is no such folder, it has no images, or some lie outside every class folder.
    """
    tree = folder_tree.read_tree(root / below)
    if not tree.images:
        raise UserError(
            f"there are no image files in {root / below}{folder_tree.but_others(tree)}", WHERE, "Unpack the images there."
        )
    files = folder_tree.in_order(tree, 0)
    if outside := [file for file in files if not file.folders]:
        raise UserError(
            f"images of {root / below} lie outside every class folder: {len(outside)}, such as {outside[0].name}",
            WHERE,
            "Move them into the folders of their classes.",
        )
    return [_labelled(file, below, depth) for file in files], tree.all_left_out()


def _labelled(file: ImageFile, below: str, depth: int) -> Labelled:
    return Labelled(f"{below}/{file.name}", file.path, shown("/".join(file.folders[:depth])))


def has_class_folders(root: Path, below: str) -> bool:
    """Whether the folder of a split has folders with images, rather than images alone."""
    return bool(folder_tree.read_tree(root / below).with_images())


def by_name(root: Path, below: str) -> dict[str, Path]:
    """Name -> file of the images that lie directly in a folder of the data set.

    Raises:
        UserError: the folder cannot be read.
    """
    tree = folder_tree.read_tree(root / below)
    return {file.path.name: file.path for file in tree.files}


def refuse_unknown_classes(found: Iterable[str], classes: Sequence[str], place: str) -> None:
    """Refuse classes without training images, first the one that a person reads as a known one.

    Args:
        found: classes of the images to judge on.
        classes: those of the training images.
        place: of the images to judge on, such as ``/photos/val``.

    Raises:
        UserError: it names the class, and the one that it looks like.
    """
    alike = {as_read(name): name for name in classes}
    unknown = sorted(set(found) - set(classes), key=lambda name: (as_read(name) not in alike, name))
    if not unknown:
        return
    first, more = unknown[0], f" (and {counted(len(unknown) - 1, 'other')})" if len(unknown) > 1 else ""
    known = alike.get(as_read(first))
    raise UserError(
        f"the class {first!r}{more} in {place} has no training images",
        WHERE,
        f"Name it {known!r}, as in the training images: {written_differently(first, known)}."
        if known
        else "Give it some, or remove it.",
    )


def labelled_source(images: Sequence[Labelled], classes: Sequence[str], names: Mapping[str, str], spec: Any) -> Source:
    """The images as a source, with classes numbered in the order of `classes`.

    Args:
        names: folder of a class -> name to show; folders without one are shown themselves.
    """
    numbers, read = {label: number for number, label in enumerate(classes)}, decoder(spec)
    paths = [image.path for image in images]
    return Source(
        names=tuple(image.name for image in images),
        read=lambda index: read(paths[index]),
        labels=np.array([numbers[image.label] for image in images], np.int64),
        classes=tuple(names.get(label, label) for label in classes),
        original=lambda index: paths[index],
    )
