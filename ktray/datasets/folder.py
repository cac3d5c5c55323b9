"""Image files in a folder, at any depth, without labels.

JPEG, PNG, WebP, BMP, GIF, TIFF, PPM; grey, palette, transparent and 16-bit images become RGB, see
`ktray.images.decoding`. If all outermost folders are named like splits, such as `Training` and `Testing`, they are splits.

Source: your own files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

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
    data_folder,
    decoder,
    folder_tree,
)
from ktray.images.folder_tree import WHERE, ImageFile
from ktray.spec import Split
from ktray.strict import StrictSpec
from ktray.text import counted

REVISION = 1
LOCATION: tuple[str, ...] = ("path",)


class Spec(StrictSpec):
    """A folder of unlabelled images. Without a folder for validation, the share `split.val` is held out."""

    kind: Literal["folder"] = "folder"
    path: str
    size: int = Field(default=64, ge=8, le=2048, description="side in pixels to which images are resized")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")
    max_pixels: MaxPixels = MAX_PIXELS
    range: PixelRange = None


def annotations_of(spec: Spec) -> tuple[str, ...]:
    """Images alone."""
    return ()


def load(spec: Spec) -> Splits:
    """List the folder.

    Raises:
        UserError: the folder does not exist, contains no images, or has splits beside other folders.
    """
    root = data_folder(spec.path)
    tree = folder_tree.read_tree(root)
    if not tree.images:
        raise UserError(
            f"there are no image files in {root}{folder_tree.but_others(tree)}",
            where=WHERE,
            instead="Images are recognised by their suffix, such as .jpg or .png.",
        )
    folders = folder_tree.split_folders(tree, root, labelled=False)
    for of_split in folders.values():
        folder_tree.refuse_splits_below(tree.at(of_split), root.joinpath(*of_split))
    files = {split: folder_tree.in_order(tree.at(of_split), len(of_split)) for split, of_split in folders.items()}
    sources = {split: _source(listed, spec) for split, listed in files.items()}
    return Splits(
        train=sources["train"],
        val=sources.get("val"),
        test=sources.get("test"),
        files=tuple((file.name, file.path) for listed in files.values() for file in listed),
        layout=Layout(
            read_from=folder_tree.read_from(tree, folders),
            order=folder_tree.ORDER,
            left_out=tree.all_left_out(),
            warnings=tuple(folder_tree.warnings_about(tree, files)),
        ),
    )


def recognise(path: Path) -> Recognised | None:
    """Any folder with images, without labels."""
    if not path.is_dir() or not (images := folder_tree.read_tree(path).images):
        return None
    return Recognised({"path": str(path)}, f"{counted(images, 'image file')}, whose folders name no classes", 0)


def _source(files: Sequence[ImageFile], spec: Spec) -> Source:
    read, original = decoder(spec), folder_tree.paths(files)
    return Source(names=tuple(file.name for file in files), read=lambda index: read(original(index)), original=original)
