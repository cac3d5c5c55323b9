"""Images as a pretrained network's own weights expect them: resized and cropped from the original, by timm's own transform."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ktray.errors import UserError
from ktray.fingerprint import canonical
from ktray.images.decoding import MAX_PIXELS, decode_whole
from ktray.images.source import Source, Unreadable
from ktray.spec import DataSpec

IDENTITY, REVISION = "own_crop", 1

OwnCrop = Mapping[str, Any]
"""How an image is resized and cropped, as plain data: ``size``, ``crop_pct``, ``crop_mode``, ``interpolation``, ``fill``."""


def crop_of(pixels: NDArray[np.uint8], own: OwnCrop) -> NDArray[np.uint8]:
    """The input (size, size, 3) uint8 of a network for an image (h, w, 3) uint8, before it is normalised.

    Raises:
        Unreadable: the image is so long and narrow that it would have too many pixels once its shorter side is resized.

    Source: Wightman, PyTorch Image Models, doi:10.5281/zenodo.4414861: `timm.data.create_transform`.
    """
    height, width = pixels.shape[:2]
    if own["crop_mode"] == "center":
        scale = own["size"] / own["crop_pct"] / min(height, width)
        if height * width * scale**2 > MAX_PIXELS:
            raise Unreadable(f"{width} x {height} pixels are too long and narrow to resize the shorter side and crop")
    cropped = _transform(canonical(dict(own)))(Image.fromarray(pixels))
    return np.ascontiguousarray(cropped.permute(1, 2, 0).numpy())


@lru_cache(maxsize=8)
def _transform(own: str) -> Callable[[Image.Image], Any]:
    try:
        from timm.data.transforms_factory import create_transform
    except ModuleNotFoundError as error:
        raise UserError("images for a pretrained network need the package timm", instead="pip install 'ktray[timm]'") from error

    plain = json.loads(own)
    made: Callable[[Image.Image], Any] = create_transform(
        input_size=(3, plain["size"], plain["size"]),
        is_training=False,
        interpolation=plain["interpolation"],
        crop_pct=plain["crop_pct"],
        crop_mode=plain["crop_mode"],
        mean=tuple(plain.get("fill", (0.5, 0.5, 0.5))),  # the colour of a border; nothing is normalised here
        normalize=False,
    )
    return made


def decoder_of_crops(spec: DataSpec, own: OwnCrop) -> Callable[[bytes | Path], NDArray[np.uint8]]:
    """A function: encoded image -> the input of a network, from all of its pixels; errors as of `decode`."""
    return lambda encoded: crop_of(decode_whole(encoded, spec), own)


def cropped(source: Source, spec: DataSpec, own: OwnCrop) -> Source:
    """The same images, read as the inputs of a network. Boxes of squares are left out, for the crop is another one."""

    def read(index: int) -> NDArray[np.uint8]:
        encoded = source.original or source.encoded
        if encoded is None:
            return crop_of(source.read(index), own)
        size = None if source.sizes is None else (int(source.sizes[index, 0]), int(source.sizes[index, 1]))
        return crop_of(decode_whole(encoded(index), spec, None, size), own)

    boxes = source.boxes if source.sizes is not None else None
    return replace(source, read=read, boxes=boxes, box_flags=source.box_flags if boxes is not None else None)
