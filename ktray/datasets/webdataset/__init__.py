"""Images in tar files, as WebDataset writes and reads them (shards).

The files of a sample stand side by side and have one name up to the first dot: `0017.jpg` and `0017.cls`. A tar file's split
follows from the words of its path, as in `train-000000.tar`. Only headers and labels are read to list images, each image is
decoded from its place in the tar file, and nothing is unpacked. The package `webdataset` is not used: it streams, and cannot
be asked for the n-th image, which sampling and resuming need.

Source: your own files, in the layout of github.com/webdataset/webdataset (its README, "The WebDataset Format").
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ktray.datasets.webdataset.tar_members import WHERE, members
from ktray.errors import UserError
from ktray.fingerprint import file_version
from ktray.images import (
    MAX_PIXELS,
    Layout,
    MaxPixels,
    PixelRange,
    Recognised,
    Source,
    Splits,
    Unreadable,
    data_folder,
    decoder,
    folder_tree,
)
from ktray.images.class_folders import refuse_unknown_classes
from ktray.images.file_patterns import list_files, missing_parts, names_by_split, refuse_the_same_file_twice, some
from ktray.spec import Split
from ktray.strict import StrictSpec
from ktray.text import as_read, counted, some_of, written_differently

REVISION = 1
LOCATION: tuple[str, ...] = ("path",)
SUFFIXES = (".tar",)

_THREADS = 8
_MAX_LABEL = 1 << 20  # bytes of a file with a label
_MAX_SHARDS = 1_000_000
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


class Spec(StrictSpec):
    """`path` is a tar file, a folder, a pattern or a range (`/p/train-{000000..000146}.tar`); with `label: null`, no labels."""

    kind: Literal["webdataset"] = "webdataset"
    path: str
    image: str | None = Field(default=None, description="ending of the image in a sample (jpg); null: the only one of an image")
    label: str | None = Field(
        default=None, description="ending of the file with the label (cls), or a field of one (json:label)"
    )
    size: int = Field(default=64, ge=8, le=2048, description="side in pixels to which images are resized")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")
    max_pixels: MaxPixels = MAX_PIXELS
    range: PixelRange = None


def annotations_of(spec: Spec) -> tuple[str, ...]:
    """Labels, if their ending is named."""
    return () if spec.label is None else ("labels",)


@dataclass(frozen=True)
class _Shard:
    """The samples with an image in one tar file.

    Attributes:
        names: of the images in the tar file, by sample.
        starts: (n,) int64 of their bytes.
        sizes: (n,) int64 in bytes.
        labels: text of each label, None where there is none.
        left_out: what was left out, by ending or as a phrase.
    """

    names: tuple[str, ...]
    starts: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: tuple[str | None, ...]
    left_out: Mapping[str, int]


def load(spec: Spec) -> Splits:
    """List the tar files by their headers, eight at a time.

    Raises:
        UserError: there are none, one is compressed, damaged or cut off, its split is unclear, a sample has several images and
            `image` does not say which, a name is there twice, or a label is missing or is written in two ways.
    """
    paths, left_out, source = _tar_files(spec.path)
    refuse_the_same_file_twice(paths)
    names, warnings = names_by_split(list(paths), source)
    with ThreadPoolExecutor(_THREADS) as threads:
        indexed = threads.map(
            lambda path: _indexed(str(path), file_version(path.stat()), spec.image, spec.label), paths.values()
        )
        shards = dict(zip(paths, indexed, strict=True))
    found = {split: {name: shards[name] for name in of_split} for split, of_split in names.items()}
    empty = [split for split, of_split in found.items() if not any(shard.names for shard in of_split.values())]
    counts = sum((Counter(shard.left_out) for shard in shards.values()), Counter(left_out))
    if "train" in empty:
        others = some(f"{count} {what}" for what, count in counts.most_common())
        raise UserError(
            f"the tar files for training hold no images{f' (but {others})' if others else ''}: {some(found['train'])}",
            WHERE,
            "Images are recognised by their ending, such as .jpg or .png; 'image' may name another one.",
        )
    found = {split: of_split for split, of_split in found.items() if split not in empty}
    labels, classes = _labels(found, spec.label) if spec.label is not None else ({}, ())
    sources = {split: _source(of_split, paths, spec, labels.get(split), classes) for split, of_split in found.items()}
    warnings += [f"there is no {split} split: {some(names[split])} hold no images" for split in empty]
    return Splits(
        train=sources["train"],
        val=sources.get("val"),
        test=sources.get("test"),
        files=tuple(sorted(paths.items())),
        layout=Layout(
            read_from={
                split: {name: len(shard.names) for name, shard in of_split.items()} for split, of_split in found.items()
            },
            classes=f"the texts in {spec.label!r}, {'by number' if _numbers(classes) else 'sorted'}" if classes else "",
            order="tar files by name, samples as in their file",
            left_out=dict(counts.most_common()),
            warnings=(*warnings, *missing_parts(paths), *_gaps(paths)),
        ),
    )


def recognise(path: Path) -> Recognised | None:
    """A tar file with images, or a folder of them; the label is the file `cls`.

    Raises:
        UserError: one is damaged, or it is not clear which file of a sample is its image.
    """
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        return None
    if path.is_dir() and ((tree := folder_tree.read_tree(path)).images or not set(SUFFIXES) & tree.all_left_out().keys()):
        return None
    files, _ = list_files(path, SUFFIXES)
    first = next(iter(files.values()))
    shard = _indexed(str(first), file_version(first.stat()), None, "cls")
    if not shard.names:
        return None
    label = {"label": "cls"} if any(label is not None for label in shard.labels) else {}
    said = "labels from their files .cls" if label else "no file .cls with labels"
    return Recognised({"path": str(path), **label}, f"{counted(len(files), 'tar file')} with images; {said}", 2)


# --- which tar files


def _tar_files(path: str) -> tuple[dict[str, Path], dict[str, int], Path]:
    """Name -> tar file, what was left out, and the path from which splits are told."""
    try:
        if not _RANGE.search(path) or data_folder(path).exists():
            source = data_folder(path)
            return *list_files(source, SUFFIXES), source
        listed: dict[Path, None] = {}
        left_out: Counter[str] = Counter()
        for each in _expanded(path):
            files, others = list_files(data_folder(each), SUFFIXES)
            listed |= dict.fromkeys(files.values())
            left_out += Counter(others)
        root = Path(os.path.commonpath([file.parent for file in listed]))
        named = {os.fsencode(file.relative_to(root)).decode("utf-8", "backslashreplace"): file for file in listed}
        return dict(sorted(named.items())), dict(left_out), root / "*"
    except (OSError, RuntimeError) as error:  # a name too long, a folder above that may not be entered, no home of ~user
        raise UserError(f"{path} cannot be read: {error}", WHERE, "Give the path of a file or folder.") from error


def _expanded(path: str) -> Iterator[str]:
    """The paths that a range in braces stands for, with as many digits as its first number: `{08..11}`.

    Raises:
        UserError: the range ends before it begins, or is longer than any data set.
    """
    pieces = _RANGE.split(path)
    ends = list(zip(pieces[1::3], pieces[2::3], strict=True))
    count = 1
    for first, last in ends:
        count *= int(last) - int(first) + 1
        if int(last) < int(first) or count > _MAX_SHARDS:
            raise UserError(f"the range {{{first}..{last}}} is empty or too long", WHERE, "Write such as {000000..000146}.")
    choices = [[f"{number:0{len(first)}d}" for number in range(int(first), int(last) + 1)] for first, last in ends]
    for numbers in itertools.product(*choices):
        yield "".join(itertools.chain(*itertools.zip_longest(pieces[::3], numbers, fillvalue="")))


_NUMBERED = re.compile(r"(.*?)(\d{4,})(\.tar)", re.IGNORECASE)


def _gaps(names: Mapping[str, Path]) -> list[str]:
    """A warning for each series such as `train-000000.tar`, `train-000001.tar` with numbers missing between."""
    series: dict[str, list[int]] = {}
    for match in filter(None, map(_NUMBERED.fullmatch, names)):
        if not re.search(r"-of-$", match[1]):
            series.setdefault(match[1], []).append(int(match[2]))
    return [
        f"there are only {len(found)} of the {max(found) - min(found) + 1} files {start}{min(found)} to {max(found)}"
        for start, found in series.items()
        if max(found) - min(found) + 1 > len(found)
    ]


# --- the samples of one tar file


@lru_cache(maxsize=4096)  # a search asks for the same data again and again, and their images are read by several stages
def _indexed(path: str, version: Any, image: str | None, label: str | None) -> _Shard:
    """The samples of a tar file, which is listed once in this version."""
    endings = None if image is None else {each.strip().lower().lstrip(".") for each in image.split(";")}
    ending_of_label, _, field = (label or "").partition(":")
    ending_of_label = ending_of_label.lower().lstrip(".")
    listed, others = members(Path(path), lambda name, size: 0 < size <= _MAX_LABEL and _parts(name)[1] == ending_of_label)
    names, places, labels, seen = [], [], [], set()
    left_out = Counter(others)
    of_samples = [each for each in listed if all(_parts(each.name))]
    left_out["hidden files and names without an ending"] += len(listed) - len(of_samples)
    for key, of_sample in itertools.groupby(of_samples, key=lambda each: _parts(each.name)[0]):
        images, text = [], None
        for member in of_sample:
            ending = _parts(member.name)[1]
            if _is_image(ending, endings):
                images.append(member)
            elif member.content is not None:
                text = _label_text(member.content, field, f"{path}: {member.name}")
            else:
                left_out[f".{ending}"] += 1
        if not images:
            left_out["samples without an image"] += 1
            continue
        if len(images) > 1:
            raise UserError(
                f"the sample {key} in {path} has several images: {some(each.name for each in images)}",
                "data.image",
                f"Name the ending of the right one, such as image={_parts(images[0].name)[1]}.",
            )
        if key in seen:
            raise UserError(
                f"the sample {key} is twice in {path}, with other samples between",
                WHERE,
                "Put the files of a sample side by side.",
            )
        seen.add(key)
        names.append(images[0].name)
        places.append((images[0].start, images[0].size))
        labels.append(text)
    rows = np.array(places, np.int64).reshape(-1, 2)
    return _Shard(tuple(names), rows[:, 0].copy(), rows[:, 1].copy(), tuple(labels), dict(+left_out))


def _parts(name: str) -> tuple[str, str]:
    """A sample's name and an ending in lower case: `a/b.seg.png` is `a/b` and `seg.png`; both empty for what is no sample."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return (f"{folder}{slash}{stem}", ending.lower()) if stem and not stem.startswith("__") else ("", "")


