"""COCO's detection data: images with boxes of 80 classes, or your own in its format.

A folder with `annotations/instances_train2017.json` and `train2017/`, as COCO unpacks it; the JSON file may also lie beside its
images, as `_annotations.coco.json`. Learns from `train2017` and is judged on `val2017`, whose annotations are public. Classes
are the categories in the order of their numbers, which may have gaps. A crowd is one box with the flag CROWD, and counts as
present.

Source: Lin et al., Microsoft COCO: Common Objects in Context, ECCV 2014, and https://cocodataset.org/#format-data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ktray.errors import UserError
from ktray.fingerprint import FileVersion, file_version
from ktray.images import MAX_PIXELS, Layout, MaxPixels, Recognised, Source, Splits, annotation_files, data_folder, decode
from ktray.images.annotation_files import MAX_COUNT, AnnotatedImage, BadAnnotation, files_below
from ktray.images.folder_tree import WHERE
from ktray.images.split_words import splits_of
from ktray.spec import Split
from ktray.strict import StrictSpec
from ktray.text import counted, shown

REVISION = 1
LOCATION: tuple[str, ...] = ("path",)
_MAX_JSON_BYTES = 4 << 30


class Spec(StrictSpec):
    """`path` holds `annotations/` and the folders of images. Without a set for `val`, a share of train is held out."""

    kind: Literal["coco"] = "coco"
    path: str
    train: str = Field(default="train2017", description="set of the training images, such as train2017")
    val: str | None = Field(default=None, description="set of the validation images; null: the share split.val of train")
    test: str | None = Field(default="val2017", description="set of the test images; COCO's own test has no annotations")
    size: int = Field(default=224, ge=8, le=2048, description="side in pixels to which images are resized; whole ones are not")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")
    max_pixels: MaxPixels = MAX_PIXELS


@dataclass(frozen=True)
class _Set:
    """The content of one JSON file.

    Attributes:
        file: the JSON file.
        classes: the names of the categories, in the order of their numbers.
        images: of each image its name, height and width.
        boxes: for each image (n, 5) float32 [x, y, width, height, class], as in the file.
        crowd: for each image (n,) bool.
        wrong: index of an image -> what is wrong with it or with one of its boxes.
    """

    file: Path
    classes: tuple[str, ...]
    images: tuple[tuple[str, int, int], ...]
    boxes: tuple[NDArray[np.float64], ...]
    crowd: tuple[NDArray[np.bool_], ...]
    wrong: Mapping[int, str]


def recognise(path: Path) -> Recognised | None:
    """A folder with COCO's annotations of a training set; a set for validation is that for tests where no set is called so."""
    names = [file.stem.removeprefix("instances_") for file in sorted(path.glob("annotations/instances_*.json"))]
    names += [file.parent.name for file in sorted(path.glob("*/_annotations.coco.json"))]
    by_split = {split: name for name, split in reversed(splits_of(names).items()) if split}
    if "train" not in by_split:
        return None
    val, test = by_split.get("val"), by_split.get("test")
    sets = {"train": by_split["train"], **({"val": val, "test": test} if val and test else {"test": val or test})}
    return Recognised({"path": str(path), **sets}, f"COCO's annotations of {', '.join(names)}", 3)


def annotations_of(spec: Spec) -> tuple[str, ...]:
    """Several labels per image, and boxes."""
    return ("presence", "boxes")


def load(spec: Spec) -> Splits:
    """Read the JSON files, and find the images.

    Raises:
        UserError: a file is missing or broken, sets have other categories or share images, or images that judge lack a file or
            a right annotation.
    """
    root = data_folder(spec.path)
    if not root.is_dir():
        raise UserError(f"there is no folder {root}", WHERE, "Give the folder that holds annotations/ and train2017/.")
    wanted = {"train": spec.train, "val": spec.val, "test": spec.test}
    names = {split: name for split, name in wanted.items() if name is not None}
    sets, folders = {}, {}
    for split, name in names.items():
        annotation_files.refuse_name(name, f"data.{split}")
        file = _json_file(root, name, split)
        sets[split] = _read(str(file), file_version(file.stat()))
        folders[split] = _folder(root, name, file)
    _refuse_other_classes(sets, names)
    listed = {split: [f"{folders[split].name}/{name}" for name, _, _ in each.images] for split, each in sets.items()}
    annotation_files.refuse_shared(listed)
    sources, warnings, files = {}, [], []
    for split, each in sets.items():
        sources[split], paths, said = _source(split, each, folders[split], listed[split], spec)
        files += list(zip(sources[split].names, paths, strict=True))
        warnings += said
    layout = Layout(
        read_from={split: {str(each.file.relative_to(root)): len(each.images)} for split, each in sets.items()},
        classes="the categories, in the order of their numbers",
        annotations="boxes in pixels from 0; an image shows a class that has a box in it, also a crowd",
        order="as in the JSON file",
        warnings=tuple(warnings),
    )
    return Splits(sources["train"], sources.get("val"), sources.get("test"), files=tuple(files), layout=layout)


