"""Encoded images in a column of parquet files, as published on data-set hubs.

The column holds the bytes themselves or a struct with a field `bytes`. The split of a file follows from the words of its path,
wherever they stand: `train-00000-of-00002.parquet`, `Testing/0000.parquet`, `cifar_val.parquet`. Classes are matched between
files by name: each file numbers its labels by its own metadata. Rows are streamed, so only a few dozen are in memory at a time.

Source: your own files, in the layout of Hugging Face's image data sets.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Literal

from pydantic import Field

from ktray.datasets.parquet.class_labels import Labels, read_labels
from ktray.datasets.parquet.footers import ParquetFile, open_file
from ktray.datasets.parquet.row_reading import refuse_empty_images, row_reader
from ktray.errors import UserError
from ktray.images import (
    MAX_PIXELS,
    Layout,
    MaxPixels,
    PixelRange,
    Recognised,
    Source,
    Splits,
    data_folder,
    decoder,
    folder_tree,
)
from ktray.images.file_patterns import list_files, missing_parts, names_by_split, refuse_the_same_file_twice, some
from ktray.images.split_words import SPLITS
from ktray.spec import Split
from ktray.strict import StrictSpec

REVISION = 1
LOCATION: tuple[str, ...] = ("path",)
SUFFIXES = (".parquet", ".parq", ".pq")


class Spec(StrictSpec):
    """`path` is a file, a folder or a pattern (`/p/**/*.parquet`); with `label: null`, no labels are read."""

    kind: Literal["parquet"] = "parquet"
    path: str
    image: str | None = Field(default=None, description="column with the images; null: the only column that can hold images")
    label: str | None = Field(default=None, description="column with the labels: text, or numbers that the metadata may name")
    size: int = Field(default=64, ge=8, le=2048, description="side in pixels to which images are resized")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")
    max_pixels: MaxPixels = MAX_PIXELS
    range: PixelRange = None


def annotations_of(spec: Spec) -> tuple[str, ...]:
    """Labels, if their column is named."""
    return () if spec.label is None else ("labels",)


def load(spec: Spec) -> Splits:
    """Find the files and read their footers and label columns.

    Raises:
        UserError: there are no files, a file is damaged or its split is unclear, a column is missing or of the wrong type, or
            labels of one file cannot be matched with those of another.
    """
    try:
        source = data_folder(spec.path)
        paths, left_out = list_files(source, SUFFIXES)
    except (OSError, RuntimeError) as error:  # a name too long, a folder above that may not be entered, no home of ~user
        raise UserError(f"{spec.path} cannot be read: {error}", "data.path", "Give the path of a file or folder.") from error
    names, warnings = names_by_split(list(paths), source)
    by_split = {
        split: [open_file(name, paths[name], spec.image, spec.label) for name in names[split]]
        for split in SPLITS
        if split in names
    }
    files = [file for members in by_split.values() for file in members]
    refuse_the_same_file_twice({file.name: file.path for file in files})
    _refuse_other_columns(files)
    by_split, without_rows = _with_rows(by_split)
    refuse_empty_images(next(file for file in by_split["train"] if file.rows))
    labels = read_labels(by_split, spec.label) if spec.label is not None else Labels()
    decode, sources = decoder(spec), {}
    for split, members in by_split.items():
        encoded = row_reader(members)
        sources[split] = Source(
            names=tuple(f"{file.name}#{row}" for file in members for row in range(file.rows)),
            read=lambda index, encoded=encoded: decode(encoded(index)),  # type: ignore[misc]
            labels=labels.of_split.get(split),
            classes=labels.classes if split in labels.of_split else (),
            encoded=encoded,
        )
    layout = Layout(
        read_from={split: {file.name: file.rows for file in members} for split, members in by_split.items()},
        classes=labels.origin,
        order="files by name, rows as in their file",
        left_out=left_out,
        warnings=(
            *warnings,
            *without_rows,
            *missing_parts(file.name for file in files),
            *_namesakes(by_split),
            *labels.warnings,
        ),
    )
    return Splits(
        train=sources["train"],
        val=sources.get("val"),
        test=sources.get("test"),
        files=tuple(sorted((file.name, file.path) for file in files)),
        layout=layout,
    )


_LABELS = ("label", "labels", "class", "category", "target", "y", "fine_label", "label_name", "class_name")


def recognise(path: Path) -> Recognised | None:
    """A parquet file with images, or a folder of such files; the label is a column with one of the usual names.

    Raises:
        UserError: a file is damaged, or it is not clear which column holds the images.
    """
    if path.is_file() and path.suffix.lower() not in SUFFIXES:
        return None
    if path.is_dir() and ((tree := folder_tree.read_tree(path)).images or not set(SUFFIXES) & tree.all_left_out().keys()):
        return None
    names, _ = list_files(path, SUFFIXES)
    name, first = next(iter(names.items()))
    file = open_file(name, first, None, None)
    columns = [each for each in file.schema.names if each != file.image.name]
    label = next((each for word in _LABELS for each in columns if each.lower() == word), None)
    said = f"labels from its column {label!r}" if label else f"no column is called like a label, of {some(columns) or 'none'}"
    because = f"{len(names)} parquet file{'s' * (len(names) != 1)} with images in {file.image.dotted!r}; {said}"
    return Recognised({"path": str(path), **({"label": label} if label else {})}, because, 2)


def _refuse_other_columns(files: list[ParquetFile]) -> None:
    examples = {file.image.name: file.name for file in reversed(files)}
    if len(examples) > 1:
        found = some(f"{column} in {name}" for column, name in reversed(examples.items()))
        raise UserError(f"the images are in differently named columns: {found}", "data.image", "Rename them alike.")


def _with_rows(by_split: dict[str, list[ParquetFile]]) -> tuple[dict[str, list[ParquetFile]], list[str]]:
    """The splits that have rows, and warnings about the others."""
    empty = [split for split, members in by_split.items() if not any(file.rows for file in members)]
    if "train" in empty:
        raise UserError(f"the training files have no rows: {some(file.name for file in by_split['train'])}", "data.path")
    return (
        {split: members for split, members in by_split.items() if split not in empty},
        [f"there is no {split} split: {some(file.name for file in by_split[split])} has no rows" for split in empty],
    )


def _namesakes(by_split: dict[str, list[ParquetFile]]) -> list[str]:
    """A warning where files of one split have the same name in different folders, as configurations of one data set have."""
    found = []
    for split, members in by_split.items():
        folders: dict[str, list[str]] = defaultdict(list)
        for file in members:
            folder, _, name = file.name.rpartition("/")
            folders[name].append(folder or ".")
        name, several = max(folders.items(), key=lambda item: len(item[1]))
        if len(several) > 1:
            where = f"{len(several)} folders ({some(several)})"
            found.append(f"{split} has a {name} from each of {where}; if they hold the same images, give one of them")
    return found
