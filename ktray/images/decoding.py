"""Decoding: from encoded bytes to a square uint8 RGB image."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import math
import re
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, _imaging
from pydantic import AfterValidator, BeforeValidator, Field

from ktray.images.image_formats import CORRUPT, FORMATS, large_and_no_image, message_of, tag_numbers, what_is_unread
from ktray.images.source import VOID, Unreadable
from ktray.text import shown

IDENTITY, REVISION = "image_decoding", 3
RANGE_REVISION = 2  # of `range` alone: it counts for data sets with a range, whose keys it changes, and for no others

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


def _silence_libtiff() -> None:
    """Keep libtiff from writing to stderr itself, past Python; what it finds is in Pillow's error where it matters."""
    with contextlib.suppress(OSError, AttributeError):  # a Pillow without libtiff, or one that hides its functions
        library = ctypes.CDLL(_imaging.__file__)  # its symbols are searched in the libraries that it was linked to, too
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            set_handler = getattr(library, name)
            set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
            set_handler(None)


_silence_libtiff()

MAX_PIXELS = 1024**3 // 4 // 3  # Pillow's own limit
MaxPixels = Annotated[
    int, Field(ge=1, le=2**31 - 1, description="pixels of the largest image that is decoded; larger ones count as unreadable")
]


def _range(value: Any) -> Any:
    """``0,4095``, as in a data set's text form, as two numbers; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    try:
        return [float(part) for part in value.split(",")]
    except ValueError:
        raise ValueError(f"range is {shown(value)} and should be two numbers, such as 0,4095") from None


def _ascending(value: tuple[float, float] | None) -> tuple[float, float] | None:
    if value is not None and not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] < value[1]):
        raise ValueError(f"the first number must be smaller than the second, both finite: {list(value)}")
    return value


PixelRange = Annotated[
    tuple[float, float] | None,
    BeforeValidator(_range),
    AfterValidator(_ascending),
    Field(
        description="values, as in the file, of grey images of more than 8 bits that become black and white, such as "
        "[0, 4095]; null: all values of 16 bits, and no others are read"
    ),
]


def decode(
    encoded: bytes | Path,
    size: int,
    max_pixels: int = MAX_PIXELS,
    pixel_range: tuple[float, float] | None = None,
    annotated: tuple[int, int] | None = None,
) -> NDArray[np.uint8]:
    """The pixels (h, w, 3) uint8 of an encoded image, upright, with enough resolution for a square of side `size`.

    Grey is repeated to three channels, transparency becomes white, EXIF orientation is applied, only the first frame of an
    animation is used, and colour profiles are ignored. A large JPEG is decoded at 1/2, 1/4 or 1/8 of its resolution, as long as
    both sides stay at least twice `size`.

    Args:
        pixel_range: the values, as written in the file, of a grey image of more than 8 bits that become black and white; values
            outside are clipped. None: 16-bit grey keeps its upper 8 bits, and a PGM is white at its header's maxval.
        annotated: height and width of the image that boxes or a mask were drawn on; None if there are none.

    Raises:
        Unreadable: corrupt, of an unknown format, of pixels without a known range, larger than `max_pixels`, or not the image
            that was annotated: of another size, or turned by its EXIF orientation.
    """

    def pixels(image: Image.Image) -> NDArray[np.uint8]:
        _refuse_other_than_annotated(image, annotated)
        return _pixels(image, (2 * size, 2 * size), pixel_range)

    return _opened(encoded, max_pixels, pixels)


def decode_whole(
    encoded: bytes | Path, spec: Any, longest: int | None = None, annotated: tuple[int, int] | None = None
) -> NDArray[np.uint8]:
    """The pixels (h, w, 3) uint8 of an encoded image, upright and at its own aspect ratio, no side longer than `longest`.

    The arguments and errors are those of `decode` with the fields of a data set's spec; its `size` counts for nothing.
    """
    options = decoder(spec).keywords  # type: ignore[attr-defined]

    def pixels(image: Image.Image) -> NDArray[np.uint8]:
        _refuse_other_than_annotated(image, annotated)
        height, width = shrunk(image.height, image.width, longest)
        return _pixels(image, (2 * width, 2 * height), options["pixel_range"])

    return fit_longest(_opened(encoded, options["max_pixels"], pixels), longest)


def image_size(encoded: bytes | Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Height and width of an encoded image by its header, as encoded: not turned upright.

    Raises:
        Unreadable: no image by its header, or larger than `max_pixels`.
    """
    return _opened(encoded, max_pixels, lambda image: (image.height, image.width))


