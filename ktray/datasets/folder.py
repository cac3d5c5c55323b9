"""Image files in a folder, at any depth, without labels.

JPEG, PNG, WebP, BMP, GIF, TIFF, PPM; grey, palette, transparent and 16-bit images become RGB, see
`ktray.images.decoding`.

Source: your own files.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ktray.errors import UserError
from ktray.images import Source, Splits, data_folder, decode, list_images
from ktray.spec import Split
from ktray.strict import StrictSpec

REVISION = 1
LOCATION: tuple[str, ...] = ("path",)


class Spec(StrictSpec):
    """A folder of unlabelled images. The share `split.val` is held out for validation; there is no test split."""

    kind: Literal["folder"] = "folder"
    path: str
    size: int = Field(default=64, ge=8, le=2048, description="side in pixels to which images are resized")
    split: Split = Split()
    max_unreadable: float = Field(default=0.01, ge=0, le=1, description="largest tolerated share of unreadable images")


def load(spec: Spec) -> Splits:
    """List the folder.

    Raises:
        UserError: the folder does not exist or contains no images.
    """
    root = data_folder(spec.path)
    files = list_images(root)
    if not files:
        raise UserError(
            f"there are no image files in {root}", instead="Images are recognised by their suffix, such as .jpg or .png."
        )
    paths = tuple(path for _, path in files)
    return Splits(
        train=Source(names=tuple(name for name, _ in files), read=lambda index: decode(paths[index], spec.size)), files=files
    )
