"""ImageNet (ILSVRC 2012): 1,281,167 photographs of 1,000 classes to train on, 50,000 to judge on. Also a part of the classes.

`train` has a folder per class, named by its WordNet number such as `n01440764`. `val` has such folders, too, or is flat as it
comes; its classes are then read from the development kit (`ILSVRC2012_validation_ground_truth.txt` and `meta.mat`), from
`LOC_val_solution.csv`, or from a list of names with numbers from 0 (`val.txt`). Classes are numbered by their WordNet numbers,
as in torchvision.

Source: Russakovsky et al., ImageNet Large Scale Visual Recognition Challenge, IJCV 2015.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from ktray.errors import UserError
from ktray.images import MAX_PIXELS, Layout, MaxPixels, Recognised, Splits, annotation_files, class_folders, data_folder
from ktray.images.class_folders import Labelled
from ktray.images.folder_tree import ORDER, WHERE
from ktray.spec import Split
from ktray.strict import StrictSpec
from ktray.text import counted, shown

REVISION = 1
LOCATION: tuple[str, ...] = ("path",)
_WORDNET = re.compile(r"n\d{8}")
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_FIRST_COLUMN = "ImageId"  # of Kaggle's list
_KITS = ("ILSVRC2012_devkit_t12/data", "ILSVRC2012_devkit_t12", "devkit/data", "data", "")


class Spec(StrictSpec):
    """`path` holds `train` and `val`, or Kaggle's `ILSVRC/Data/CLS-LOC`. Judged on `val`, because `test` has no labels."""

    kind: Literal["imagenet"] = "imagenet"
    path: str
    size: int = Field(default=224, ge=8, le=2048, description="side in pixels to which images are resized")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")
    max_pixels: MaxPixels = MAX_PIXELS


def recognise(path: Path) -> Recognised | None:
    """A folder whose training images lie in folders that are called by WordNet numbers."""
    try:
        names = [entry.name for entry in (_root(path) / "train").iterdir() if entry.is_dir()]
    except (UserError, OSError):
        return None
    if len(names) < 2 or not all(map(_WORDNET.fullmatch, names)):
        return None
    return Recognised({"path": str(path)}, f"train with {len(names)} folders called by WordNet numbers", 3)


def load(spec: Spec) -> Splits:
    """List the images; val is the test split, and a share of train is held out to choose by.

    Raises:
        UserError: a folder is missing, a class is no WordNet number, or the classes of val are not known for every image.
    """
    top = data_folder(spec.path)
    root = _root(top)
    train, left_out = class_folders.in_class_folders(root, "train")
    classes = sorted({image.label for image in train})
    if strange := [name for name in classes if not _WORDNET.fullmatch(name)]:
        raise UserError(
            f"{root / 'train'} has {counted(len(strange), 'folder')} that {'is' if len(strange) == 1 else 'are'} no WordNet "
            f"number, such as {strange[0]!r}",
            WHERE,
            "ImageNet's classes are folders such as n01440764; for others use the kind imagefolder.",
        )
    val, source_of_val, warnings = _val(root, top, classes)
    names, names_from = _class_names(root, top, classes)
    layout = Layout(
        read_from={"train": {"train": len(train)}, **({"test": {source_of_val: len(val)}} if val else {})},
        classes="the folders of train, numbered in the order of their text"
        + (f"; names from {names_from}" if names_from else ""),
        order=ORDER if source_of_val in ("val", "") else f"train {ORDER}; val by file name",
        left_out=left_out,
        warnings=tuple(warnings),
    )
    sources = [class_folders.labelled_source(images, classes, names, spec) for images in (train, val) if images]
    files = tuple((image.name, image.path) for image in (*train, *val))
    return Splits(sources[0], test=sources[1] if val else None, files=files, layout=layout)