def decode_mask(encoded: Path, classes: int, annotated: tuple[int, int]) -> NDArray[np.uint8]:
    """The class of each pixel (h, w) uint8 of a mask in a PNG with a palette or in grey: 0, 1 to `classes`, or 255 for void.

    Args:
        annotated: height and width of the image that it belongs to.

    Raises:
        Unreadable: corrupt, of another size, in colours, or with other values.
    """

    def values(image: Image.Image) -> NDArray[np.uint8]:
        _refuse_other_than_annotated(image, annotated)
        _refuse_coloured_mask(image)
        found = np.asarray(image).astype(np.uint8)
        if len(others := np.setdiff1d(found, [*range(classes + 1), VOID])):
            raise Unreadable(
                f"a pixel has the value {others[0]}, and a mask has 0 to {classes} for {classes} classes, or {VOID}"
            )
        return found

    return _opened(encoded, MAX_PIXELS, values)


def mask_size(encoded: Path) -> tuple[int, int]:
    """Height and width of a mask by its header.

    Raises:
        Unreadable: no image by its header, or in colours.
    """

    def size(image: Image.Image) -> tuple[int, int]:
        _refuse_coloured_mask(image)
        return image.height, image.width

    return _opened(encoded, MAX_PIXELS, size)


def _refuse_coloured_mask(image: Image.Image) -> None:
    if image.mode not in ("P", "L", "1"):
        raise Unreadable(f"a mask holds numbers of classes, as a palette or grey; this one is in {image.mode}")


def _refuse_other_than_annotated(image: Image.Image, annotated: tuple[int, int] | None) -> None:
    """Refuse an image whose pixels are not certainly those that its boxes or its mask speak of."""
    if annotated is None:
        return
    height, width = annotated
    if (image.height, image.width) != annotated:
        raise Unreadable(f"its annotation says {width} x {height} pixels, and the image has {image.width} x {image.height}")
    if _orientation(image) in _UPRIGHT:
        raise Unreadable(
            f"its EXIF orientation {_orientation(image)} turns or mirrors it, and nothing says whether it was annotated before"
        )


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
        limit: the value that is white without a range: maxval of a PGM's header, such as 4095, or the largest of 8 or 16
            bits; None for floating point, 32-bit and signed numbers.
        turned: whether its EXIF orientation turns or mirrors it.
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
    limit: int | None
    turned: bool = False


def pixels_and_properties(encoded: bytes | Path, spec: Any) -> tuple[NDArray[np.uint8], Properties]:
    """The pixels (h, w, 3) uint8 of an encoded image, and its properties.

    Raises:
        Unreadable: as `decode` with the fields of the same spec.
    """
    options = decoder(spec).keywords  # type: ignore[attr-defined]

    def describe(image: Image.Image) -> tuple[NDArray[np.uint8], Properties]:
        width, height, bits, mode, maxval = image.width, image.height, _bits(image), image.mode, _maxval(image)
        limit = None if _without_white(image, bits) else (maxval or 0xFFFF) if bits > 8 else 0xFF
        pixels = _pixels(image, (2 * options["size"], 2 * options["size"]), options["pixel_range"])
        turned = _orientation(image) in _UPRIGHT
        frames = 1
        with contextlib.suppress(*CORRUPT):
            frames = int(getattr(image, "n_frames", 1))
            image.seek(0)
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        bands = (*tag_numbers(tags, TiffImagePlugin.SAMPLESPERPIXEL), 1)[0]
        unused = max(0, bands - len(image.getbands()))
        low, high = _extrema(image, limit, maxval)
        return pixels, Properties(str(image.format), mode, bits, width, height, frames, unused, low, high, limit, turned)

    return _opened(encoded, options["max_pixels"], describe)


def _extrema(image: Image.Image, limit: int | None, maxval: int | None) -> tuple[float, float]:
    """The smallest and the largest value of all pixels as encoded; of 16-bit colours, as nearly as Pillow reads them."""
    if image.mode.startswith("I") or image.mode == "F":
        values = _as_written(np.asarray(image), maxval)
        return float(values.min()), float(values.max())
    extrema: Any = image.getextrema()
    flat = np.ravel(extrema) * ((limit or 0xFF) / 0xFF)
    return float(flat.min()), float(flat.max())


