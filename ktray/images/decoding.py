"""Decoding: from encoded bytes to a square uint8 RGB image."""

from __future__ import annotations

import contextlib
import io
import logging
import math
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError
from pydantic import AfterValidator, BeforeValidator, Field

from ktray.images.source import Unreadable

IDENTITY, REVISION = "image_decoding", 2

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

# What Pillow says of a damaged or large image is said once, in the list of unreadable images, and not on the screen for each.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

MAX_PIXELS = 1024**3 // 4 // 3  # Pillow's own limit
MaxPixels = Annotated[
    int, Field(ge=1, le=2**31 - 1, description="pixels of the largest image that is decoded; larger ones count as unreadable")
]


def _range(value: Any) -> Any:
    """``0,4095``, as in a data set's text form, as two numbers; anything else is left to pydantic."""
    parts = value.split(",") if isinstance(value, str) else value
    try:
        return [float(part) for part in parts] if isinstance(value, str) else value
    except ValueError:
        return value


def _ascending(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] < value[1]):
        raise ValueError(f"the first number must be smaller than the second, both finite: {list(value)}")
    return value


PixelRange = Annotated[
    tuple[float, float] | None,
    BeforeValidator(_range),
    AfterValidator(_ascending),
    Field(
        description="values of grey images of more than 8 bits that become black and white, such as [0, 4095]; "
        "null: all values of 16 bits, and no others are read"
    ),
]


