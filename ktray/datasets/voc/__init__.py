"""PASCAL VOC 2007 and 2012, or other images in their layout: several classes per image, boxes and masks.

A folder `VOC2007` with `JPEGImages`, `ImageSets` and `Annotations` or `SegmentationClass`, as the development kit unpacks it.
The protocols: classification and detection learn from `trainval` and are judged on `test` in 2007; in 2012, whose `test` has no
public annotations, and for segmentation, from `train` and on `val`. Classes are those of the lists `ImageSets/Main/*_*.txt`.

Source: Everingham, Van Gool, Williams, Winn, Zisserman, The PASCAL Visual Object Classes (VOC) Challenge, IJCV 2010, and the
development kits of 2007 and 2012.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BeforeValidator, Field, model_validator

from ktray.datasets.voc import annotation_xml
from ktray.errors import UserError
from ktray.images import (
    MAX_PIXELS,
    Layout,
    MaxPixels,
    Recognised,
    Source,
    Splits,
    Unreadable,
    annotation_files,
    data_folder,
    decode,
    decode_mask,
    mask_size,
)
from ktray.images.annotation_files import AnnotatedImage, BadAnnotation
from ktray.images.folder_tree import SUFFIXES, WHERE
from ktray.spec import Split
from ktray.strict import StrictSpec
from ktray.text import counted, first_few

REVISION = 1
LOCATION: tuple[str, ...] = ("path",)
CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse"),
    *("motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


class Spec(StrictSpec):
    """`path` is VOCdevkit, the folder above it, or VOC2007 itself. Boxes and several labels come together, masks on their own.

    `2007+2012` is the union that detection is often trained on: the training images of both, the test images of 2007.
    """

    kind: Literal["voc"] = "voc"
    path: str
    year: Annotated[Literal["2007", "2012", "2007+2012"], BeforeValidator(_as_text)] = "2007"
    task: Literal["detection", "classification", "segmentation"] = Field(
        default="detection",
        description="detection: labels and boxes; classification: labels alone, from the lists; segmentation: masks",
    )
    train: Literal["trainval", "train"] | None = Field(
        default=None, description="list of the training images; null: trainval in 2007, train in 2012 and for segmentation"
    )
    test: Literal["test", "val"] | None = Field(
        default=None, description="list of the test images; null: test with trainval, val with train"
    )
    size: int = Field(default=224, ge=8, le=2048, description="side in pixels to which images are resized; whole ones are not")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")
    max_pixels: MaxPixels = MAX_PIXELS

    @model_validator(mode="after")
    def _lists_without_common_images(self) -> Spec:
        if _train_list(self) == "trainval" and self.test == "val":
            raise ValueError("trainval holds the images of val; learn from train, or judge on test")
        return self


def _train_list(spec: Spec) -> str:
    return spec.train or ("train" if spec.task == "segmentation" or spec.year == "2012" else "trainval")


def _test_list(spec: Spec) -> str:
    if spec.test is not None:
        return spec.test
    return "test" if _train_list(spec) == "trainval" or ("2007" in spec.year and spec.task != "segmentation") else "val"


@dataclass(frozen=True)
class Devkit:
    """The folder of one year.

    Attributes:
        year: such as ``2007``.
        root: the folder.
        images: name without suffix -> file.
    """

    year: str
    root: Path
    images: Mapping[str, Path]

    def list_file(self, task: str, name: str) -> Path:
        """The file of a list, such as `ImageSets/Main/trainval.txt`."""
        return self.root / "ImageSets" / ("Segmentation" if task == "segmentation" else "Main") / f"{name}.txt"


@dataclass(frozen=True)
class Entry:
    """An image of a list: its name in the data set, its name in the list, its file, and where the list names it."""

    name: str
    key: str
    file: Path
    place: str


def recognise(path: Path) -> Recognised | None:
    """A folder with VOC2007 or VOC2012 in it; the earlier one where there are both."""
    for year in ("2007", "2012"):
        with contextlib.suppress(UserError):
            kit = _devkit(path, year)
            return Recognised({"path": str(path), "year": year}, f"{kit.root.name} with ImageSets and JPEGImages", 3)
    return None


def annotations_of(spec: Spec) -> tuple[str, ...]:
    """What the task reads."""
    of_task = {"detection": ("presence", "boxes"), "classification": ("presence",), "segmentation": ("mask",)}
    return of_task[spec.task]


def load(spec: Spec) -> Splits:
    """Read the lists, and what the task needs of the annotations.

    Raises:
        UserError: there is no such folder or list, a list is wrong, or images that judge lack a file or a right annotation.
    """
    kits = [_devkit(data_folder(spec.path), year) for year in spec.year.split("+")]
    classes, origin = _classes(kits, spec)
    lists = {"train": (_train_list(spec), kits), "test": (_test_list(spec), kits[:1])}
    if lists["train"][0] == "train" and lists["test"][0] == "test":
        lists["val"] = ("val", kits)
    splits = {split: [_part(kit, name, spec) for kit in of_split] for split, (name, of_split) in lists.items()}
    annotation_files.refuse_shared(
        {split: [each.name for part in parts for each in part.entries] for split, parts in splits.items()}
    )
    sources, warnings = {}, []
    for split, parts in splits.items():
        sources[split], said = _source(split, parts, classes, spec)
        warnings += said
    files = [(entry.name, entry.file) for source in sources.values() for entry in source.entries]
    if spec.task == "segmentation":
        files += [(_mask_name(entry), _mask_file(entry)) for source in sources.values() for entry in source.entries]
    layout = Layout(
        read_from={
            split: {str(part.list_file.relative_to(part.kit.root.parent)): len(part.entries) for part in parts}
            for split, parts in splits.items()
        },
        classes=origin,
        annotations=_UNDERSTOOD[spec.task],
        order="as in the list" if len(kits) == 1 else "as in the lists, one year after the other",
        warnings=tuple(warnings),
    )
    found = {split: source.source for split, source in sources.items()}
    return Splits(found["train"], found.get("val"), found["test"], files=tuple(files), layout=layout)


_UNDERSTOOD = {
    "detection": "boxes of the XML files, which count pixels from 1 and include both ends; "
    "labels of the lists of classes, or where there are none of the objects: 0 where all of a class are difficult",
    "classification": "labels of the lists of classes: 1 shown, -1 not shown, 0 shown in difficult objects alone",
    "segmentation": "masks of SegmentationClass: 0 background, then the classes in their order, 255 void",
}


# ---- the folder ----


def _devkit(root: Path, year: str) -> Devkit:
    """The folder of a year below a path that may be VOCdevkit, the folder around it, or that folder itself."""
    name = f"VOC{year}"
    if not root.is_dir():
        raise UserError(f"there is no folder {root}", WHERE, f"Give the folder VOCdevkit, which holds {name}.")
    places = [root / name, root / "VOCdevkit" / name, *sorted(root.glob(f"*/VOCdevkit/{name}"))]
    found = [place for place in places if (place / "ImageSets").is_dir()]
    if (root / "ImageSets").is_dir():
        if re.fullmatch(r"VOC\d{4}", root.name) and root.name != name:
            raise UserError(f"{root} is {root.name}, and the year is {year}", "data.year", f"Write year: {root.name[3:]}.")
        found = [root]
    if len(found) > 1:
        raise UserError(
            f"{name} lies in several places: {', '.join(map(str, found))}",
            WHERE,
            f"Give one of them. Where one has trainval and the other test, copy both into one {name}.",
        )
    if not found:
        others = sorted(place.name for each in (root, root / "VOCdevkit") for place in each.glob("VOC[0-9]*"))
        there = f"; there is {', '.join(others)}" if others else ""
        raise UserError(
            f"{root} has no {name} with a folder ImageSets{there}",
            WHERE,
            f"Unpack the archives of VOC {year} there, so that VOCdevkit/{name}/ImageSets exists.",
        )
    return Devkit(year, found[0], _images(found[0]))


def _images(root: Path) -> dict[str, Path]:
    """Name without suffix -> file of each image of `JPEGImages`."""
    folder, found = root / "JPEGImages", dict[str, Path]()
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}", WHERE, "Unpack the images of VOC there.") from error
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in SUFFIXES and not name.startswith("."):
            if stem in found:
                raise UserError(f"{folder} has {found[stem].name} and {name}", WHERE, "Remove one of them.")
            found[stem] = folder / name
    return found


# ---- the lists ----


@dataclass(frozen=True)
class _Part:
    """The images of one list."""

    kit: Devkit
    name: str
    list_file: Path
    entries: tuple[Entry, ...]


def _part(kit: Devkit, name: str, spec: Spec) -> _Part:
    """The images of the list of this name, such as ``trainval``; where it is missing, of train and val together."""
    file = kit.list_file(spec.task, name)
    files = [file]
    if not file.is_file() and name == "trainval":
        files = [kit.list_file(spec.task, part) for part in ("train", "val")]
    if missing := [each for each in files if not each.is_file()]:
        has = first_few(sorted(each.name for each in file.parent.glob("*.txt") if "_" not in each.name)) or "none"
        raise UserError(f"there is no list {missing[0]}", "data.train" if "train" in name else "data.test", f"It has {has}.")
    entries = [entry for each in files for entry in _entries(kit, each)]
    if not entries:
        raise UserError(f"the list {file} is empty", WHERE, "Restore it.")
    annotation_files.refuse_twice([each.key for each in entries], [each.place for each in entries])
    return _Part(kit, name, file, tuple(entries))


def _entries(kit: Devkit, file: Path) -> list[Entry]:
    found = []
    for line in annotation_files.read_list(file):
        place = f"{file.name}, line {line.number}"
        key = _key(line.words, kit, place)
        annotation_files.refuse_name(key, place)
        image = kit.images.get(key, kit.root / "JPEGImages" / f"{key}.jpg")
        found.append(Entry(f"VOC{kit.year}/JPEGImages/{image.name}", key, image, place))
    return found


def _key(words: tuple[str, ...], kit: Devkit, place: str) -> str:
    """The name of an image in a line of a list; the lists of other tasks have a number behind it.

    Raises:
        UserError: the line has more, as a name with a blank does, or the name has the suffix of its file.
    """
    key, *more = words
    if more and (len(more) > 1 or key not in kit.images or not re.fullmatch(r"-?\d+", more[0])):
        raise UserError(
            f"{place}: {' '.join(words)[:80]!r} is not the name of an image", WHERE, "Names in VOC's lists have no blanks."
        )
    stem, suffix = os.path.splitext(key)
    if key not in kit.images and suffix.lower() in SUFFIXES:
        raise UserError(
            f"{place}: {key[:80]!r} is the name of a file", WHERE, f"VOC's lists have no suffix: write {stem[:80]}."
        )
    return key


def _classes(kits: Sequence[Devkit], spec: Spec) -> tuple[tuple[str, ...], str]:
    """The names of the classes in alphabetical order, which is VOC's, and where they come from."""
    found = {match[1] for kit in kits for name in _class_lists(kit.root) if (match := _CLASS_LIST.fullmatch(name))}
    if found and not found <= set(CLASSES):
        return tuple(sorted(found)), "the lists ImageSets/Main/CLASS_SPLIT.txt, in alphabetical order"
    if not found and spec.task == "classification":
        raise UserError(
            f"{kits[0].root / 'ImageSets/Main'} has no lists of classes, such as cat_trainval.txt",
            "data.task",
            "Use task: detection, which takes the classes from the XML files.",
        )
    if not found and spec.task == "detection":
        names = _classes_of_objects(kits, spec)
        if not names <= set(CLASSES):
            return tuple(sorted(names)), "the XML files of the training images, in alphabetical order"
    return CLASSES, "the 20 classes of VOC, in alphabetical order"


