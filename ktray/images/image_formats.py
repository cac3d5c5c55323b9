"""Formats of image files by their first bytes: what an unreadable file is, and whether a large file is an image."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

from PIL import Image, TiffImagePlugin

from ktray.file_kind import LARGE, false_claim, kind_of

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # no format that runs a program, as EPS does
# What Pillow's parsers raise for truncated or corrupt files; MemoryError is deliberately not included.
CORRUPT = (
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


def tag_numbers(tags: Any, tag: int) -> tuple[int, ...]:
    """The numbers of a tag of a TIFF, whose `tags` are Pillow's; empty without that tag."""
    found = tags.get(tag, ())
    return tuple(found) if isinstance(found, tuple) else (found,)


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
    if head[:1] == b"P" and head[1:2] in b"123456f" and head[2:3].isspace():
        return "PPM"
    return next((name for start, name in _SIGNATURES.items() if head.startswith(start)), None)


def what_is_unread(encoded: bytes | Path) -> str:
    """What a file is that Pillow cannot identify."""
    try:
        content = encoded[:1024] if isinstance(encoded, bytes) else _head(encoded)
    except OSError as error:
        return f"{type(error).__name__}: {message_of(error)}"
    found = image_format(content)
    if found == "TIFF":
        return _tiff(encoded) or "a damaged TIFF file"
    if found and found.upper() in FORMATS:
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
    if _BASE64.match(content):
        return "text in base64, not the bytes of an image: decode it first"
    if content[4:8] == b"ftyp":
        return "a video or another file in MP4's container, not an image"
    kind, _ = kind_of(content)
    return f"{kind.removeprefix('is ')}, not an image" if kind.startswith("is ") else kind or "unknown image format"


_BASE64 = re.compile(rb"(?:data:image/[a-z0-9.+-]+;base64,)?(?:[A-Za-z0-9+/]|\r?\n){64,}={0,2}\s*\Z")


def _head(path: Path, length: int = 1024) -> bytes:
    with open(path, "rb") as file:
        return file.read(length)


def _tiff(encoded: bytes | Path) -> str | None:
    """The kind of a TIFF that Pillow does not read: ``a TIFF of 13 bands of 16 bits``; None for a damaged one."""
    try:
        with io.BytesIO(encoded) if isinstance(encoded, bytes) else open(encoded, "rb") as file:
            head = file.read(8)
            tags = TiffImagePlugin.ImageFileDirectory_v2(head + file.read(8) if b"+" in head[:4] else head)
            file.seek(tags.next)
            tags.load(file)
        bands = tag_numbers(tags, TiffImagePlugin.SAMPLESPERPIXEL)[:1] or (1,)
        if TiffImagePlugin.IMAGEWIDTH not in tags:
            return None
        bits = max(tag_numbers(tags, TiffImagePlugin.BITSPERSAMPLE), default=1)
        floating = 3 in tag_numbers(tags, TiffImagePlugin.SAMPLEFORMAT)
    except CORRUPT:
        return None
    number = f"{bits}-bit floating point numbers" if floating else f"{bits} bits"
    return f"a TIFF of {bands[0]} band{'s' * (bands[0] != 1)} of {number}; ktray reads grey and RGB of 8 or 16 bits"


def message_of(error: BaseException) -> str:
    """The message of an error without the path; images are listed by names relative to the data set."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def large_and_no_image(path: Path) -> str | None:
    """Why a file of more than 1 GiB cannot be an image, by its beginning and its holes; None if it can, or is smaller.

    Pillow would search all of some of them for the next marker of a JPEG or the next number of a PPM, byte by byte, and a hash
    of the content would read them, too.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    if size <= LARGE:
        return None
    if claim := false_claim(path):
        return f"the file {claim}"
    found = image_format(_head(path))
    if (
        (found or "").upper() not in FORMATS
        or (found == "JPEG" and not _has_jpeg_header(path))
        or (found == "PPM" and not _has_ppm_header(path))
    ):
        return f"{what_is_unread(path)}, of {size:,} bytes"
    return None


_MAX_SEGMENTS = 10_000
_NO_FRAME = (0xC4, 0xC8, 0xCC)  # markers between those of frames, which state width and height


def _has_jpeg_header(path: Path) -> bool:
    """Whether a JPEG's segments follow each other up to that with its width and height."""
    with open(path, "rb") as file:
        file.seek(2)
        for _ in range(_MAX_SEGMENTS):
            start, marker, length = struct.unpack(">BBH", file.read(4).ljust(4, b"\0"))
            if start != 0xFF or length < 2:
                return False
            if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
                return True
            file.seek(length - 2, 1)
    return False


def _has_ppm_header(path: Path) -> bool:
    """Whether the first bytes of a PPM hold its width and height."""
    return len(re.sub(rb"#[^\r\n]*", b"", _head(path, 1 << 16)).split(maxsplit=3)) > 2
