"""The one thread that talks to MLflow. It may fail for hours: events wait in the spool and nobody waits for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktray.fingerprint import fingerprint
from ktray.tracking import connection
from ktray.tracking.events import apply
from ktray.tracking.mlflow_names import without_password
from ktray.tracking.mlflow_runs import MlflowRuns
from ktray.tracking.spool import Position, Spool

INTERVAL = 1.0  # seconds between batches
LONGEST_PAUSE = 30.0  # seconds between attempts to reach a tracker that is down
PATIENCE = 6  # failures of one batch, with the tracker up, before its events are tried one by one
FINAL = {"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}  # errors that trying again does not cure

log = logging.getLogger("ktray.tracking")


class Writer:
    """Applies a spool's events every second, for as long as its claim on the spool lasts.

    Args:
        spool: the events of one study.
        uri: the tracker, as `connection.checked` gives it.
        home: where artifacts of a sqlite tracker go.
        study: name of the experiment.
        identity: tags of every run of this study.
    """

    def __init__(self, spool: Spool, uri: str, home: Path, study: str, identity: Mapping[str, str]) -> None:
        self._spool, self._uri, self._home, self._study, self._identity = spool, uri, home, study, dict(identity)
        self._position: Position | None = None
        self._runs: MlflowRuns | None = None
        self._pause = 0.0
        self._failures = 0  # in a row
        self._refusals = 0  # of the same batch, in a row
        self._rejected = 0
        self._last_attempts = 2  # at a tracker that is down, once `stop` has been called
        self._deadline = float("inf")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ktray-tracking", daemon=True)

    def start(self) -> None:
        """Starts the thread; returns at once."""
        self._thread.start()

    def stop(self, timeout: float) -> bool:
        """Writes what is left, for `timeout` seconds at most. Whether all of it was written and accepted."""
        self._deadline = time.monotonic() + timeout
        self._stopping.set()
        self._thread.join(timeout)
        applied = self._spool.load().offset >= self._spool.size()
        return applied and not self._rejected and not self._thread.is_alive()

    def _run(self) -> None:
        with connection.environment():
            while True:
                last = self._stopping.is_set()  # before the turn: after it, there may be events that it has not seen
                if self._turn() and last:
                    break
                if self._stopping.is_set():
                    time.sleep(min(self._pause, 0.2))
                else:
                    self._stopping.wait(self._pause)
        self._spool.release()

    def _turn(self) -> bool:
        """One attempt; whether the thread may end now if it should."""
        try:
            if not self._spool.claim():  # another process writes this study, and our events with its own
                self._pause = INTERVAL
                return self._spool.load().offset >= self._spool.size() or time.monotonic() > self._deadline
            left = self._write()
        except Exception as error:  # noqa: BLE001 - the thread's boundary: no tracker's fault may reach a search
            return self._failed(error)
        if self._failures:
            log.info("the tracker answers again; what had waited is being written")
        self._failures = self._refusals = 0
        self._pause = 0.0 if left else INTERVAL
        return not left or time.monotonic() > self._deadline

    def _write(self) -> bool:
        """Applies the next events; whether there may be more."""
        position = self._position = self._position or self._load()
        entries = self._spool.read(position.offset)
        if not entries:
            self._spool.shrink(position)
            return False
        if self._runs is None:
            opened = connection.connect(self._uri, self._home, self._study, {"ktray.study": self._study})
            self._runs = MlflowRuns(opened, self._identity, position.runs)
        if self._refusals >= PATIENCE:
            self._write_singly(entries, self._runs, position)
        else:
            apply([event for event, _ in entries], self._runs)
            self._advance(position, entries[-1][1])
        return True

    def _write_singly(self, entries: list[tuple[dict[str, Any], int]], runs: MlflowRuns, position: Position) -> None:
        """One event at a time up to the one that the tracker refuses, which is put aside: it must not hold up the others."""
        for event, end in entries:
            try:
                apply([event], runs)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this event's, if the tracker takes others
                runs.discard()
                runs.touch(round(time.time() * 1000))  # raises if the tracker is down after all
                reason = without_password(str(error))[:300]
                self._spool.reject(event, reason)
                self._rejected += 1
                log.warning("the tracker refuses an event (%s), kept in rejected.jsonl: %s", event.get("do"), reason)
                self._advance(position, end)
                return
            self._advance(position, end)

    def _advance(self, position: Position, offset: int) -> None:
        position.offset = offset
        self._spool.save(position)

    def _load(self) -> Position:
        position, tracker = self._spool.load(), fingerprint(self._uri)
        if position.tracker != tracker:
            position.tracker, position.runs = tracker, {}
        return position

    def _failed(self, error: Exception) -> bool:
        code = getattr(error, "error_code", "")
        if not self._failures:
            text = without_password(f"{type(error).__name__}: {error}").splitlines()[0][:300]
            log.warning("tracking to %s waits (%s); the search goes on, events are kept", without_password(self._uri), text)
        self._failures += 1
        self._pause = min(2.0 ** min(self._failures - 1, 10), LONGEST_PAUSE)
        if self._runs is not None:
            self._refusals = PATIENCE if code in FINAL else self._refusals + 1
            self._pause = 0.0 if code in FINAL else self._pause
            self._runs = None  # the next attempt begins with a fresh connection
        if code == "RESOURCE_DOES_NOT_EXIST" and self._position:
            self._position.runs.clear()  # another database under the same name: find the runs again, or make them
        if self._stopping.is_set():
            self._last_attempts -= 1
        return self._last_attempts <= 0 or time.monotonic() > self._deadline