_CLASS_LIST = re.compile(r"(.+)_(?:train|val|trainval|test)\.txt")


def _class_lists(root: Path) -> list[str]:
    folder = root / "ImageSets" / "Main"
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _classes_of_objects(kits: Sequence[Devkit], spec: Spec) -> set[str]:
    names: set[str] = set()
    for kit in kits:
        for entry in _part(kit, _train_list(spec), spec).entries:
            try:
                names.update(annotation_xml.class_names(_xml(entry)))
            except BadAnnotation:  # reported where all of the annotation is read
                continue
    return names


def _stated_presence(part: _Part, classes: Sequence[str], required: bool) -> NDArray[np.int8] | None:
    """(n, classes) as the lists of the classes state it; None if there are none and they are not required.

    Raises:
        UserError: a list is missing, or is not of the same images as the list of the split.
    """
    folder = part.list_file.parent
    files = [folder / f"{name}_{part.name}.txt" for name in classes]
    absent = [file for file in files if not file.is_file()]
    if absent and (required or len(absent) < len(files)):
        raise UserError(f"there is no list {absent[0]}", WHERE, "Restore it, or use task: detection without any such list.")
    if absent:
        return None
    rows = {entry.key: row for row, entry in enumerate(part.entries)}
    found = np.full((len(rows), len(classes)), -2, np.int8)
    for number, file in enumerate(files):
        for line in annotation_files.read_list(file):
            place = f"{file.name}, line {line.number}"
            if len(line.words) != 2 or line.words[1] not in ("1", "0", "-1"):
                raise UserError(
                    f"{place}: {' '.join(line.words)[:80]!r} is not an image and 1, 0 or -1", WHERE, "Restore the file."
                )
            row = rows.get(line.words[0])
            if row is None or found[row, number] != -2:
                what = f"is not in {part.list_file.name}" if row is None else "was named before"
                raise UserError(f"{place}: the image {line.words[0][:80]!r} {what}", WHERE, "Restore the file.")
            found[row, number] = int(line.words[1])
        if (lacking := np.flatnonzero(found[:, number] == -2)).size:
            entry = part.entries[lacking[0]]
            raise UserError(f"{file.name} lacks the image {entry.key!r} of {entry.place}", WHERE, "Restore the file.")
    return found