def _is_image(ending: str, endings: set[str] | None) -> bool:
    return f".{ending.rpartition('.')[2]}" in folder_tree.SUFFIXES if endings is None else ending in endings


def _label_text(content: bytes, field: str, where: str) -> str | None:
    """The label in a file as text; None if it is hidden: empty, null or -1.

    Raises:
        UserError: it is neither a text nor a number.
    """
    try:
        value: Any = content.decode("utf-8").strip()
        if field:
            value = json.loads(value)
            for name in field.split("."):
                value = value[name] if isinstance(value, dict) and name in value else None
        if isinstance(value, list | dict | float):
            raise ValueError("a label is a whole number or a text")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no label: {error}", "data.label", "Name the file or field with one class.") from error
    text = "" if value is None else str(value).strip()
    return None if text in ("", "-1") else text


# --- labels and pixels


def _labels(found: Mapping[str, Mapping[str, _Shard]], label: str) -> tuple[dict[str, NDArray[np.int64]], tuple[str, ...]]:
    """Numbers of classes by split, and the names of the classes.

    Raises:
        UserError: some labels are missing, or names do not fit each other.
    """
    texts = {}
    for split, of_split in found.items():
        named = [
            (name, key, text) for name, shard in of_split.items() for key, text in zip(shard.names, shard.labels, strict=True)
        ]
        without = [f"{name}/{key}" for name, key, text in named if text is None]
        if without and (split == "train" or len(without) < len(named)):
            how_many = some_of(len(without), len(named), "image", ("has", "have"))
            raise UserError(
                f"{how_many} no label in {label!r} ({split}): {some(without, 3)}",
                "data.label",
                "Leave 'label' out, or give every image one; only a whole test split may have none.",
            )
        if not without:
            texts[split] = [_plain(text or "") for _, _, text in named]
    unsorted = set(texts["train"])
    numeric = [name for name in unsorted if _is_number(name)]
    if numeric and len(numeric) < len(unsorted):
        problem = f"{label!r} holds numbers ({some(numeric, 3)}) beside names ({some(sorted(unsorted - set(numeric)), 3)})"
        raise UserError(problem, "data.label", "Label all images in one way.")
    classes = tuple(sorted(unsorted, key=int) if numeric else sorted(unsorted))
    alike: dict[str, str] = {}
    for name in classes:
        other = alike.setdefault(as_read(name), name)
        if other != name and not numeric:
            raise UserError(f"{label!r}: {written_differently(other, name)}", "data.label", "Write one class in one way.")
    for split, of_labels in texts.items():
        refuse_unknown_classes(of_labels, classes, f"the {split} split")
    number = {name: at for at, name in enumerate(classes)}
    return {split: np.array([number[text] for text in of_split], np.int64) for split, of_split in texts.items()}, classes


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _plain(text: str) -> str:
    """A label as it counts: 07 is the class 7."""
    return str(int(text)) if _is_number(text) else text


