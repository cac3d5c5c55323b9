"""What a file is, by its first bytes, where another kind was expected: a web page, a Git LFS pointer, an archive.

A download that went wrong leaves such a file under the right name. The size of a file proves nothing either: a sparse file
claims terabytes that no disk holds, and hashing it takes days.
"""

from __future__ import annotations

import os
from pathlib import Path

from ktray.errors import UserError

_HEAD = 4096  # bytes that are looked at
_AGAIN = "Download it again."
_UNPACK = "Unpack it, and give the file in it."
_SIGNATURES = (  # offset, bytes, what such a file is, what to do instead
    (0, b"version https://git-lfs", "is a pointer of Git LFS and not the file itself", "Fetch the file: git lfs pull."),
    (0, b"\x1f\x8b", "is a gzip archive", _UNPACK),
    (0, b"BZh", "is a bzip2 archive", _UNPACK),
    (0, b"\xfd7zXZ", "is an xz archive", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "is a zstd archive", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "is a 7z archive", _UNPACK),
    (0, b"Rar!", "is a rar archive", _UNPACK),
    (257, b"ustar", "is a tar archive", _UNPACK),
    (0, b"PK\x03\x04", "is a zip archive", _UNPACK),
    (0, b"PK\x05\x06", "is an empty zip archive", _AGAIN),
    (0, b"\x89HDF\r\n", "is an HDF5 file", ""),
    (0, b"\x93NUMPY", "is an array of NumPy", ""),
    (0, b"PAR1", "is a parquet file", ""),
    (0, b"GGUF", "is a GGUF file", ""),
    (0, b"%PDF", "is a PDF", ""),
    (0, b"\x89PNG", "is an image", ""),
    (0, b"\xff\xd8\xff", "is an image", ""),
)
_MARKUP = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<!--", b"<script", b"<svg")
_SHOWN = 60  # characters of a text
LARGE = 1 << 30  # bytes; fewer are hashed in a second, whatever is in them
_MAX_EXTENTS = 100_000


def what_it_is(path: Path) -> tuple[str, str]:
    """What a file is that is not of the expected kind, as the end of a sentence, and what to do; ("", "") if unknown.

    Raises:
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        return kind_of(file.read(_HEAD))


def kind_of(head: bytes) -> tuple[str, str]:
    """`what_it_is` by a file's first bytes."""
    if not head:
        return "is empty", _AGAIN
    for offset, signature, found, instead in _SIGNATURES:
        if head[offset:].startswith(signature):
            return found, instead
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(_MARKUP):
        return "is a web page, such as the error or login page of a download", _AGAIN
    text = _text(head)
    if text is not None:
        return f"is a text file that begins with {text[:_SHOWN]!r}", _AGAIN
    if not head.strip(b"\0"):
        return "begins with zeros, as a download that did not finish leaves them", _AGAIN
    return "", ""


def _text(head: bytes) -> str | None:
    """The first line of a text in UTF-8 or UTF-16; None for bytes that are no text."""
    encoding = "utf-16" if head.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8"
    for cut in range(4):  # the last character may be incomplete
        try:
            text = head[: len(head) - cut].decode(encoding)
        except UnicodeDecodeError:
            continue
        return None if any(each < " " and each not in "\t\n\r\f" for each in text) else text.strip().partition("\n")[0]
    return None


def require_readable(path: Path, where: str) -> None:
    """Check that a file can be opened, and that most of its bytes are on disk, so that it can be hashed in sensible time.

    Args:
        where: its dotted path in the spec, for the error.

    Raises:
        UserError: it cannot be opened, or it is a large sparse file.
    """
    try:
        claim = false_claim(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path.name} cannot be read: {reason}", where) from error
    if claim:
        raise UserError(f"{path.name} {claim}", where, "It may be a download that did not finish: download it again.")


def false_claim(path: Path) -> str | None:
    """What a large file claims that is mostly holes, as the end of a sentence; None for other files.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        held = size if size <= LARGE else _bytes_held(file.fileno(), size)
    return f"claims {size:,} bytes, of which only {held:,} are on disk; the rest is a hole" if held < size // 2 else None


def _bytes_held(file: int, size: int) -> int:
    """Bytes of a file that are not holes; all of them where the file system cannot tell."""
    held, end = 0, 0
    for _ in range(_MAX_EXTENTS):
        try:
            start = os.lseek(file, end, os.SEEK_DATA)
        except OSError:  # ENXIO: no data behind `end`; EINVAL: the file system does not know holes
            return held if end or _knows_holes(file) else size
        end = os.lseek(file, start, os.SEEK_HOLE)
        held += end - start
        if end >= size:
            return held
    return size


def _knows_holes(file: int) -> bool:
    try:
        os.lseek(file, 0, os.SEEK_HOLE)
    except OSError:
        return False
    return True