# ---- the images ----


@dataclass(frozen=True)
class _Listed:
    """A split, and the images that it consists of."""

    source: Source
    entries: tuple[Entry, ...]


def _source(split: str, parts: Sequence[_Part], classes: tuple[str, ...], spec: Spec) -> tuple[_Listed, list[str]]:
    """The images of a split without those that cannot be used, and warnings."""
    read = {"detection": _with_boxes, "segmentation": _with_mask, "classification": _with_labels}[spec.task]
    numbers = {name: number for number, name in enumerate(classes)}
    found, wrong = dict[Entry, AnnotatedImage | None](), dict[str, str]()
    listed = [entry for part in parts for entry in part.entries]
    for entry in listed:
        try:
            if not entry.file.is_file():
                raise BadAnnotation(f"{entry.place}: JPEGImages has no image {entry.key}")
            found[entry] = read(entry, numbers)
        except BadAnnotation as error:
            wrong[entry.name] = str(error)
    warnings = annotation_files.left_out(split, wrong, len(listed), spec.max_unreadable)
    kept = np.array([entry in found for entry in listed])
    entries, images = tuple(found), [image for image in found.values() if image is not None]
    source = _plain_source(entries, [None if image is None else image.size for image in found.values()], classes, spec)
    if spec.task == "classification":
        stated = [_stated_presence(part, classes, required=True) for part in parts]
        return _Listed(replace(source, presence=_stacked(stated)[kept]), entries), warnings
    sizes = np.array([image.size for image in images], np.int64)
    if spec.task == "segmentation":
        mask = _mask_reader(entries, len(classes), images)
        return _Listed(replace(source, sizes=sizes, mask=mask), entries), warnings
    stated = [_stated_presence(part, classes, required=False) for part in parts]
    presence = drawn = annotation_files.presence_of(images, len(classes))
    if all(of_part is not None for of_part in stated):
        presence = _stacked(stated)[kept]
        warnings += _contradictions(split, presence, drawn, entries, classes)
    if clipped := sum(image.clipped > 0 for image in images):
        warnings.append(
            f"boxes of {counted(clipped, 'image')} of {split} reach up to a pixel beyond the image and are clipped; "
            "VOC counts pixels from 1, so these files may count from 0"
        )
    boxes, flags = tuple(image.boxes for image in images), tuple(image.flags for image in images)
    return _Listed(replace(source, presence=presence, sizes=sizes, boxes=boxes, box_flags=flags), entries), warnings