def _root(top: Path) -> Path:
    """The folder that holds `train`."""
    for place in (top, top / "ILSVRC" / "Data" / "CLS-LOC", top / "Data" / "CLS-LOC", top / "CLS-LOC"):
        if (place / "train").is_dir():
            return place
    problem = f"there is no folder {top}" if not top.is_dir() else f"{top} has no folder train"
    raise UserError(problem, WHERE, "Unpack ILSVRC2012_img_train.tar there, with one folder per class, as train/n01440764.")


def _val(root: Path, top: Path, classes: Sequence[str]) -> tuple[list[Labelled], str, list[str]]:
    """The images of val, where their classes come from, and warnings."""
    if not (root / "val").is_dir():
        return [], "", [f"there is no {root / 'val'}, so that nothing is there to test on"]
    flat = class_folders.by_name(root, "val")
    if not flat or class_folders.has_class_folders(root, "val"):
        images, _ = class_folders.in_class_folders(root, "val")
        class_folders.refuse_unknown_classes((image.label for image in images), classes, str(root / "val"))
        return images, "val", []
    truth, file = _truth(root, top, flat)
    missing = sorted(set(truth) - set(flat))
    if missing:
        raise UserError(
            f"{counted(len(missing), 'image')} of {file.name} missing in {root / 'val'}, such as {missing[0]}",
            WHERE,
            "Restore them: a figure on fewer images is not that of the protocol.",
        )
    if unknown := sorted(set(flat) - set(truth)):
        raise UserError(
            f"{file.name} does not state the class of {counted(len(unknown), 'image')} of val, such as {unknown[0]}", WHERE
        )
    known = set(classes)
    images = [Labelled(f"val/{name}", flat[name], truth[name]) for name in sorted(truth) if truth[name] in known]
    others = len(truth) - len(images)
    warnings = [f"{counted(others, 'image')} of val left out, whose classes have no training images"] if others else []
    if not images:
        raise UserError(
            f"no image of val has one of the {len(classes)} classes of train", WHERE, "Give train and val of one set."
        )
    return images, str(file.relative_to(top) if file.is_relative_to(top) else file.name), warnings


def _truth(root: Path, top: Path, flat: Mapping[str, Path]) -> tuple[dict[str, str], Path]:
    """Name of each image of val -> WordNet number of its class, and the file that says so."""
    for place in (root, top):
        for kit in _KITS:
            truth, meta = place / kit / _TRUTH, place / kit / "meta.mat"
            if truth.is_file():
                return _from_devkit(truth, meta), truth
        solution = place / "LOC_val_solution.csv"
        if solution.is_file():
            return _from_solution(solution), solution
        for listed in (place / "val.txt", place / "ImageSets" / "val.txt"):
            if listed.is_file():
                return _from_list(listed, root, top), listed
    raise UserError(
        f"{root / 'val'} has no folders of classes, and no file says the classes of its {counted(len(flat), 'image')}",
        WHERE,
        f"Put ILSVRC2012_devkit_t12 (with data/{_TRUTH} and data/meta.mat) beside val, or LOC_val_solution.csv.",
    )


def _from_devkit(truth: Path, meta: Path) -> dict[str, str]:
    """The kit numbers classes from 1 in an order of its own, which `meta.mat` translates; line i is image i."""
    if not meta.is_file():
        raise UserError(f"{truth} numbers classes as {meta} says, which is missing", WHERE, "Restore meta.mat beside it.")
    wordnet = {number: name for number, (name, _) in _read_meta(str(meta)).items()}
    found = {}
    for line in annotation_files.read_list(truth):
        number = int(line.words[0]) if len(line.words) == 1 and line.words[0].isdecimal() else 0
        if number not in wordnet:
            raise UserError(
                f"{truth.name}, line {line.number}: {' '.join(line.words)[:40]!r} is no class", WHERE, "Restore it."
            )
        found[f"ILSVRC2012_val_{line.number:08d}.JPEG"] = wordnet[number]
    return found


