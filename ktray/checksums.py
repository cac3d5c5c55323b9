"""Checksums: of an artifact's files, compared before a process uses them, and of JSON files that ktray writes for itself.

A directory is *sealed* once it has a `record.json` that lists its files with their checksums: a published artifact, or a
checkpoint of a training. Whoever reads one of these files passes its path through `intact`, or reads a large one with
`file_checks`. Each process compares each file once, and again if it has changed since, by its inode or times.

The checksum is XXH3 with 64 bits, of every 8 MiB. It finds damage, not forgery.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from ktray.errors import DamagedArtifact

if TYPE_CHECKING:
    from io import FileIO

    import numpy as np
    from numpy.typing import NDArray

RECORD = "record.json"
BLOCK_BYTES = 8 << 20
_DIGITS = 16  # of the checksum of a block, in hexadecimal
_READ_BYTES = 1 << 18  # fits into a processor's cache, so that bytes are hashed where they were just copied to
_REMEMBERED = 10_000  # files whose compared blocks a process keeps

State = tuple[int, ...]
"""What changes when a file is written or replaced: device, inode, size and both times."""

# ---- JSON files with a checksum

_HEAD = '{"checksum": "'


def json_text(value: Mapping[str, Any], *, indent: int | None = None, sort_keys: bool = False, allow_nan: bool = True) -> str:
    """A JSON object, whose first entry is the checksum of the text that follows; on one line without `indent`.

    The arguments are those of `json.dumps`, which raises the same errors.
    """
    separators = (",", ":") if indent is None else None
    text = json.dumps(value, indent=indent, separators=separators, sort_keys=sort_keys, allow_nan=allow_nan)
    body = text.removeprefix("{")
    return f'{_HEAD}{xxhash.xxh3_64_hexdigest(body.encode())}"{"," if value else ""}{body}'


def parse_json(text: str) -> dict[str, Any]:
    """What `json_text` was given, or the JSON object of an earlier version, which has no checksum.

    Raises:
        ValueError: it is damaged.
    """
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    if sum(found != wanted for found, wanted in zip(text, _HEAD, strict=False)) > 2:
        return value  # of an earlier version; a head that is nearly ours is a damaged one
    checksum, body = text[len(_HEAD) : len(_HEAD) + _DIGITS], text[len(_HEAD) + _DIGITS + 1 :].removeprefix(",")
    if not text.startswith(_HEAD) or checksum != xxhash.xxh3_64_hexdigest(body.encode()):
        raise ValueError("it does not match its checksum")
    del value["checksum"]
    return value


def require_line(value: dict[str, Any]) -> None:
    """Remove the checksum from what was parsed from a line of `json_text`, after comparing it; a line may have none.

    Raises:
        ValueError: it is damaged.
    """
    checksum = value.pop("checksum", None)
    if checksum is not None and not json_text(value).startswith(f'{_HEAD}{checksum}"'):
        raise ValueError("it does not match its checksum")


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file with a checksum, whole or not at all, and wait for the disk."""
    text = json_text(value, indent=1, sort_keys=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote; as `parse_json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged.
    """
    return parse_json(path.read_bytes().decode())


# ---- sealed directories


def seal(directory: Path, record: Mapping[str, Any]) -> list[Path]:
    """Write the record of a directory, with the size and checksums of each file in it; those files."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != RECORD)
    entries = {str(path.relative_to(directory)): {"size": path.stat().st_size, "xxh3": _checksums(path)} for path in files}
    write_json(directory / RECORD, {**record, "files": entries})
    return files


def _checksums(path: Path) -> str:
    """The checksums of all blocks of a file, one after the other."""
    with open(path, "rb", buffering=0) as file:
        count = -(-os.fstat(file.fileno()).st_size // BLOCK_BYTES)
        return "".join(_checksum(file.fileno(), block) for block in range(count))


def _checksum(descriptor: int, block: int, block_bytes: int = BLOCK_BYTES, algorithm: str = "xxh3") -> str:
    """Of one block, by reads: if a disk is broken or a file is cut, a map would end the process."""
    digest = xxhash.xxh3_64() if algorithm == "xxh3" else hashlib.new(algorithm)
    buffer = memoryview(bytearray(_READ_BYTES))
    position, end = block * block_bytes, (block + 1) * block_bytes
    while position < end and (count := os.preadv(descriptor, [buffer], position)):
        digest.update(buffer[:count])
        position += count
    return digest.hexdigest()


@dataclass(frozen=True)
class FileChecks:
    """Compares one file of a sealed directory with its record, block by block, before the blocks are used.

    Attributes:
        directory: the sealed directory.
        inode: of the directory.
        name: of the file, relative to it.
        algorithm: ``xxh3``, or ``sha256`` in a record of ktray 0.2, where the whole file is one block.
        block_bytes: bytes of a block.
        expected: the recorded checksum of each block.
        compared: 1 for each of them that matches; shared by all readers in this process.
        file: the open file whose blocks are compared; None opens it by its name each time.
    """

    directory: Path
    inode: int
    name: str
    algorithm: str
    block_bytes: int
    expected: tuple[str, ...]
    compared: bytearray
    file: FileIO | None = None

    def require_all(self) -> None:
        """Compare the whole file.

        Raises:
            DamagedArtifact: it differs.
        """
        if 0 in self.compared:
            self._require(range(len(self.expected)))

    def require_rows(self, rows: NDArray[np.int64], header: int, row_bytes: int) -> None:
        """Compare the blocks that hold rows of an array, and its header.

        Args:
            rows: their numbers, from 0.
            header: bytes before the first row.

        Raises:
            DamagedArtifact: one of them differs.
        """
        if 0 not in self.compared:
            return
        starts = header + rows * row_bytes
        blocks = {0}
        for inside in (*range(0, row_bytes, self.block_bytes), row_bytes - 1):
            blocks.update(((starts + inside) // self.block_bytes).tolist())
        self._require(sorted(blocks))

    def _require(self, blocks: Iterable[int]) -> None:
        missing = [block for block in blocks if not self.compared[block]]
        if not missing:
            return
        try:
            with nullcontext(self.file) if self.file else open(self.directory / self.name, "rb", buffering=0) as file:
                for block in missing:
                    if _checksum(file.fileno(), block, self.block_bytes, self.algorithm) != self.expected[block]:
                        raise DamagedArtifact(self.directory, self.inode, f"{self.name} does not match its checksum")
                    self.compared[block] = 1
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise DamagedArtifact(self.directory, self.inode, f"{self.name} cannot be read: {error.strerror}") from error


def intact(path: Path) -> Path:
    """The path of a file, once this process has compared all its bytes with the record of its directory.

    A directory without a record is still being written, or is a user's own: its files are taken as they are.

    Raises:
        DamagedArtifact: they differ.
        FileNotFoundError: there is no such file; another process may have moved a damaged artifact aside.
    """
    checks = file_checks(path.parent, path.name)
    if checks is not None:
        checks.require_all()
    return path


def problem_of(directory: Path, name: str) -> str:
    """What is wrong with a file of a sealed directory; empty if it matches the record. Reads it even if it was compared."""
    try:
        checks = file_checks(directory, name)
        if checks is not None:
            checks.compared[:] = bytes(len(checks.compared))
            checks.require_all()
    except DamagedArtifact as damage:
        return damage.problem
    return ""


def file_checks(directory: Path, name: str, file: FileIO | None = None) -> FileChecks | None:
    """The comparison of a file with the record of its directory; None if that has no record.

    Args:
        file: the file, where it is already open; another may lie under its name by the time that its blocks are compared.

    Raises:
        DamagedArtifact: the record is damaged, or says another size, or nothing about this file.
        FileNotFoundError: there is no such file.
    """
    inode = directory.stat().st_ino
    try:
        entry = _entries(directory / RECORD, _state(directory / RECORD)).get(name)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise DamagedArtifact(directory, inode, f"its record is unreadable: {error}") from error
    path = directory / name
    state = _state(path if file is None else file.fileno())
    problem = wrong_size(name, state[2], entry) if entry else f"its record does not list {name}"
    if problem or not entry:
        raise DamagedArtifact(directory, inode, problem)
    if "xxh3" in entry:
        expected = tuple(entry["xxh3"][at : at + _DIGITS] for at in range(0, len(entry["xxh3"]), _DIGITS))
        return FileChecks(directory, inode, name, "xxh3", BLOCK_BYTES, expected, _compared(path, state, expected), file)
    expected = (entry["sha256"],)
    return FileChecks(directory, inode, name, "sha256", max(1, state[2]), expected, _compared(path, state, expected), file)


def wrong_size(name: str, size: int, entry: Mapping[str, Any]) -> str:
    """What is wrong with the size of a file, by its entry in a record; empty if nothing is."""
    return "" if size == entry["size"] else f"{name} has {size} bytes, not {entry['size']}"


def version_of(directory: Path) -> State:
    """What changes when an artifact is computed again, for caches of what was read from it; empty without a record."""
    try:
        return _state(directory / RECORD)
    except FileNotFoundError:
        return ()


def _state(file: Path | int) -> State:
    found = os.stat(file)
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=1000)
def _entries(record: Path, state: State) -> Mapping[str, Mapping[str, Any]]:
    """Name -> entry of each file in a record; `state` makes a record that was replaced another one."""
    files = read_json(record).get("files")
    if not isinstance(files, dict):
        raise ValueError("it lists no files")
    return files


@lru_cache(maxsize=_REMEMBERED)
def _compared(path: Path, state: State, expected: tuple[str, ...]) -> bytearray:
    """1 for each block of this file that matches, as far as this process has compared them; `FileChecks` changes it."""
    return bytearray(len(expected))