def _stacked(stated: Sequence[NDArray[np.int8] | None]) -> NDArray[np.int8]:
    return np.concatenate([of_part for of_part in stated if of_part is not None])


def _plain_source(
    entries: tuple[Entry, ...], sizes: Sequence[tuple[int, int] | None], classes: tuple[str, ...], spec: Spec
) -> Source:
    def read(index: int) -> NDArray[np.uint8]:
        if spec.task == "segmentation":
            decode_mask(_mask_file(entries[index]), len(classes), sizes[index] or (0, 0))
        return decode(entries[index].file, spec.size, spec.max_pixels, annotated=sizes[index])

    return Source(
        names=tuple(entry.name for entry in entries), read=read, classes=classes, original=lambda index: entries[index].file
    )


def _contradictions(
    split: str, stated: NDArray[np.int8], drawn: NDArray[np.int8], entries: Sequence[Entry], classes: Sequence[str]
) -> list[str]:
    """A warning if lists and XML files speak of other classes; the lists count."""
    rows, columns = np.nonzero(stated != drawn)
    if not len(rows):
        return []
    row, column = int(rows[0]), int(columns[0])
    return [
        f"the lists of classes contradict the XML files in {counted(len(np.unique(rows)), 'image')} of {split}, and count: "
        f"{entries[row].key} has {stated[row, column]} for {classes[column]} in the list and {drawn[row, column]} by objects"
    ]


