"""Annotations of images as data sets read them from files: lists of names, boxes, sizes; what is left out and what is refused.

An image whose annotation is wrong is left out of the training images, with a warning, as long as no more than `max_unreadable`
of them are. In a split that judges it is refused: a figure on fewer images is not that of the protocol.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ktray.errors import UserError
from ktray.fingerprint import FileVersion, file_version
from ktray.images.decoding import MAX_PIXELS, image_size
from ktray.images.folder_tree import WHERE
from ktray.images.source import Unreadable
from ktray.text import counted, shown, some_of

TOLERANCE = 1.0  # pixels that a box may reach beyond its image, by rounding or by counting from 0, before it is wrong
MAX_LIST_BYTES = 256 << 20
MAX_COUNT = 1 << 20  # largest side of an image that an annotation may state


class BadAnnotation(Exception):
    """The annotation of one image is wrong; the message says where and what."""


@dataclass(frozen=True)
class AnnotatedImage:
    """What was drawn on one image.

    Attributes:
        size: height and width of the image in pixels.
        boxes: (n, 5) float32 as in `Source`.
        flags: (n, 3) bool as in `Source`.
        clipped: how many boxes reached up to a pixel beyond the image.
    """

    size: tuple[int, int]
    boxes: NDArray[np.float32]
    flags: NDArray[np.bool_]
    clipped: int = 0


def annotated(
    size: tuple[int, int], boxes: Sequence[Sequence[float]], flags: Sequence[Sequence[bool]], clipped: int
) -> AnnotatedImage:
    """The record of an image with these boxes, which may be none."""
    return AnnotatedImage(size, np.array(boxes, np.float32).reshape(-1, 5), np.array(flags, np.bool_).reshape(-1, 3), clipped)


def clipped_box(corners: Sequence[float], size: tuple[int, int]) -> tuple[list[float], bool]:
    """A box [x0, y0, x1, y1] inside its image, and whether it reached up to a pixel beyond.

    Args:
        size: height and width of the image.

    Raises:
        ValueError: the box is not one, or reaches further beyond the image.
    """
    height, width = size
    x0, y0, x1, y1 = corners
    if not all(map(math.isfinite, corners)):
        raise ValueError("its box has a number that is not finite")
    if x1 <= x0 or y1 <= y0:
        raise ValueError(f"its box is {x1 - x0:g} pixels wide and {y1 - y0:g} high")
    if min(x0, y0) < -TOLERANCE or x1 > width + TOLERANCE or y1 > height + TOLERANCE:
        raise ValueError(
            f"its box reaches from ({x0:g}, {y0:g}) to ({x1:g}, {y1:g}), outside the image of {width} x {height} pixels"
        )
    inside = [min(max(x0, 0.0), width), min(max(y0, 0.0), height), min(max(x1, 0.0), width), min(max(y1, 0.0), height)]
    if inside[2] <= inside[0] or inside[3] <= inside[1]:
        raise ValueError(f"its box lies outside the image of {width} x {height} pixels")
    return inside, inside != [*corners]


def presence_of(images: Sequence[AnnotatedImage], classes: int) -> NDArray[np.int8]:
    """(N, classes) int8: 1 where an object of the class is shown, 0 where all of them are difficult, -1 where there is none."""
    presence = np.full((len(images), classes), -1, np.int8)
    for row, image in enumerate(images):
        numbers = image.boxes[:, 4].astype(np.int64)
        presence[row, numbers] = 0
        presence[row, numbers[~image.flags[:, 0]]] = 1
    return presence


def file_size(file: Path) -> tuple[int, int]:
    """Height and width of an image file, from its header.

    Raises:
        Unreadable: it is no image, or cannot be read.
    """
    try:
        return _size_as_of(str(file), file_version(file.stat()))
    except OSError as error:
        raise Unreadable(error.strerror or str(error)) from error


@lru_cache(maxsize=1 << 17)  # a data set is listed more than once in a process
def _size_as_of(file: str, version: FileVersion) -> tuple[int, int]:
    return image_size(Path(file), MAX_PIXELS)


def require_size(file: Path, size: tuple[int, int], what: str) -> None:
    """Raise BadAnnotation unless an image file has this height and width; `what` states them, such as ``5.xml, line 9``."""
    try:
        found = file_size(file)
    except Unreadable as error:
        raise BadAnnotation(f"{file.name}: {error}") from error
    if found != size:
        raise BadAnnotation(f"{what}: {size[1]} x {size[0]} pixels, but {file.name} has {found[1]} x {found[0]}")


@dataclass(frozen=True)
class Line:
    """A line of a list with something on it: its number, from 1, and its words."""

    number: int
    words: tuple[str, ...]


def read_list(file: Path) -> list[Line]:
    """The lines of a text file that are not empty.

    Raises:
        UserError: the file cannot be read, or is not text.
    """
    lines = read_text(file).split("\n")
    return [Line(number, tuple(words)) for number, line in enumerate(lines, 1) if (words := line.split())]


def read_text(file: Path) -> str:
    """The text of a list, with line feeds alone at the ends of lines and without a mark of byte order.

    Raises:
        UserError: the file cannot be read, or is not text.
    """
    try:
        if file.stat().st_size > MAX_LIST_BYTES:
            raise UserError(f"{file} is no list of images: it has more than {MAX_LIST_BYTES:,} bytes", WHERE, "Replace it.")
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}", WHERE, "Restore it.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no text in UTF-8: byte {error.start}", WHERE, "Save it as UTF-8.") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def files_below(folder: Path) -> set[str]:
    """The files at any depth, relative to the folder, with `/`."""
    found = set[str]()
    for place, _, files in os.walk(folder):
        below = "" if place == str(folder) else f"{os.path.relpath(place, folder)}/"
        found.update(f"{below}{name}" for name in files)
    return found


def refuse_name(name: str, place: str) -> None:
    """Refuse a name of a list that leads out of the folder of the images.

    Raises:
        UserError: with the place, such as ``train.txt, line 3``.
    """
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ":" in parts[0] or "\0" in name or not {"", ".", ".."}.isdisjoint(parts):
        raise UserError(
            f"{place}: {shown(name)} is no name of an image", WHERE, "Names are given below the folder of the images."
        )


def refuse_twice(names: Sequence[str], places: Sequence[str]) -> None:
    """Refuse a list that names an image twice: it would count twice.

    Raises:
        UserError: with both places.
    """
    seen: dict[str, str] = {}
    for name, place in zip(names, places, strict=True):
        if name in seen:
            raise UserError(f"{place}: {shown(name)} was already named in {seen[name]}", WHERE, "Remove one of the two lines.")
        seen[name] = place


def refuse_shared(names: Mapping[str, Sequence[str]]) -> None:
    """Refuse splits that share an image: a network would be judged on what it was trained on.

    Args:
        names: split -> names of its images.

    Raises:
        UserError: it names the splits and an image.
    """
    splits = list(names)
    for index, first in enumerate(splits):
        for second in splits[index + 1 :]:
            if both := set(names[first]) & set(names[second]):
                raise UserError(
                    f"{counted(len(both), 'image is', 'images are')} in {first} and in {second}, such as {min(both)}",
                    WHERE,
                    "Use lists of different images.",
                )


def left_out(split: str, wrong: Mapping[str, str], total: int, limit: float) -> list[str]:
    """A warning about the images of a split whose annotation is wrong, or none; they are left out of the training images.

    Args:
        wrong: name of the image -> where and what.
        total: images of the split, with these.
        limit: `max_unreadable` of the data set.

    Raises:
        UserError: there are more than `limit` allows, or the split judges.
    """
    if not wrong:
        return []
    first = "; ".join(list(wrong.values())[:3])
    found = some_of(len(wrong), total, "image", ("cannot", "cannot"))
    if split != "train":
        raise UserError(
            f"{found} be used, and of {split}, which judges, none is left out: {first}",
            WHERE,
            "Repair or restore the files, or take these images out of the list.",
        )
    if len(wrong) > limit * total:
        raise UserError(
            f"{found} be used, more than max_unreadable={limit:g} allows: {first}",
            WHERE,
            "Repair or restore the files, or raise max_unreadable of the data set.",
        )
    return [f"left out of {split}, because {found} be used: {first}"]
