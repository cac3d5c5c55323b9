"""The files in a tar file with the places of their bytes, so that each can be read by itself.

Python's `tarfile` yields the same in three times the time, which is minutes for ImageNet. So headers of plain files are read
here, and a tar file with anything rarer (long names of GNU tar, sparse files) is left to `tarfile`.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ktray.errors import UserError
from ktray.file_kind import what_it_is

WHERE = "data.path"
_BLOCK = 512
_AHEAD = 4 * _BLOCK  # a header of pax, its fields, the header of the file, and the file itself if it is a label
_MAX_FIELDS = 1 << 20  # bytes of the fields of pax for one file


@dataclass(frozen=True)
class Member:
    """A file in a tar file.

    Attributes:
        name: with `/` between folders.
        start: of its content in the tar file, in bytes.
        size: of its content in bytes.
        content: the bytes themselves, if they were asked for.
    """

    name: str
    start: int
    size: int
    content: bytes | None = None


def members(path: Path, with_content: Callable[[str, int], bool]) -> tuple[list[Member], Counter[str]]:
    """The files in a tar file in their order, and what is there besides, such as links, by kind.

    Args:
        with_content: whether the content of the file with this name and size is to be read, too.

    Raises:
        UserError: it is no tar file, is compressed, damaged or cut off.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return _plain(_Window(file.fileno()), size, with_content)
        except _Rare:
            return _by_tarfile(path, size, with_content)
        except _Damaged as error:
            found, instead = what_it_is(path) if error.is_no_tar else ("", "")
            problem = found or f"is damaged or cut off: {error}"
            raise UserError(f"{path} {problem}", WHERE, instead or "Copy it again.") from error


class _Rare(Exception):
    """A tar file with something that only `tarfile` reads."""


class _Damaged(Exception):
    def __init__(self, what: str, is_no_tar: bool = False) -> None:
        self.is_no_tar = is_no_tar
        super().__init__(what)


class _Window:
    """A file of which small pieces are read in ascending order."""

    def __init__(self, file: int) -> None:
        self._file, self._start, self._held = file, 0, b""

    def read(self, start: int, size: int) -> bytes:
        """The bytes from `start`; fewer at the end of the file."""
        offset = start - self._start
        if offset < 0 or offset + size > len(self._held):
            self._held, self._start, offset = os.pread(self._file, max(size, _AHEAD), start), start, 0
        return self._held[offset : offset + size]


def _plain(window: _Window, size: int, with_content: Callable[[str, int], bool]) -> tuple[list[Member], Counter[str]]:
    found: list[Member] = []
    others: Counter[str] = Counter()
    at, fields = 0, dict[str, str]()
    while at < size:
        header = window.read(at, _BLOCK)
        if not header.strip(b"\0") and len(header) == _BLOCK:  # the mark at the end
            return found, others
        _check(header, at)
        kind, length = header[156:157], _number(header[124:136], at)
        start = at + _BLOCK
        if kind == b"x":
            fields = _pax_fields(window.read(start, length) if length <= _MAX_FIELDS else b"", at)
            at = _behind(start, length)
            continue
        if kind not in (b"0", b"\0", b"5", b"1", b"2"):
            raise _Rare
        length = int(fields.get("size", length)) if kind in (b"0", b"\0") else 0
        name = fields.get("path") or _name(header)
        if start + length > size:
            raise _Damaged(f"{name} in it needs {start + length:,} bytes, and the file has {size:,}")
        if kind in (b"0", b"\0") and not name.endswith("/"):
            found.append(Member(name, start, length, window.read(start, length) if with_content(name, length) else None))
        elif kind in (b"1", b"2"):
            others["links"] += 1
        at, fields = _behind(start, length), {}
    if not size:
        raise _Damaged("it is empty", True)
    return found, others + Counter({"missing marks at the end of a tar file, which may be cut off": 1})


def _behind(start: int, length: int) -> int:
    """Where the next header begins."""
    return start + -(-length // _BLOCK) * _BLOCK


def _check(header: bytes, at: int) -> None:
    """Raise unless the header has the sum of bytes that stands in it."""
    if len(header) < _BLOCK:
        raise _Damaged(f"it ends within the header at byte {at:,}", at == 0)
    total = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _number(header[148:156], at) != total:
        raise _Damaged(f"there is no header at byte {at:,}", at == 0 and header[257:262] != b"ustar")


def _number(field: bytes, at: int) -> int:
    if field[:1] == b"\x80":  # too large for octal digits
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError as error:
        raise _Damaged(f"there is no header at byte {at:,}", at == 0) from error


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345] != 0:
        name = header[345:500].split(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "backslashreplace")


def _pax_fields(text: bytes, at: int) -> dict[str, str]:
    """The fields of a header of pax, each written as ``LENGTH NAME=VALUE`` and a line feed."""
    fields = {}
    while text.strip(b"\0"):
        length, _, _ = text.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(text):
            raise _Damaged(f"the header at byte {at:,} cannot be read")
        name, _, value = text[len(length) + 1 : int(length) - 1].partition(b"=")
        fields[name.decode("utf-8", "replace")] = value.decode("utf-8", "backslashreplace")
        text = text[int(length) :]
    if any(name.startswith("GNU.sparse") for name in fields):
        raise _Rare
    return fields


def _by_tarfile(path: Path, size: int, with_content: Callable[[str, int], bool]) -> tuple[list[Member], Counter[str]]:
    found: list[Member] = []
    others: Counter[str] = Counter()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    others["links, sparse and special files"] += 1
                    continue
                if member.offset_data + member.size > size:
                    raise tarfile.ReadError(f"{member.name} in it needs more bytes than the file has")
                taken = archive.extractfile(member) if with_content(member.name, member.size) else None
                content = None if taken is None else taken.read()
                name = member.name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
                found.append(Member(name, member.offset_data, member.size, content))
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise UserError(f"{path} is damaged or cut off: {error}", WHERE, "Copy it again.") from error
    return found, others
