"""The processes of trials: they tell that they live, as workers do, and one that stands still is ended."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Process:
    """One process of the operating system; `born` (seconds since 1970) tells it from a later one with its number."""

    node: str
    pid: int
    born: float


class ProcessLiveness:
    """Who was heard of when. A process that has ended is forgotten like one that stands still: to end it again does nothing.

    Args:
        dead_after: seconds of silence.
    """

    def __init__(self, dead_after: float) -> None:
        self._dead_after = dead_after
        self._heard: dict[Process, float] = {}

    def beat(self, process: Process, now: float) -> None:
        """It lives."""
        self._heard[process] = now

    def recall(self, processes: Iterable[Process], now: float) -> None:
        """After a restart: these lived when the one before last heard of them."""
        for process in processes:
            self._heard.setdefault(process, now)

    def present(self) -> list[Process]:
        """All that are not silent yet."""
        return list(self._heard)

    def silent(self, now: float) -> list[Process]:
        """Those that were not heard of for too long; each is told once."""
        found = [process for process, heard in self._heard.items() if now - heard > self._dead_after]
        for process in found:
            del self._heard[process]
        return found

    def forgive(self, seconds: float) -> None:
        """Nobody listened for so long: that silence proves nothing."""
        self._heard = {process: heard + seconds for process, heard in self._heard.items()}
