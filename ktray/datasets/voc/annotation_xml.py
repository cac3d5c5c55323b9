"""The XML files of VOC: the size of an image, and its objects with their boxes.

Files may come from anywhere, so they are parsed by expat with limits: no document type and so no entities, at most 8 MiB, at
most 32 elements inside each other, at most 100,000 objects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NoReturn
from xml.parsers import expat

from ktray.fingerprint import FileVersion, file_version
from ktray.images.annotation_files import (
    MAX_COUNT,
    AnnotatedImage,
    BadAnnotation,
    annotated,
    clipped_box,
    file_size,
    require_size,
)
from ktray.images.source import Unreadable
from ktray.text import near_word, shown

MAX_BYTES = 8 << 20
MAX_DEPTH = 32
MAX_OBJECTS = 100_000
_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_SIZE = ("width", "height")


@dataclass
class Element:
    """An element of which several fields are read: an `object`, its `bndbox`, or the `size`.

    Attributes:
        line: of the file, from 1.
        texts: name of a field -> its text and line.
    """

    line: int
    texts: dict[str, tuple[str, int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Parsed:
    """The texts of one file.

    Attributes:
        size: the element of this name; None if there is none.
        objects: with the corners of their boxes among their texts.
    """

    size: Element | None
    objects: tuple[Element, ...]


def read_annotation(file: Path, image: Path, classes: Mapping[str, int]) -> AnnotatedImage:
    """What an XML file says of an image. VOC counts pixels from 1 and includes both ends; here a box begins at 0.

    Args:
        file: the XML file.
        image: file of the image; its own size must be the one stated, and is used if none is.
        classes: name -> number.

    Raises:
        BadAnnotation: the file is missing or broken, names an unknown class, or has a box outside the image.
    """
    try:
        parsed = _parsed(str(file), file_version(file.stat()))
    except OSError as error:
        raise BadAnnotation(f"{file.name}: {error.strerror}") from error
    try:
        size = _size(parsed.size, file, image)
        boxes, flags, clipped = [], [], 0
        for each in parsed.objects:
            number = _class(each, classes)
            x0, y0, x1, y1 = (_number(each, corner) for corner in _CORNERS)
            corners, was_outside = _in_image((x0 - 1, y0 - 1, x1, y1), size, each)
            clipped += was_outside
            boxes.append([*corners, number])
            flags.append([_flag(each, "difficult"), _flag(each, "truncated"), False])
        return annotated(size, boxes, flags, clipped)
    except _Wrong as error:
        raise BadAnnotation(f"{file.name}, line {error.line}: {error}") from error


def class_names(file: Path) -> list[str]:
    """The names of the classes of all objects in a file.

    Raises:
        BadAnnotation: the file is missing or broken.
    """
    try:
        parsed = _parsed(str(file), file_version(file.stat()))
    except OSError as error:
        raise BadAnnotation(f"{file.name}: {error.strerror}") from error
    return [each.texts["name"][0] for each in parsed.objects if "name" in each.texts]


class _Wrong(Exception):
    """What is wrong in a line of a file."""

    def __init__(self, line: int, problem: str) -> None:
        self.line = line
        super().__init__(problem)


@lru_cache(maxsize=1 << 17)  # a data set is listed more than once in a process
def _parsed(file: str, version: FileVersion) -> Parsed:
    path = Path(file)
    if version[0] > MAX_BYTES:
        raise BadAnnotation(f"{path.name}: larger than {MAX_BYTES:,} bytes")
    try:
        return parse(path.read_bytes())
    except _Wrong as error:
        raise BadAnnotation(f"{path.name}, line {error.line}: {error}") from error


def parse(content: bytes) -> Parsed:
    """The texts of `annotation/size` and of every `annotation/object`; parts of objects and all else is passed over."""
    parser = expat.ParserCreate()
    place: list[str] = []
    text: list[str] = []
    found: dict[str, list[Element]] = {"object": [], "size": []}

    def start(name: str, attributes: object) -> None:
        place.append(name)
        text.clear()
        if len(place) > MAX_DEPTH:
            raise _Wrong(parser.CurrentLineNumber, f"more than {MAX_DEPTH} elements inside each other")
        if len(place) == 1 and name != "annotation":
            raise _Wrong(parser.CurrentLineNumber, f"the file begins with <{name[:40]}>, not with <annotation>")
        if len(place) == 2 and name in found:
            if len(found[name]) >= (MAX_OBJECTS if name == "object" else 1):
                raise _Wrong(parser.CurrentLineNumber, f"too many elements <{name}>")
            found[name].append(Element(parser.CurrentLineNumber))

    def end(name: str) -> None:
        above = place[1:-1]
        kept = above in (["object"], ["size"]) or (above == ["object", "bndbox"] and name in _CORNERS)
        if kept and place[-1] not in ("bndbox", "part"):
            texts = found[above[0]][-1].texts
            if name in texts:
                raise _Wrong(parser.CurrentLineNumber, f"a second <{name[:40]}> of the same <{above[0]}>")
            texts[name] = "".join(text).strip(), parser.CurrentLineNumber
        place.pop()
        text.clear()

    def refuse(*_: object) -> NoReturn:
        raise _Wrong(parser.CurrentLineNumber, "a document type or an entity, which no VOC file has")

    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text.append
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = parser.ExternalEntityRefHandler = refuse
    try:
        parser.Parse(content, True)
    except expat.ExpatError as error:
        raise _Wrong(error.lineno, f"broken XML: {expat.errors.messages.get(error.code, 'unknown error')}") from error
    except (ValueError, LookupError) as error:  # an encoding that does not exist
        raise _Wrong(parser.CurrentLineNumber, f"broken XML: {error}") from error
    return Parsed(next(iter(found["size"]), None), tuple(found["object"]))


def _size(stated: Element | None, file: Path, image: Path) -> tuple[int, int]:
    """Height and width of the image, which the file must state truly; some tools write 0 or nothing."""
    if stated is None or all(stated.texts.get(side, ("0", 0))[0] in ("", "0") for side in _SIZE):
        try:
            return file_size(image)
        except Unreadable as error:
            raise BadAnnotation(f"{image.name}: {error}") from error
    width, height = (_number(stated, side) for side in _SIZE)
    if not (width.is_integer() and height.is_integer() and 0 < width <= MAX_COUNT and 0 < height <= MAX_COUNT):
        raise _Wrong(stated.line, f"an image of {width:g} x {height:g} pixels")
    size = int(height), int(width)
    require_size(image, size, f"{file.name}, line {stated.line}")
    return size


def _number(element: Element, name: str) -> float:
    text, line = element.texts.get(name, ("", element.line))
    if not text:
        raise _Wrong(line, f"<{name}> is missing")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or "_" in text:
        raise _Wrong(line, f"<{name}> is {shown(text, 40)}, not a number")
    return value


def _class(element: Element, classes: Mapping[str, int]) -> int:
    name, line = element.texts.get("name", ("", element.line))
    if name not in classes:
        near = near_word(name, classes)
        raise _Wrong(line, f"unknown class {shown(name, 60)}{f'; did you mean {near!r}?' if near else ''}")
    return classes[name]


def _flag(element: Element, name: str) -> bool:
    """Whether an object is difficult or truncated; some files say nothing, or that it is not specified."""
    text, line = element.texts.get(name, ("0", element.line))
    if text in ("1", "0"):
        return text == "1"
    if text.lower() in ("", "unspecified"):
        return False
    raise _Wrong(line, f"<{name}> is {shown(text, 40)}, not 0 or 1")


def _in_image(corners: tuple[float, ...], size: tuple[int, int], element: Element) -> tuple[list[float], bool]:
    try:
        if corners[2] < 1 and corners[3] < 1:
            raise ValueError("its box ends within the first pixel, as one in shares of the sides does; VOC states pixels")
        return clipped_box(corners, size)
    except ValueError as error:
        raise _Wrong(element.texts["xmin"][1], f"{element.texts['name'][0]}: {error}") from error
