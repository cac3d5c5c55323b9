"""Events that wait for the tracker: JSON lines in an append-only file, and a position up to which they have been applied.

The file is the queue. A kill -9 loses nothing that was appended, and a tracker that is down costs disk space, not memory.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ktray.checksums import json_text, parse_json, read_json
from ktray.stores.locks import FileLock, try_lock, wait_for_lock

BATCH_BYTES = 1 << 20


@dataclass
class Position:
    """How far the spool has been applied, and to which tracker.

    Attributes:
        offset: bytes of the spool that are applied.
        tracker: fingerprint of the tracker's URI, which may hold a password. Another tracker has other runs.
        runs: reference to a run ("search", "trial/42", "stage/KEY") -> (run id, start time in ms).
    """

    offset: int = 0
    tracker: str = ""
    runs: dict[str, tuple[str, int]] = field(default_factory=dict)

    def written_to(self, tracker: str) -> Position:
        """This position, if it is one in the runs of this tracker; else the beginning, with none of its runs."""
        return self if self.tracker == tracker else Position(tracker=tracker)


class Spool:
    """The event file of one study. Any thread or process may append; only the one that has the claim applies events."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._events = directory / "events.jsonl"
        self._position = directory / "position.json"
        self._rejected = directory / "rejected.jsonl"
        self._study_id = directory / "study_id"
        self._lock = directory / "writer.lock"
        self._claim: FileLock | None = None

    def append(self, event: dict[str, Any]) -> None:
        """Append one event, whole or not at all.

        Raises:
            OSError: the disk is full or unavailable.
            TypeError, ValueError: the event is not plain JSON.
        """
        line = json_text(event, allow_nan=False).encode() + b"\n"
        with self._open_for_append() as (file, size):
            if size and os.pread(file, 1, size - 1) != b"\n":  # a power cut tore the last line: do not continue it
                line = b"\n" + line
            if os.write(file, line) != len(line):
                os.ftruncate(file, size)
                raise OSError(f"no space left to append an event to {self._events}")

    def read(self, offset: int) -> list[tuple[dict[str, Any], int]]:
        """Return complete events from `offset` on, about a megabyte at most, each with the offset behind it.

        A damaged line becomes an empty event.
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
        """Return the size of the event file in bytes."""
        return self._events.stat().st_size if self._events.exists() else 0

    def count_waiting(self) -> int:
        """Return how many events are not applied yet."""
        count, offset = 0, self.load_position().offset
        while entries := self.read(offset):
            count, offset = count + len(entries), entries[-1][1]
        return count

    def truncate_if_applied(self, position: Position) -> None:
        """Empty the file if all of it is applied. Requires the claim."""
        with self._open_for_append() as (file, size):
            if 0 < size <= position.offset:
                position.offset = 0
                self.save_position(position)  # before truncating: a kill in between repeats events instead of losing new ones
                os.ftruncate(file, 0)

    def load_position(self) -> Position:
        """Return the saved position, or the beginning if there is none or if it lies behind the end of the file."""
        try:
            raw = read_json(self._position)
            position = Position(raw["offset"], raw["tracker"], {ref: (run[0], run[1]) for ref, run in raw["runs"].items()})
        except (OSError, ValueError, KeyError, TypeError):
            return Position()
        if position.offset > self.size():
            position.offset = 0
        return position

    def save_position(self, position: Position) -> None:
        """Replace the saved position atomically."""
        scratch = self._position.with_name(f"position.{os.getpid()}.tmp")
        scratch.write_text(json_text(asdict(position)))
        scratch.replace(self._position)

    def reject(self, event: dict[str, Any], reason: str) -> None:
        """Keep an event that the tracker refuses in ``rejected.jsonl``, for a person to look at."""
        with open(self._rejected, "a") as file:
            file.write(json.dumps({"reason": reason, **event}) + "\n")

    def study_id(self) -> str:
        """Return sixteen random hex digits, the same for the life of the study: others on a server may use the same name."""
        with wait_for_lock(self._study_id):
            known = self._study_id.read_text().strip()
            if not known:
                known = secrets.token_hex(8)
                self._study_id.write_text(f"{known}\n")
        return known

    def claim(self) -> bool:
        """Try to become the only one that applies events. Return whether it is. Ends with `release` or with the process."""
        if self._claim is None:
            self._claim = try_lock(self._lock, str(os.getpid()))
        return self._claim is not None

    def release(self) -> None:
        """Give up the claim."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    @contextmanager
    def _open_for_append(self) -> Iterator[tuple[int, int]]:
        """Open and lock the event file; yields (file descriptor, size in bytes)."""
        with wait_for_lock(self._events):
            file = os.open(self._events, os.O_RDWR | os.O_APPEND)
            try:
                yield file, os.fstat(file).st_size
            finally:
                os.close(file)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        return parse_json(line.decode().removesuffix("\n"))
    except ValueError:
        return {}