def _numbers(classes: Sequence[str]) -> bool:
    return all(map(_is_number, classes))


def _source(
    shards: Mapping[str, _Shard],
    paths: Mapping[str, Path],
    spec: Spec,
    labels: NDArray[np.int64] | None,
    classes: tuple[str, ...],
) -> Source:
    """The images of a split; each is read from its place in its tar file, which is opened for it."""
    read = _reader([(paths[name], shard) for name, shard in shards.items()])
    decode = decoder(spec)
    return Source(
        names=tuple(f"{name}/{key}" for name, shard in shards.items() for key in shard.names),
        read=lambda index: decode(read(index)),
        labels=labels,
        classes=classes if labels is not None else (),
        original=read,
    )


def _reader(shards: Sequence[tuple[Path, _Shard]]) -> Callable[[int], bytes]:
    """A function index -> encoded bytes, for images numbered across all tar files in order.

    Raises:
        Unreadable: raised by the returned function: fewer bytes are there than when the tar file was listed.
    """
    first = np.cumsum([0, *(len(shard.names) for _, shard in shards)])

    def read(index: int) -> bytes:
        number = int(np.searchsorted(first, index, side="right")) - 1
        path, shard = shards[number]
        within = index - int(first[number])
        with open(path, "rb", buffering=0) as file:
            content = os.pread(file.fileno(), int(shard.sizes[within]), int(shard.starts[within]))
        if len(content) != shard.sizes[within]:
            raise Unreadable("the tar file is shorter than when it was listed")
        return content

    return read