_T = TypeVar("_T")


def _opened(encoded: bytes | Path, max_pixels: int, use: Callable[[Image.Image], _T]) -> _T:
    """What `use` returns for the opened image."""
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels  # only ever raised: other threads may decode with a lower limit of their own
    try:
        if isinstance(encoded, Path) and (why := large_and_no_image(encoded)):
            raise Unreadable(why)
        try:
            return _with_image(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded, max_pixels, use)
        except ValueError as error:
            if "MAX_TEXT" not in str(error):
                raise
            content = encoded if isinstance(encoded, bytes) else encoded.read_bytes()
            return _with_image(io.BytesIO(_without_texts(content)), max_pixels, use)
    except UnidentifiedImageError as error:  # its message is only the path or a memory address
        raise Unreadable(what_is_unread(encoded)) from error
    except Image.DecompressionBombError as error:  # Pillow refuses it before its sides are known
        number = re.search(r"\d+(?= pixels)", str(error))
        raise Unreadable(_too_large(f"{number[0]} pixels" if number else "its pixels", max_pixels)) from error
    except CORRUPT as error:
        raise Unreadable(f"{type(error).__name__}: {message_of(error)}") from error


def _with_image(file: io.BytesIO | Path, max_pixels: int, use: Callable[[Image.Image], _T]) -> _T:
    with Image.open(file, formats=FORMATS) as image:
        # Pillow only warns up to twice its limit.
        if image.width * image.height > max_pixels:
            raise Unreadable(_too_large(f"{image.width} x {image.height} pixels", max_pixels))
        _refuse_misread(image)
        return use(image)


def _too_large(pixels: str, max_pixels: int) -> str:
    return f"{pixels} are more than max_pixels={max_pixels} of the data set allows"


def _pixels(image: Image.Image, at_least: tuple[int, int], pixel_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    """The pixels of an opened image; `at_least` is the width and height to which the resolution of a JPEG may be reduced."""
    bits, maxval = _bits(image), _maxval(image)
    image.draft(None, at_least)
    image.load()
    turn = _UPRIGHT.get(_orientation(image))
    rgb = _rgb(image, bits, maxval, pixel_range)
    return np.asarray(rgb if turn is None else rgb.transpose(turn))


def _bits(image: Image.Image) -> int:
    """Bits of a channel as encoded: Pillow reads 16-bit colours as 8 bits. Before `load`, which forgets it."""
    if image.mode.startswith("I;16"):
        return 16
    maxval = _maxval(image)
    if maxval is not None:
        return 16 if maxval > 0xFF else 8
    tiles: Any = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ""
    raw = str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)
    if ";16" in raw and not raw.startswith("BGR;16"):  # three channels in 16 bits
        return 16
    return {"1": 1, "I": 32, "F": 32}.get(image.mode, 8)


def _maxval(image: Image.Image) -> int | None:
    """The value of white by the header of a PGM or PPM, whose values Pillow scales; None for others. Before `load`."""
    tiles: Any = getattr(image, "tile", None)
    if not tiles or tiles[0][0] not in ("ppm", "ppm_plain") or not isinstance(tiles[0][3], tuple):
        return None
    return int(tiles[0][3][1])


def _as_written(wide: NDArray[Any], maxval: int | None) -> NDArray[Any]:
    """Grey values as in the file. Pillow scales those of a PGM to 65535, by a factor of at least 1, so that none is lost."""
    return wide if maxval is None else (wide.astype(np.int64) * (2 * maxval) + 0xFFFF) // (2 * 0xFFFF)


_PLANES_APART, _SIGNED = 2, 2