def _json_file(root: Path, name: str, split: str) -> Path:
    places = [
        root / "annotations" / f"instances_{name}.json",
        root / "annotations" / f"{name}.json",
        root / name / "_annotations.coco.json",
    ]
    found = [place for place in places if place.is_file()]
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{' and '.join(map(str, found))} both describe {name}", f"data.{split}", "Remove one of them.")
    there = sorted(path.name for path in (root / "annotations").glob("*.json"))
    has = f"There is {', '.join(there[:8])}." if there else "Unpack COCO's annotations there."
    raise UserError(f"there is no {places[0]}", f"data.{split}", has)


def _folder(root: Path, name: str, file: Path) -> Path:
    """The folder that the names of images start from."""
    places = [file.parent] if file.name == "_annotations.coco.json" else [root / name, root / "images" / name, root / "images"]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(f"there is no folder {places[0]} with the images of {file.name}", WHERE, "Unpack them there.")


def _refuse_other_classes(sets: Mapping[str, _Set], names: Mapping[str, str]) -> None:
    for split, each in sets.items():
        if each.classes != sets["train"].classes:
            other = sorted(set(each.classes) ^ set(sets["train"].classes)) or ["their order"]
            raise UserError(
                f"{names[split]} has other categories than {names['train']}: {', '.join(other[:5])}",
                f"data.{split}",
                "Give sets of the same categories.",
            )


def _source(
    split: str, described: _Set, folder: Path, names: Sequence[str], spec: Spec
) -> tuple[Source, list[Path], list[str]]:
    """The images of a split without those that cannot be used, their files, and warnings."""
    present = files_below(folder)
    wrong, kept, found, empty = dict[str, str](), list[int](), list[AnnotatedImage](), 0
    for row, (name, height, width) in enumerate(described.images):
        try:
            if row in described.wrong:
                raise BadAnnotation(f"{described.file.name}, {described.wrong[row]}")
            if name not in present:
                raise BadAnnotation(f"{described.file.name}, images[{row}]: {folder.name} has no {shown(name)}")
            image, without_area = _annotated(described, row, (height, width))
        except BadAnnotation as error:
            wrong[names[row]] = str(error)
            continue
        kept.append(row)
        found.append(image)
        empty += without_area
    warnings = annotation_files.left_out(split, wrong, len(names), spec.max_unreadable)
    if empty:
        warnings.append(f"{counted(empty, 'box', 'boxes')} of {split} without any area left out")
    if clipped := sum(image.clipped for image in found):
        warnings.append(f"{counted(clipped, 'box', 'boxes')} of {split} reach up to a pixel beyond the image and are clipped")
    paths = [folder / described.images[row][0] for row in kept]

    def read(index: int) -> NDArray[np.uint8]:
        return decode(paths[index], spec.size, spec.max_pixels, annotated=found[index].size)

    source = Source(
        names=tuple(names[row] for row in kept),
        read=read,
        classes=described.classes,
        original=lambda index: paths[index],
        presence=annotation_files.presence_of(found, len(described.classes)),
        sizes=np.array([image.size for image in found], np.int64).reshape(-1, 2),
        boxes=tuple(image.boxes for image in found),
        box_flags=tuple(image.flags for image in found),
    )
    return source, paths, warnings


def _annotated(described: _Set, row: int, size: tuple[int, int]) -> tuple[AnnotatedImage, int]:
    """The boxes of an image as [x0, y0, x1, y1, class], and how many had no area and are left out."""
    boxes, flags, clipped, empty = [], [], 0, 0
    for (x, y, width, height, label), crowd in zip(described.boxes[row].tolist(), described.crowd[row].tolist(), strict=True):
        if width == 0 or height == 0:
            empty += 1
            continue
        try:
            corners, was_outside = annotation_files.clipped_box((x, y, x + width, y + height), size)
        except ValueError as error:
            raise BadAnnotation(f"{described.file.name}, {described.images[row][0]}: {error}") from error
        clipped += was_outside
        boxes.append([*corners, label])
        flags.append([False, False, crowd])
    return annotation_files.annotated(size, boxes, flags, clipped), empty


# ---- the JSON file ----


@lru_cache(maxsize=4)  # a data set is listed more than once in a process, and COCO's file has 450 MB
def _read(path: str, version: FileVersion) -> _Set:
    file = Path(path)
    if version[0] > _MAX_JSON_BYTES:
        raise UserError(f"{file} has more than {_MAX_JSON_BYTES:,} bytes", WHERE, "Split it into several sets.")

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"it holds {text}")

    try:
        content = json.loads(file.read_bytes(), parse_constant=refuse)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}", WHERE, "Restore it.") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{file}, line {error.lineno}, column {error.colno}: {error.msg}", WHERE, "Restore the file."
        ) from error
    except (ValueError, RecursionError) as error:
        what = "is nested too deeply" if isinstance(error, RecursionError) else f"is no JSON: {error}"
        raise UserError(f"{file} {what}", WHERE, "Restore the file.") from error
    return parse(content, file)


