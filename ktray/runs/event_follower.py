"""Follow the scheduler while it works: log finished stages to the tracker, and show events and status."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import ray

from ktray.errors import StoppedEarly
from ktray.runs.study_logger import log_stage
from ktray.scheduler.client import SchedulerClient
from ktray.stores import Store
from ktray.tracking import Tracker

POLL_SECONDS = 1.0


class EventFollower:
    """A thread that reads the scheduler's events once a second.

    Args:
        show: called once a second with the new events and the scheduler's status: ``show(events, status)``.

    Attributes:
        published: keys of the artifacts that this scheduler has published since the follower started.
    """

    def __init__(
        self,
        scheduler: SchedulerClient,
        store: Store,
        tracker: Tracker,
        show: Callable[[list[dict[str, Any]], Mapping[str, Any]], None],
    ) -> None:
        self.scheduler, self.store, self.tracker, self.show = scheduler, store, tracker, show
        self.published: set[str] = set()
        self._name = str(scheduler.status()["name"])
        past = scheduler.events(0)
        self._last_event = past[-1]["n"] if past else 0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._closing.wait(POLL_SECONDS):
            try:
                with suppress(ray.exceptions.RayError):  # a call that failed: the next second tries again
                    self._read()
            except StoppedEarly:
                return  # the scheduler has ended; the search itself reports why

    def _read(self) -> None:
        events = self.scheduler.events(self._last_event)
        for event in events:
            self._last_event = max(self._last_event, event["n"])
            if event["event"] == "published":
                self._log_published(event["key"])
        self.show(events, self.scheduler.status())

    def _log_published(self, key: str) -> None:
        artifact = self.store.find(key) if key not in self.published else None
        if artifact is not None:
            self.published.add(key)
            log_stage(self.tracker, artifact)

    def close(self, new: Iterable[str]) -> None:
        """Read the last events, then stop.

        Args:
            new: keys that may have been published meanwhile. The events of a broker that died are lost, so those of them that
                are in the store with an attempt of this scheduler are logged as well.
        """
        self._closing.set()
        self._thread.join(timeout=10)
        with suppress(StoppedEarly, ray.exceptions.RayError):
            self._read()
        for key in new:
            artifact = self.store.find(key)
            if artifact is not None and artifact.record["attempt"].startswith(f"{self._name}-"):
                self._log_published(key)