def decode(
    encoded: bytes | Path, size: int, max_pixels: int = MAX_PIXELS, pixel_range: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """The pixels (h, w, 3) uint8 of an encoded image, upright, with enough resolution for a square of side `size`.

    Grey is repeated to three channels, transparency becomes white, EXIF orientation is applied, only the first frame of an
    animation is used, and colour profiles are ignored. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its resolution, as long as
    both sides stay at least twice `size`.

    Args:
        pixel_range: the values of a grey image of more than 8 bits that become black and white; values outside are clipped.
            None: 16-bit grey keeps its upper 8 bits.

    Raises:
        Unreadable: corrupt, of an unknown format, of pixels without a known range, or larger than `max_pixels`.
    """
    return _opened(encoded, max_pixels, lambda image: _pixels(image, size, pixel_range))


def decoder(spec: Any) -> Callable[[bytes | Path], NDArray[np.uint8]]:
    """`decode` with the fields `size`, `max_pixels` and `range` of a data set's spec; a spec may lack the latter two."""
    return partial(
        decode,
        size=spec.size,
        max_pixels=getattr(spec, "max_pixels", MAX_PIXELS),
        pixel_range=getattr(spec, "range", None),
    )


@dataclass(frozen=True)
class Properties:
    """What an encoded image is, for `ktray data check`.

    Attributes:
        format: such as ``JPEG``.
        mode: Pillow's mode, such as ``RGB`` or ``I;16``.
        bits: of a channel.
        width: in pixels, before the image is turned upright.
        height: in pixels.
        frames: of an animation, or pages.
        unused_bands: of a TIFF, such as near infrared, that are left out.
        low: smallest value of all pixels, as encoded.
        high: largest value.
    """

    format: str
    mode: str
    bits: int
    width: int
    height: int
    frames: int
    unused_bands: int
    low: float
    high: float


def properties(encoded: bytes | Path, spec: Any) -> Properties:
    """The properties of an encoded image.

    Raises:
        Unreadable: as `decode` with the fields of the same spec.
    """
    options = decoder(spec).keywords  # type: ignore[attr-defined]

    def describe(image: Image.Image) -> Properties:
        width, height, bits, mode = image.width, image.height, _bits(image), image.mode
        _pixels(image, options["size"], options["pixel_range"])
        frames = 1
        with contextlib.suppress(*_CORRUPT):
            frames = int(getattr(image, "n_frames", 1))
            image.seek(0)
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        bands = (*_numbers(tags, TiffImagePlugin.SAMPLESPERPIXEL), 1)[0]
        unused = max(0, bands - len(image.getbands()))
        return Properties(str(image.format), mode, bits, width, height, frames, unused, *_extrema(image, bits))

    return _opened(encoded, options["max_pixels"], describe)


def _extrema(image: Image.Image, bits: int) -> tuple[float, float]:
    """The smallest and the largest value of all pixels as encoded; of 16-bit colours, as nearly as Pillow reads them."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        return float(values.min()), float(values.max())
    extrema: Any = image.getextrema()
    flat = np.ravel(extrema) * (257 if bits == 16 else 1)
    return float(flat.min()), float(flat.max())


_T = TypeVar("_T")


def _opened(encoded: bytes | Path, max_pixels: int, use: Callable[[Image.Image], _T]) -> _T:
    """What `use` returns for the opened image."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # only ever raised: other threads may decode with a lower limit of their own
    try:
        try:
            return _with_image(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, max_pixels, use)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            content = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
            return _with_image(io.BytesIO(_without_texts(content)), max_pixels, use)
    except UnidentifiedImageError as error:  # its message is only the path or a memory address
        raise Unreadable(_unidentified(encoded)) from error
    except _CORRUPT as error:
        raise Unreadable(f"{type(error).__name__}: {_message(error)}") from error


def _with_image(file: io.BytesIO | Path, max_pixels: int, use: Callable[[Image.Image], _T]) -> _T:
    with Image.open(file, formats=_FORMATS) as image:
        # Pillow only warns up to twice its limit.
        if image.width * image.height > max_pixels:
            raise Unreadable(
                f"{image.width} x {image.height} pixels are more than max_pixels={max_pixels} of the data set allows"
            )
        _refuse_misread(image)
        return use(image)


def _pixels(image: Image.Image, size: int, pixel_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    bits = _bits(image)
    image.draft(None, (2 * size, 2 * size))
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    rgb = _rgb(image, bits, pixel_range)
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def _bits(image: Image.Image) -> int:
    """Bits of a channel as encoded: Pillow reads 16-bit colours as 8 bits. Before `load`, which forgets it."""
    if image.mode.startswith("I;16"):
        return 16
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    raw = str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)
    if ";16" in raw:
        return 16
    return {"1": 1, "I": 32, "F": 32}.get(image.mode, 8)


_PLANES_APART, _SIGNED = 2, 2


def _refuse_misread(image: Image.Image) -> None:
    """Refuse TIFF files that Pillow opens, but reads as other pixels than they hold."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    bits = max(_numbers(tags, TiffImagePlugin.BITSPERSAMPLE), default=1)
    if len(image.getbands()) > 1 and bits > 8 and _PLANES_APART in _numbers(tags, TiffImagePlugin.PLANAR_CONFIGURATION):
        raise Unreadable(f"a TIFF of {bits}-bit colours in separate planes; write them pixel by pixel")
    if image.mode not in ("I", "F") and _SIGNED in _numbers(tags, TiffImagePlugin.SAMPLEFORMAT):
        raise Unreadable("signed pixels have no known range")


def _numbers(tags: Any, tag: int) -> tuple[int, ...]:
    found = tags.get(tag, ())
    return tuple(found) if isinstance(found, tuple) else (found,)


_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTATION_TEXT = b"Raw profile type "  # where ImageMagick writes EXIF


def _without_texts(content: bytes) -> bytes:
    """A PNG without its comments and colour profiles: Pillow refuses the whole image where they are large."""
    kept, at = [content[:8]], 8
    while at + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        end = at + 12 + length
        if kind not in _TEXTS or content.startswith(_ORIENTATION_TEXT, at + 8):
            kept.append(content[at:end])
        at = end
    return b"".join(kept)


_SIGNATURES = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"8BPS": "Photoshop",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"DDS ": "DDS",
    b"v/1\x01": "OpenEXR",
    b"#?RADIANCE": "Radiance HDR",
    b"qoif": "QOI",
    b"SIMPLE  =": "FITS",
    b"\0\0\1\0": "icon",
}
_BRANDS = {
    b"avif": "AVIF",
    b"avis": "AVIF",
    b"heic": "HEIC",
    b"heix": "HEIC",
    b"heim": "HEIC",
    b"hevc": "HEIC",
    b"mif1": "HEIF",
    b"msf1": "HEIF",
    b"crx ": "Canon raw",
}


def image_format(head: bytes) -> str | None:
    """The format of an image that begins with these bytes, whether ktray reads it or not; None for anything else."""
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    if head[:4] == b"RIFF":
        return "WebP" if head[8:12] == b"WEBP" else None
    if head[128:132] == b"DICM":
        return "DICOM"
    if head[:1] == b"P" and head[1:2] in b"123456" and head[2:3].isspace():
        return "PPM"
    return next((name for start, name in _SIGNATURES.items() if head.startswith(start)), None)


def _unidentified(encoded: bytes | Path) -> str:
    """What a file is that Pillow cannot identify."""
    try:
        content = encoded[:1024] if isinstance(encoded, bytes) else _head(encoded)
    except OSError as error:
        return f"{type(error).__name__}: {_message(error)}"
    found = image_format(content)
    if found == "TIFF":
        return _tiff(encoded) or "a damaged TIFF file"
    if found and found.upper() in _FORMATS:
        return f"a damaged {found} file"
    if found:
        return f"unknown image format: {found}, which ktray does not read"
    text = content.lstrip().lower()
    if not content:
        return "an empty file"
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not an image"
    if text.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the image itself: run 'git lfs pull'"
    return "unknown image format"


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(1024)


def _tiff(encoded: bytes | Path) -> str | None:
    """The kind of a TIFF that Pillow does not read: ``a TIFF of 13 bands of 16 bits``; None for a damaged one."""
    try:
        with io.BytesIO(encoded) if isinstance(encoded, bytes) else open(encoded, "rb") as file:
            head = file.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(head + file.read(8) if b"+" in head[:4] else head)
            file.seek(tags.next)
            tags.load(file)
        bands = _numbers(tags, TiffImagePlugin.SAMPLESPERPIXEL)[:1] or (1,)
        if TiffImagePlugin.IMAGEWIDTH not in tags:
            return None
        bits = max(_numbers(tags, TiffImagePlugin.BITSPERSAMPLE), default=1)
        floating = 3 in _numbers(tags, TiffImagePlugin.SAMPLEFORMAT)
    except _CORRUPT:
        return None
    number = f"{bits}-bit floating point numbers" if floating else f"{bits} bits"
    return f"a TIFF of {bands[0]} band{'s' * (bands[0] != 1)} of {number}; ktray reads grey and RGB of 8 or 16 bits"


def _message(error: BaseException) -> str:
    """The message of an error without the path; images are listed by names relative to the data set."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _CORRUPT:
        return 1  # the pixels are intact: damaged metadata is no reason to drop the image


_WHITE_IS_ZERO = 0


def _rgb(image: Image.Image, bits: int, pixel_range: tuple[float, float] | None) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        wide = np.asarray(image)
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        if wide.dtype == np.uint16 and _WHITE_IS_ZERO in _numbers(tags, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION):
            wide = 0xFFFF - wide  # Pillow inverts images of 8 bits only
        return Image.fromarray(_eight_bits(wide, pixel_range)).convert("RGB")
    if bits == 16 and pixel_range is not None:
        raise Unreadable("colours of 16 bits are read as their upper 8 bits, so 'range' cannot be applied")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _eight_bits(wide: NDArray[Any], pixel_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Grey values of more than 8 bits as 8 bits."""
    if pixel_range is not None:
        if not np.isfinite(wide).all():
            raise Unreadable("some pixels are not finite")
        low, high = pixel_range
        return ((wide.astype(np.float64) - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)
    if wide.dtype.kind == "f":
        raise Unreadable("floating point pixels have no known range; state it as 'range' of the data set")
    if wide.min() < 0 or wide.max() > 0xFFFF:
        raise Unreadable("32-bit pixels have no known range; state it as 'range' of the data set")
    return (wide >> 8).astype(np.uint8)


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
