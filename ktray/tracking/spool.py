"""Events that wait for the tracker: JSON lines in one append-only file, and how far they have been applied.

The file is the queue. Nothing that was appended is lost by a kill -9, and a tracker that is down costs disk, not memory.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

BATCH_BYTES = 1 << 20


@dataclass
class Position:
    """How far the spool has been applied, and to what.

    Args:
        offset: bytes of the spool that are applied.
        tracker: fingerprint of the tracker's URI (a URI may hold a password): another tracker has other runs.
        runs: slot ("search", "trial/42", "stage/KEY") -> (run id, start time in ms).
    """

    offset: int = 0
    tracker: str = ""
    runs: dict[str, tuple[str, int]] = field(default_factory=dict)


class Spool:
    """The event file of one study. Any number of threads and processes may append; one at a time applies (`claim`)."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._events = directory / "events.jsonl"
        self._position = directory / "position.json"
        self._rejected = directory / "rejected.jsonl"
        self._lock = directory / "writer.lock"
        self._claim: int | None = None

    def append(self, event: dict[str, Any]) -> None:
        """Adds one event, whole or not at all.

        Raises:
            OSError: the disk is full or gone.
            TypeError, ValueError: the event is not plain JSON.
        """
        line = json.dumps(event, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        with self._open_for_append() as (file, size):
            if size and os.pread(file, 1, size - 1) != b"\n":  # a power cut tore the last line: it must not eat this one
                line = b"\n" + line
            if os.write(file, line) != len(line):
                os.ftruncate(file, size)
                raise OSError(f"no room for an event in {self._events}")

    def read(self, offset: int) -> list[tuple[dict[str, Any], int]]:
        """Complete events from `offset` on, about a megabyte at most, each with the offset behind it.

        A torn line is an empty event.
        """
        if offset >= self.size():
            return []
        entries = []
        with open(self._events, "rb") as file:
            file.seek(offset)
            for line in file.readlines(BATCH_BYTES):
                offset += len(line)
                if line.endswith(b"\n"):
                    entries.append((_parsed(line), offset))
        return entries

    def size(self) -> int:
        """Bytes appended so far."""
        return self._events.stat().st_size if self._events.exists() else 0

    def shrink(self, position: Position) -> None:
        """Empties the file if all of it is applied. Only for the owner of the claim."""
        with self._open_for_append() as (file, size):
            if 0 < size <= position.offset:
                position.offset = 0
                self.save(position)  # first: a kill -9 between the two steps then applies events twice, and loses none
                os.ftruncate(file, 0)

    def load(self) -> Position:
        """The saved position; the beginning if there is none or it lies behind the end of the events."""
        try:
            raw = json.loads(self._position.read_text())
            position = Position(raw["offset"], raw["tracker"], {slot: (run[0], run[1]) for slot, run in raw["runs"].items()})
        except (OSError, ValueError, KeyError, TypeError):
            return Position()
        if position.offset > self.size():
            position.offset = 0
        return position

    def save(self, position: Position) -> None:
        """Replaces the saved position in one step."""
        scratch = self._position.with_name(f"position.{os.getpid()}.tmp")
        scratch.write_text(json.dumps(asdict(position), separators=(",", ":")))
        scratch.replace(self._position)

    def reject(self, event: dict[str, Any], reason: str) -> None:
        """Keeps an event that the tracker will never take, for the person who wonders where it is."""
        with open(self._rejected, "a") as file:
            file.write(json.dumps({"reason": reason, **event}) + "\n")

    def identity(self) -> str:
        """Sixteen hex digits that are this study's alone: on a shared server its name may be someone else's too."""
        with open(self._events.with_name("study_id"), "a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            known = file.read().strip()
            if not known:
                known = secrets.token_hex(8)
                file.write(known + "\n")
        return known

    def claim(self) -> bool:
        """Whether this object is the one that applies events; the claim ends with `release` or with the process."""
        if self._claim is None:
            file = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return False
            self._claim = file
        return True

    def release(self) -> None:
        """Gives the claim to whoever waits for it."""
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    @contextmanager
    def _open_for_append(self) -> Iterator[tuple[int, int]]:
        file = os.open(self._events, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file, os.fstat(file).st_size
        finally:
            os.close(file)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        return {}
    return event if isinstance(event, dict) else {}
