"""Decoding: from encoded bytes to a square uint8 RGB image."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ktray.images.source import Unreadable

IDENTITY, REVISION = "image_decoding", 1

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no format that runs a program, as EPS does
# What Pillow's parsers raise for truncated or corrupt files; MemoryError is deliberately not included.
_CORRUPT = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    NotImplementedError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTATION = 0x0112


def decode(encoded: bytes | Path, size: int) -> NDArray[np.uint8]:
    """The pixels (h, w, 3) uint8 of an encoded image, upright, with enough resolution for a square of side `size`.

    Grey is repeated to three channels, 16-bit grey keeps its upper 8 bits, transparency becomes white, EXIF orientation is
    applied, only the first frame of an animation is used, and colour profiles are ignored. A large JPEG is decoded at 1/2, 1/4
    or 1/8 of its resolution, as long as both sides stay at least twice `size`.

    Raises:
        Unreadable: corrupt, of an unknown format, or with more pixels than Pillow's limit against decompression bombs.
    """
    try:
        with Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, formats=_FORMATS) as image:
            # Pillow only warns up to twice its limit.
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise Unreadable(f"{image.width} x {image.height} pixels exceed the limit of {Image.MAX_IMAGE_PIXELS}")
            image.draft(None, (2 * size, 2 * size))
            image.load()
            turn = _UPRIGHT.get(_orientation(image))
            rgb = _rgb(image)
    except UnidentifiedImageError as error:  # its message is only the path or a memory address
        raise Unreadable("unknown image format") from error
    except _CORRUPT as error:
        raise Unreadable(f"{type(error).__name__}: {_message(error)}") from error
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def _message(error: BaseException) -> str:
    """The message of an error without the path; images are listed by names relative to the data set."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _CORRUPT:
        return 1  # the pixels are intact: damaged metadata is no reason to drop the image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        if wide.min() < 0 or wide.max() > 0xFFFF:
            raise Unreadable("32-bit pixels have no known range")
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise Unreadable("floating point pixels have no known range")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _centre(height: int, width: int) -> tuple[float, float, float]:
    """Left, top and side of the largest centred square, in pixels."""
    side = min(height, width)
    return (width - side) / 2, (height - side) / 2, float(side)


def fit(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The centred square of `pixels` (h, w, 3) uint8, resized to (size, size, 3) by antialiased bilinear interpolation.

    Equivalent to resizing the shorter side and cropping, without a long intermediate image for extreme aspect ratios. An image
    of the right size is returned unchanged.
    """
    height, width = pixels.shape[:2]
    if height == width == size:
        return pixels
    left, top, side = _centre(height, width)
    square = (left, top, left + side, top + side)
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR, box=square))


def fit_boxes(boxes: NDArray[np.float32], height: int, width: int, size: int) -> NDArray[np.float32]:
    """`boxes` (n, 5) [x0, y0, x1, y1, class] of a (height, width) image after `fit`: clipped, (m, 5) with m <= n.

    Boxes outside the centred square are left out.
    """
    left, top, side = _centre(height, width)
    moved = boxes.astype(np.float32, copy=True)
    corners = (moved[:, :4] - np.array([left, top, left, top], np.float32)) * np.float32(size / side)
    moved[:, :4] = corners.clip(0, size)
    return moved[(moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])]