def _xml(entry: Entry) -> Path:
    return entry.file.parent.parent / "Annotations" / f"{entry.key}.xml"


def _mask_file(entry: Entry) -> Path:
    return entry.file.parent.parent / "SegmentationClass" / f"{entry.key}.png"


def _mask_name(entry: Entry) -> str:
    return f"{entry.name.split('/')[0]}/SegmentationClass/{entry.key}.png"


def _with_labels(entry: Entry, classes: Mapping[str, int]) -> None:
    """Nothing more: the lists of the classes state all."""


def _with_boxes(entry: Entry, classes: Mapping[str, int]) -> AnnotatedImage:
    return annotation_xml.read_annotation(_xml(entry), entry.file, classes)


def _with_mask(entry: Entry, classes: Mapping[str, int]) -> AnnotatedImage:
    """The size of an image, which its mask must have, too."""
    mask = _mask_file(entry)
    try:
        size = mask_size(mask)
    except (Unreadable, OSError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise BadAnnotation(f"SegmentationClass/{mask.name}: {why}") from error
    annotation_files.require_size(entry.file, size, f"SegmentationClass/{mask.name}")
    return annotation_files.annotated(size, [], [], 0)


def _mask_reader(
    entries: Sequence[Entry], classes: int, images: Sequence[AnnotatedImage]
) -> Callable[[int], NDArray[np.uint8]]:
    return lambda index: decode_mask(_mask_file(entries[index]), classes, images[index].size)
