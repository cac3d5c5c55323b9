"""Places365-Standard: 1,803,460 photographs of 365 kinds of places to train on, 36,500 to judge on.

In folders of classes (`train/airfield`, `val/airfield`, the form for PyTorch), or as the official archives unpack:
`data_256/a/airfield` or `data_large/a/airfield`, `val_256` or `val_large`, with the lists `places365_train_standard.txt`,
`places365_val.txt` and `categories_places365.txt`. Classes are numbered as in `categories_places365.txt`.

Source: Zhou, Lapedriza, Khosla, Oliva, Torralba, Places: A 10 Million Image Database for Scene Recognition, TPAMI 2018.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from ktray.errors import UserError
from ktray.images import MAX_PIXELS, Layout, MaxPixels, Splits, annotation_files, class_folders, data_folder
from ktray.images.class_folders import Labelled
from ktray.images.folder_tree import ORDER, WHERE
from ktray.spec import Split
from ktray.strict import StrictSpec
from ktray.text import counted

REVISION = 1
LOCATION: tuple[str, ...] = ("path",)
_CATEGORIES = "categories_places365.txt"
_LISTS = {"train": "places365_train_standard.txt", "val": "places365_val.txt"}
_FOLDERS = {
    "train": ("data_256_standard", "data_large_standard", "data_256", "data_large"),
    "val": ("val_256", "val_large"),
}


class Spec(StrictSpec):
    """`path` holds `train` and `val` with folders of classes, or the official lists and folders. Judged on `val`."""

    kind: Literal["places365"] = "places365"
    path: str
    size: int = Field(default=224, ge=8, le=2048, description="side in pixels to which images are resized")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")
    max_pixels: MaxPixels = MAX_PIXELS


def load(spec: Spec) -> Splits:
    """List the images; val is the test split, and a share of train is held out to choose by.

    Raises:
        UserError: neither form is there, a list is wrong, or an image of a list is missing.
    """
    root = data_folder(spec.path)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}", WHERE, "Give the folder that holds train and val, or the official lists.")
    official = _list_place(root)
    if official is not None:
        return _from_lists(root, official, spec)
    if not (root / "train").is_dir():
        raise UserError(
            f"{root} has neither a folder train nor {_CATEGORIES}",
            WHERE,
            "Unpack places365standard_easyformat.tar there, or the archives with the list of files.",
        )
    return _from_folders(root, spec)


def _list_place(root: Path) -> Path | None:
    """The folder of the official lists; None for folders of classes."""
    for place in (root, root / "filelist_places365-standard"):
        if (place / _CATEGORIES).is_file() and any((root / folder).is_dir() for folder in _FOLDERS["train"]):
            return place
    return None


def _from_folders(root: Path, spec: Spec) -> Splits:
    train, left_out = class_folders.in_class_folders(root, "train", depth=3)
    listed = sorted({image.label for image in train})
    val = class_folders.in_class_folders(root, "val", depth=3)[0] if (root / "val").is_dir() else []
    class_folders.refuse_unknown_classes((image.label for image in val), listed, str(root / "val"))
    return _splits(
        {"train": train, "test": val},
        {"train": "train", "test": "val"},
        listed,
        "the folders of train, numbered in the order of their text",
        ORDER,
        left_out,
        spec,
    )


def _from_lists(root: Path, lists: Path, spec: Spec) -> Splits:
    classes = _categories(lists / _CATEGORIES)
    found, read_from, warnings = dict[str, list[Labelled]](), dict[str, str](), list[str]()
    for part, split in (("train", "train"), ("val", "test")):
        folder = next((name for name in _FOLDERS[part] if (root / name).is_dir()), None)
        file = lists / _LISTS[part]
        if folder is None and part == "val":
            found[split] = []
            continue
        if not file.is_file() or folder is None:
            raise UserError(f"there is no {file}", WHERE, "Unpack filelist_places365-standard.tar there.")
        images, wrong, total = _listed(root / folder, folder, file, classes)
        if not images:
            raise UserError(
                f"none of the {counted(total, 'image')} of {file.name} is in {root / folder}", WHERE, "Unpack them there."
            )
        warnings += annotation_files.left_out(split, wrong, total, spec.max_unreadable)
        found[split], read_from[split] = images, file.name
    order = "as in the lists"
    return _splits(found, read_from, classes, _CATEGORIES, order, {}, spec, warnings)


def _splits(
    images: dict[str, list[Labelled]],
    read_from: dict[str, str],
    classes: Sequence[str],
    classes_from: str,
    order: str,
    left_out: dict[str, int],
    spec: Spec,
    warnings: Sequence[str] = (),
) -> Splits:
    sources = {split: class_folders.labelled_source(each, classes, {}, spec) for split, each in images.items() if each}
    said = [*warnings, *(["there are no images of val, so that nothing is there to test on"] if "test" not in sources else [])]
    layout = Layout(
        read_from={split: {read_from[split]: len(images[split])} for split in sources},
        classes=classes_from,
        order=order,
        left_out=left_out,
        warnings=tuple(said),
    )
    files = tuple((image.name, image.path) for each in images.values() for image in each)
    return Splits(sources["train"], test=sources.get("test"), files=files, layout=layout)


def _categories(file: Path) -> list[str]:
    """The names of the classes in the order of their numbers: ``airport/entrance`` for `/a/airport/entrance`."""
    found: list[str] = []
    for line in annotation_files.read_list(file):
        name = line.words[0]
        if len(line.words) != 2 or line.words[1] != str(len(found)) or name[:1] != "/" or name[2:3] != "/" or name[3:] in found:
            raise UserError(
                f"{file.name}, line {line.number}: {' '.join(line.words)[:60]!r} is not a class with the number {len(found)}",
                WHERE,
                "Restore the file.",
            )
        found.append(name[3:])
    if not found:
        raise UserError(f"{file} is empty", WHERE, "Restore it.")
    return found


def _listed(place: Path, folder: str, file: Path, classes: Sequence[str]) -> tuple[list[Labelled], dict[str, str], int]:
    """The images of a list, those that are missing with the reason, and how many lines there are."""
    tree = annotation_files.files_below(place)
    images, wrong, names, places = [], dict[str, str](), [], []
    for line in annotation_files.read_list(file):
        at = f"{file.name}, line {line.number}"
        number = int(line.words[1]) if len(line.words) == 2 and line.words[1].isdecimal() else -1
        if not 0 <= number < len(classes):
            raise UserError(f"{at}: no name and number of a class below {len(classes)}", WHERE, "Restore the file.")
        name = line.words[0].removeprefix("/")
        annotation_files.refuse_name(name, at)
        if "/" in name and name.rpartition("/")[0][2:] != classes[number]:
            problem = f"{at}: {name} lies in the folder of another class than {classes[number]!r}, the number {number}"
            raise UserError(problem, WHERE, "Restore the file.")
        names.append(name)
        places.append(at)
        if name in tree:
            images.append(Labelled(f"{folder}/{name}", place / name, classes[number]))
        else:
            wrong[name] = f"{at}: {folder} has no {name}"
    if not names:
        raise UserError(f"the list {file} is empty", WHERE, "Restore it.")
    annotation_files.refuse_twice(names, places)
    return images, wrong, len(names)