def _refuse_misread(image: Image.Image) -> None:
    """Refuse TIFF files that Pillow opens, but reads as other pixels than they hold."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return
    tags = image.tag_v2
    bits = max(tag_numbers(tags, TiffImagePlugin.BITSPERSAMPLE), default=1)
    if len(image.getbands()) > 1 and bits > 8 and _PLANES_APART in tag_numbers(tags, TiffImagePlugin.PLANAR_CONFIGURATION):
        raise Unreadable(f"a TIFF of {bits}-bit colours in separate planes; write them pixel by pixel")
    if image.mode not in ("I", "F") and _SIGNED in tag_numbers(tags, TiffImagePlugin.SAMPLEFORMAT):
        raise Unreadable("signed pixels have no known range")


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


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except CORRUPT:
        return 1  # the pixels are intact: damaged metadata is no reason to drop the image


_WHITE_IS_ZERO = 0


def _rgb(image: Image.Image, bits: int, maxval: int | None, pixel_range: tuple[float, float] | None) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        wide = np.asarray(image) if pixel_range is None else _as_written(np.asarray(image), maxval)
        tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
        if wide.dtype == np.uint16 and _WHITE_IS_ZERO in tag_numbers(tags, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION):
            wide = 0xFFFF - wide  # Pillow inverts images of 8 bits only
        if pixel_range is None and (kind := _without_white(image, bits)):
            raise Unreadable(f"{kind} pixels have no known range; state it as 'range' of the data set")
        return Image.fromarray(_eight_bits(wide, pixel_range)).convert("RGB")
    if bits == 16 and pixel_range is not None and pixel_range != (0, maxval):  # Pillow has applied that one
        raise Unreadable("colours of 16 bits are read as their upper 8 bits, so 'range' cannot be applied")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, "white")
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB")


def _without_white(image: Image.Image, bits: int) -> str:
    """The kind of numbers in a grey file of which no value is white without a range, such as ``32-bit``; empty for others.

    By the format of the file, never by its values: those of a dark image would fit into a smaller format.
    """
    if image.mode == "F":
        return "floating point"
    if not image.mode.startswith("I"):
        return ""
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    signed = _SIGNED in tag_numbers(tags, TiffImagePlugin.SAMPLEFORMAT)
    return f"{'signed ' * signed}{bits}-bit" if signed or bits > 16 else ""


def _eight_bits(wide: NDArray[Any], pixel_range: tuple[float, float] | None) -> NDArray[np.uint8]:
    """Grey values of more than 8 bits as 8 bits; without a range they are unsigned, of 16 bits."""
    if pixel_range is not None:
        if not np.isfinite(wide).all():
            raise Unreadable("some pixels are not finite")
        low, high = pixel_range
        return ((wide.astype(np.float64) - low) * (255 / (high - low))).round().clip(0, 255).astype(np.uint8)
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


def fit_mask(mask: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The pixels (size, size) of a mask (h, w) uint8 that lie nearest to those of the image after `fit`."""
    height, width = mask.shape
    left, top, side = _centre(height, width)
    centres = (np.arange(size) + 0.5) * side / size
    rows, columns = ((start + centres).astype(np.int64) for start in (top, left))
    fitted: NDArray[np.uint8] = mask[rows.clip(0, height - 1)][:, columns.clip(0, width - 1)]
    return fitted


def shrunk(height: int, width: int, longest: int | None) -> tuple[int, int]:
    """Height and width of an image after it is shrunk, if it must be, until no side is longer than `longest`."""
    if longest is None or max(height, width) <= longest:
        return height, width
    scale = longest / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def fit_longest(pixels: NDArray[np.uint8], longest: int | None) -> NDArray[np.uint8]:
    """`pixels` (h, w, 3) uint8 shrunk by antialiased bilinear interpolation until no side is longer than `longest`."""
    height, width = shrunk(pixels.shape[0], pixels.shape[1], longest)
    if (height, width) == pixels.shape[:2]:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR))


def fit_boxes(boxes: NDArray[np.float32], height: int, width: int, size: int) -> NDArray[np.float32]:
    """`boxes` (n, 5) [x0, y0, x1, y1, class] of a (height, width) image after `fit`: clipped, (m, 5) with m <= n.

    Boxes outside the centred square are left out.
    """
    moved, inside = fitted_boxes(boxes, height, width, size)
    return moved[inside]


def fitted_boxes(
    boxes: NDArray[np.float32], height: int, width: int, size: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`fit_boxes` before any is left out: (n, 5), and which of them (n,) are inside the centred square at least in part."""
    left, top, side = _centre(height, width)
    moved = boxes.astype(np.float32, copy=True)
    corners = (moved[:, :4] - np.array([left, top, left, top], np.float32)) * np.float32(size / side)
    moved[:, :4] = corners.clip(0, size)
    return moved, (moved[:, 2] > moved[:, 0]) & (moved[:, 3] > moved[:, 1])
