"""What really happened, seen from outside: a thread that looks at the store's folders, and what follows from what it saw."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.2
WORK_AFTER_DRIVER_SECONDS = 3.0  # seconds that workers of our own Ray may work on after their driver's death


@dataclass
class Attempt:
    """A scratch folder: when it was seen, and the last checkpoint in it.

    Attributes:
        stopped: when its process was frozen or lost its driver; what comes later is no work.
        checkpoint: (epoch, time) of its latest checkpoint.
    """

    key: str
    first: float
    last: float
    stopped: float | None = None
    checkpoint: tuple[int, float] | None = None


@dataclass(frozen=True)
class WorkerSeconds:
    """Worker-seconds: all that were worked, those of them that no artifact holds, and those that a frozen worker held."""

    total: float
    lost: float
    frozen: float

    @property
    def share(self) -> float:
        return self.lost / self.total if self.total else 0.0


@dataclass
class StoreWatcher:
    """A thread that scans one store.

    Attributes:
        attempts: ``KEY.ATTEMPT`` -> what was seen of it.
        published: key -> attempts whose record lay there, in order: more than one is a key that was published twice.
    """

    store: Path
    attempts: dict[str, Attempt] = field(default_factory=dict)
    published: dict[str, list[str]] = field(default_factory=dict)
    records: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __enter__(self) -> StoreWatcher:
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join()
        self.scan(time.time())

    def _follow(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            self.scan(time.time())

    def scan(self, now: float) -> None:
        """Scan the store once."""
        for path in (self.store / ".scratch").glob("*.*"):
            key = path.name.rpartition(".")[0]
            attempt = self.attempts.setdefault(path.name, Attempt(key, now, now))
            attempt.last = now
            with suppress(OSError):
                for saved in path.glob("checkpoint-*[0-9]"):
                    attempt.checkpoint = (int(saved.name.rpartition("-")[2]), saved.stat().st_mtime)
        for path in self.store.glob("*/record.json"):
            with suppress(OSError, ValueError):
                record = json.loads(path.read_text())
                seen = self.published.setdefault(path.parent.name, [])
                if record["attempt"] not in seen:
                    seen.append(record["attempt"])
                    self.records[path.parent.name] = record

    def freeze(self, key: str, now: float) -> None:
        """The worker that ran this stage was frozen."""
        for attempt in self.attempts.values():
            if attempt.key == key and attempt.stopped is None and now - attempt.last < 1:
                attempt.stopped = now

    def note_driver_death(self, now: float) -> None:
        """The driver of our own Ray died: whatever runs ends in a moment."""
        for attempt in self.attempts.values():
            if attempt.stopped is None and now - attempt.last < 1:
                attempt.stopped = now + WORK_AFTER_DRIVER_SECONDS

    def restarted_at(self, key: str, after: float) -> float | None:
        """When the next attempt at a stage began after this moment; None if there was none."""
        again = [attempt.first for attempt in self.attempts.values() if attempt.key == key and attempt.first > after]
        return min(again, default=None)

    def worker_seconds(self) -> WorkerSeconds:
        return worker_seconds(self.attempts, self.records)


def worker_seconds(attempts: Mapping[str, Attempt], records: Mapping[str, Mapping[str, Any]]) -> WorkerSeconds:
    """Worker-seconds, from what was seen of attempts and from what the records of published ones say.

    What an attempt did until its last checkpoint is not lost if what was published went on from there or from further on.
    """
    total, lost, frozen = 0.0, 0.0, 0.0
    for name, attempt in attempts.items():
        record = records.get(attempt.key, {})
        if name == f"{attempt.key}.{record.get('attempt')}":
            continue
        end = min(attempt.last, attempt.stopped or attempt.last)
        kept = attempt.first
        if attempt.checkpoint is not None and attempt.checkpoint[0] <= _continued(record):
            kept = min(max(attempt.checkpoint[1], attempt.first), end)
        total += end - attempt.first
        lost += end - kept
        frozen += attempt.last - end
    return WorkerSeconds(total + sum(float(record["seconds"]) for record in records.values()), lost, frozen)


def _continued(record: Mapping[str, Any]) -> int:
    """The epoch of the checkpoint that a published attempt went on from, -1 without one."""
    start = str(record.get("started_from") or "")
    return int(start.rpartition("-")[2]) if start.startswith("checkpoint-") else -1