def parse(content: Any, file: Path) -> _Set:
    """The images, boxes and categories of a JSON file.

    Raises:
        UserError: what concerns more than one image is wrong; it names the place, such as ``categories[3]``.
    """
    if not isinstance(content, dict):
        raise UserError(f"{file} is no object with images, annotations and categories", WHERE, "Give COCO's instances.")
    numbers, classes = _categories(_list(content, "categories", file), file)
    images, rows, wrong = _images(_list(content, "images", file), file)
    boxes: list[list[list[float]]] = [[] for _ in images]
    crowd: list[list[bool]] = [[] for _ in images]
    for index, each in enumerate(_list(content, "annotations", file)):
        place = f"annotations[{index}]"
        number = each.get("image_id") if isinstance(each, dict) else None
        if not _is_number(number):
            raise UserError(
                f"{file}, {place}: its image_id is {shown(number)}, which is no number", WHERE, "Write the image's id."
            )
        row = rows.get(number)
        if row is None:
            raise UserError(
                f"{file}, {place}: none of the images has its image_id, {number}", WHERE, "Remove it, or add its image."
            )
        try:
            boxes[row].append(_box(each, numbers))
            crowd[row].append(_is_crowd(each))
        except ValueError as error:
            wrong.setdefault(row, f"{place}: {error}")
            boxes[row], crowd[row] = [], []
    stated = [box for of_image in boxes for box in of_image]
    if len(stated) > 1 and all(x + width <= 1 and y + height <= 1 for x, y, width, height, _ in stated):
        raise UserError(
            f"{file}: all boxes lie within the first pixel, as boxes in shares of the sides do",
            WHERE,
            "Write them in pixels, as [x, y, width, height].",
        )
    return _Set(
        file,
        classes,
        tuple(images),
        tuple(np.array(of_image, np.float64).reshape(-1, 5) for of_image in boxes),
        tuple(np.array(of_image, np.bool_) for of_image in crowd),
        wrong,
    )


def _list(content: dict[str, Any], name: str, file: Path) -> list[Any]:
    found = content.get(name)
    if not isinstance(found, list) or (not found and name != "annotations"):
        raise UserError(f"{file} has no list of {name}", WHERE, "Give COCO's instances, not its captions or test images.")
    return found


def _categories(found: list[Any], file: Path) -> tuple[dict[int, int], tuple[str, ...]]:
    """Number of a category -> number of its class, and the classes' names."""
    named: dict[int, str] = {}
    for index, each in enumerate(found):
        number, name = (each.get("id"), each.get("name")) if isinstance(each, dict) else (None, None)
        if not _is_number(number) or not isinstance(name, str) or not name or number in named or name in named.values():
            raise UserError(
                f"{file}, categories[{index}]: no id and name of its own: {shown(each, 80)}", WHERE, "Restore the file."
            )
        named[number] = name
    order = sorted(named)
    return {number: row for row, number in enumerate(order)}, tuple(named[number] for number in order)


def _images(found: list[Any], file: Path) -> tuple[list[tuple[str, int, int]], dict[int, int], dict[int, str]]:
    """Name, height and width of each image; its number -> its row; row -> what is wrong with it."""
    images, rows, wrong, names = list[tuple[str, int, int]](), dict[int, int](), dict[int, str](), set[str]()
    for row, each in enumerate(found):
        place = f"{file.name}, images[{row}]"
        if not isinstance(each, dict) or not _is_number(each.get("id")) or not isinstance(each.get("file_name"), str):
            raise UserError(f"{place}: no id and file_name: {shown(each, 80)}", WHERE, "Restore the file.")
        name, number = each["file_name"], int(each["id"])
        annotation_files.refuse_name(name, place)
        if number in rows or name in names:
            raise UserError(f"{place}: the image {shown(name)} with id {number} is listed twice", WHERE, "Remove one.")
        sides = each.get("height"), each.get("width")
        if not all(_is_number(side) and 0 < side <= MAX_COUNT for side in sides):
            wrong[row] = f"images[{row}]: no height and width in pixels: {shown(sides, 80)}"
            sides = 1, 1
        rows[number] = row
        names.add(name)
        images.append((name, int(sides[0] or 1), int(sides[1] or 1)))
    return images, rows, wrong


def _is_number(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number; tools for tables write 7 as 7.0."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def _box(each: dict[str, Any], numbers: Mapping[int, int]) -> list[float]:
    """[x, y, width, height, class]."""
    category, box = each.get("category_id"), each.get("bbox")
    if not _is_number(category) or category not in numbers:
        raise ValueError(f"unknown category {shown(category, 40)}")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(x, int | float) and x is not True for x in box):
        raise ValueError(f"its bbox is no list of x, y, width and height: {shown(box, 80)}")
    if not all(abs(x) <= MAX_COUNT for x in box) or min(box[2:]) < 0:
        raise ValueError(f"its bbox is not one of an image: {shown(box, 80)}")
    return [*map(float, box), float(numbers[category])]


def _is_crowd(each: dict[str, Any]) -> bool:
    crowd = each.get("iscrowd", 0)
    if crowd not in (0, 1):
        raise ValueError(f"iscrowd is {shown(crowd, 40)}, not 0 or 1")
    return bool(crowd)
