"""Image files in one folder per class, optionally below folders of splits such as train, val and test.

The outermost of the other folders names the class; images may be nested deeper. Words of splits are those of
`ktray.images.split_words`: `Training`, `seg_train`, `valid`.

Source: your own files, in the layout of `torchvision.datasets.ImageFolder`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from ktray.errors import UserError
from ktray.images import (
    MAX_PIXELS,
    Layout,
    MaxPixels,
    PixelRange,
    Recognised,
    Source,
    Splits,
    class_folders,
    data_folder,
    decoder,
    folder_tree,
)
from ktray.images.folder_tree import WHERE, Folder, ImageFile, shown
from ktray.spec import Split
from ktray.strict import StrictSpec

REVISION = 1
LOCATION: tuple[str, ...] = ("path",)


class Spec(StrictSpec):
    """Labelled images. If all outermost folders are named like splits, they are splits, and their folders the classes."""

    kind: Literal["imagefolder"] = "imagefolder"
    path: str
    size: int = Field(default=64, ge=8, le=2048, description="side in pixels to which images are resized")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")
    max_pixels: MaxPixels = MAX_PIXELS
    range: PixelRange = None


def load(spec: Spec) -> Splits:
    """List the folders; classes are the sorted names of the folders with training images.

    Raises:
        UserError: the folder does not exist or has no training images, an image lies outside a class folder, a class has no
            training images or none that ktray reads, or it is not clear which folders are splits.
    """
    root = data_folder(spec.path)
    tree = folder_tree.read_tree(root)
    if not tree.images:
        raise UserError(
            f"there are no image files in {root}{folder_tree.but_others(tree)}",
            where=WHERE,
            instead="Expected are files such as CLASS/NAME.jpg.",
        )
    folders = folder_tree.split_folders(tree, root, labelled=True)
    for of_split in folders.values():
        _refuse_wrong_classes(tree.at(of_split), root.joinpath(*of_split))
    classes = tuple(tree.at(folders["train"]).with_images())
    files, sources = {}, {}
    for split, of_split in folders.items():
        files[split] = folder_tree.in_order(tree.at(of_split), len(of_split))
        found = map(shown, tree.at(of_split).with_images())
        class_folders.refuse_unknown_classes(found, [*map(shown, classes)], shown(str(root.joinpath(*of_split))))
        sources[split] = _source(files[split], len(of_split), classes, spec)
    layout = Layout(
        read_from=folder_tree.read_from(tree, folders) if len(folders) > 1 or folders["train"] else {},
        classes=_numbering(classes),
        order=folder_tree.ORDER,
        left_out=tree.all_left_out(),
        warnings=(*folder_tree.warnings_about(tree, files), *_warnings(tree, folders)),
        nested=_nested(tree.at(folders["train"]), root.joinpath(*folders["train"])),
    )
    listed = tuple((file.name, file.path) for of_split in files.values() for file in of_split)
    return Splits(sources["train"], sources.get("val"), sources.get("test"), files=listed, layout=layout)


_LEAST_OF_CLASS = 2  # images, in most folders, for folders to be taken for classes
_NO_CLASS = re.compile(
    r"\d{2,4}([ _.-]?\d\d){0,2}|\d{3}[a-z]{5}|(img|dsc|dcim|day|week|roll|part|batch|set)?[ _-]?\d*", re.IGNORECASE
)


def recognise(path: Path) -> Recognised | None:
    """Folders of images that may be classes: at least two, with several images in most, and not all named by dates or numbers.

    Raises:
        UserError: folders are named like splits, and it is not clear which images belong to which.
    """
    if not path.is_dir() or not (tree := folder_tree.read_tree(path)).images:
        return None
    if around := folder_tree.nested_classes(tree):
        return recognise(path.joinpath(*around))
    train = tree.at(folder_tree.split_folders(tree, path, labelled=True)["train"])
    found = train.with_images()
    counts = sorted(folder.images for folder in found.values())
    if train.files or len(found) < 2 or counts[len(counts) // 2] < _LEAST_OF_CLASS:
        return None
    if all(_NO_CLASS.fullmatch(name) for name in found) and not _are_numbered_from_zero_or_one(found):
        return None
    return Recognised({"path": str(path)}, f"{len(found)} folders that hold images, taken for classes", 1)


def _are_numbered_from_zero_or_one(names: Collection[str]) -> bool:
    """Whether the names are 0, 1, 2, ... or 1, 2, 3, ..., as exported classes are."""
    numbers = sorted(int(name) for name in names if name.isdecimal())
    return numbers[:1] in ([0], [1]) and numbers == [*range(numbers[0], numbers[0] + len(names))]


def _source(files: Sequence[ImageFile], depth: int, classes: tuple[str, ...], spec: Spec) -> Source:
    numbers = {label: number for number, label in enumerate(classes)}
    read, original = decoder(spec), folder_tree.paths(files)
    return Source(
        names=tuple(file.name for file in files),
        read=lambda index: read(original(index)),
        labels=np.array([numbers[file.folders[depth]] for file in files], np.int64),
        classes=tuple(map(shown, classes)),
        original=original,
    )


def _refuse_wrong_classes(folder: Folder, place: Path) -> None:
    """Refuse images outside class folders, classes that ktray reads nothing of, and class folders that hold splits."""
    if folder.files:
        first = min(file.name for file in folder.files)
        raise UserError(
            f"images of {shown(str(place))} lie outside every class folder: {len(folder.files)}, such as {first}",
            where=WHERE,
            instead="Move them into one, or away, or use the kind 'folder' for images without labels.",
        )
    for name, each in sorted(folder.subfolders.items()):
        if not each.images and each.all_unread():
            raise UserError(
                f"the class {shown(name)!r} in {shown(str(place))} would be empty{folder_tree.but_others(each)}",
                where=WHERE,
                instead="Convert its images to JPEG or PNG, or move its folder away.",
            )
    folder_tree.refuse_splits_below(folder, place)


def _numbering(classes: tuple[str, ...]) -> str:
    """Where the classes come from, as a phrase."""
    text = "the names of folders, numbered in the order of their text, as in torchvision's ImageFolder"
    if all(name.isdecimal() for name in classes) and [*map(int, classes)] != sorted(map(int, classes)):
        return f"{text}: {shown(classes[1])!r} is number 1, {shown(classes[2])!r} number 2"
    return text


def _nested(folder: Folder, place: Path) -> str:
    around = folder_tree.nested_classes(folder)
    return shown(str(place.joinpath(*around))) if around else ""


def _warnings(tree: Folder, folders: dict[str, tuple[str, ...]]) -> list[str]:
    """Sentences about folders without images, and about classes that seem to lie one folder deeper."""
    found = []
    for folder in map(tree.at, folders.values()):
        empty = [shown(name) for name, each in sorted(folder.subfolders.items()) if not each.images]
        if empty:
            found.append(
                f"folders without images are no classes: {', '.join(map(repr, empty[:5]))}{', ...' * (len(empty) > 5)}"
            )
    train = tree.at(folders["train"])
    around, classes = folder_tree.nested_classes(train), train.with_images()
    if around:
        inside = [shown(name) for name in train.at(around).with_images()]
        found.append(
            f"all images lie in {'/'.join(map(shown, around))!r}, whose folders look like the classes: {', '.join(inside[:5])}"
        )
    below = [set(each.with_images()) for each in classes.values()]
    if len(classes) > 1 and len(shared := set.intersection(*below)) > 1 and not any(each.files for each in classes.values()):
        names = ", ".join(repr(shown(name)) for name in sorted(shared)[:5])
        found.append(f"every class folder holds the folders {names}, which look like classes themselves")
    return found