def _read_meta(file: str) -> dict[int, tuple[str, str]]:
    """Number of a class in the kit -> WordNet number, and words. Entries with children are no classes."""
    from scipy.io import loadmat

    try:
        synsets = loadmat(file, squeeze_me=True, struct_as_record=True, variable_names=["synsets"])["synsets"]
        return {
            int(each["ILSVRC2012_ID"]): (str(each["WNID"]), str(each["words"]))
            for each in synsets
            if int(each["num_children"]) == 0
        }
    except Exception as error:
        raise UserError(f"{file} is no meta.mat of ILSVRC 2012: {error}", WHERE, "Restore it.") from error


def _from_solution(file: Path) -> dict[str, str]:
    """Kaggle's list: ImageId, and the class with a box after it, several times."""
    try:
        rows = [(index, row) for index, row in enumerate(csv.reader(annotation_files.read_text(file).split("\n")), 1) if row]
    except csv.Error as error:
        raise UserError(f"{file} cannot be read: {error}", WHERE, "Restore it.") from error
    names, places, labels = list[str](), list[str](), list[str]()
    has_header = bool(rows) and rows[0][1][0] == _FIRST_COLUMN
    for index, row in rows[1:] if has_header else rows:
        label = (row[1].split() or [""])[0] if len(row) > 1 else ""
        if not _WORDNET.fullmatch(label):
            raise UserError(f"{file.name}, line {index}: {shown(row, 60)} has no class", WHERE, "Restore the file.")
        names.append(f"{row[0]}.JPEG")
        places.append(f"{file.name}, line {index}")
        labels.append(label)
    annotation_files.refuse_twice(names, places)
    return dict(zip(names, labels, strict=True))


def _from_list(file: Path, root: Path, top: Path) -> dict[str, str]:
    """Lines with a name and a number from 0, in the order of the WordNet numbers, as Caffe's `val.txt`."""
    known = sorted(_listed_names(root, top)[0])
    if not known:
        known = sorted(path.name for path in (root / "train").iterdir() if _WORDNET.fullmatch(path.name))
        if len(known) != 1000:
            raise UserError(
                f"{file.name} numbers 1,000 classes, and train has {len(known)}", WHERE, "Put synset_words.txt beside it."
            )
    names, places, labels = list[str](), list[str](), list[str]()
    for line in annotation_files.read_list(file):
        place = f"{file.name}, line {line.number}"
        number = int(line.words[1]) if len(line.words) == 2 and line.words[1].isdecimal() else -1
        if not 0 <= number < len(known):
            problem = f"{place}: no name and number of a class from 0 to {len(known) - 1}"
            raise UserError(problem, WHERE, "Restore the file.")
        names.append(line.words[0].rsplit("/", 1)[-1])
        places.append(place)
        labels.append(known[number])
    annotation_files.refuse_twice(names, places)
    return dict(zip(names, labels, strict=True))


def _class_names(root: Path, top: Path, classes: Sequence[str]) -> tuple[dict[str, str], str]:
    """WordNet number -> the number with the first word for it, for those that a file names; and the file."""
    names, file = _listed_names(root, top)
    known = {label: f"{label} {names[label].split(',')[0].strip()}" for label in classes if label in names}
    return known, file if known else ""


def _listed_names(root: Path, top: Path) -> tuple[dict[str, str], str]:
    """WordNet number -> words, and the file that says so; empty without one."""
    for place in (root, top):
        for name in ("LOC_synset_mapping.txt", "synset_words.txt", "words.txt"):
            if (place / name).is_file():
                lines = annotation_files.read_list(place / name)
                return {line.words[0]: " ".join(line.words[1:]) for line in lines if _WORDNET.fullmatch(line.words[0])}, name
        for kit in _KITS:
            if (place / kit / "meta.mat").is_file():
                return dict(_read_meta(str(place / kit / "meta.mat")).values()), "meta.mat"
    return {}, ""
