"""The one thread that talks to MLflow: it applies the spool's events. Applying an event twice changes nothing.

MLflow may fail for hours. Events then wait in the spool, and nothing waits for this thread.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ktray.fingerprint import fingerprint
from ktray.redaction import without_secrets
from ktray.tracking import connection
from ktray.tracking.mlflow_names import run_name
from ktray.tracking.mlflow_runs import SEARCH, MlflowRuns
from ktray.tracking.spool import Position, Spool

INTERVAL = 1.0  # seconds between batches
IMPORT_SECONDS = 5.0  # of MLflow, and to open a database: who waits for less need not begin
LONGEST_PAUSE = 30.0  # seconds between attempts to reach a tracker that is down
MOST_BATCH_FAILURES = 6  # of one batch, while the tracker is up, before its events are applied one by one
PERMANENT_ERRORS = {"INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"}  # retrying does not help

log = logging.getLogger("ktray.tracking")

Event = Mapping[str, Any]


class Writer:
    """Applies a spool's events every second while it has the claim on the spool.

    Args:
        spool: the events of one study.
        uri: of the tracker, as `connection.validated_uri` returns it.
        home: where artifacts of a sqlite tracker go.
        study: name of the experiment.
    """

    def __init__(self, spool: Spool, uri: str, home: Path, study: str) -> None:
        self._spool, self._uri, self._home, self._study = spool, uri, home, study
        self._study_tags = {"ktray.study": study, "ktray.study_id": spool.study_id()}
        self._position: Position | None = None
        self._runs: MlflowRuns | None = None
        self._pause = 0.0
        self._failures = 0  # in a row
        self._batch_failures = 0  # of the same batch, in a row
        self.rejected = 0  # events that the tracker has refused in this session
        self._last_attempts = 2  # to reach a tracker that is down, after `stop`
        self._deadline = float("inf")
        self._stopping, self._may_begin = threading.Event(), threading.Event()
        self._hold_seconds, self._too_late = 0.0, False
        self._thread = threading.Thread(target=self._run, name="ktray-tracking", daemon=True)

    def start(self, hold_seconds: float = 0.0) -> None:
        """Start the thread; returns at once.

        Args:
            hold_seconds: for which it waits for `begin` before it imports MLflow, which takes seconds of this process's time.
        """
        self._hold_seconds = hold_seconds
        if not hold_seconds:
            self.begin()
        self._thread.start()

    def begin(self) -> None:
        """Wait no longer."""
        self._may_begin.set()

    def stop(self, timeout: float, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Write what is left, for at most `timeout` seconds. Return whether all of it was written and accepted.

        Args:
            give_up: asked again and again whether to wait no longer.
        """
        self._deadline = time.monotonic() + timeout
        self._too_late = not self._may_begin.is_set() and timeout < IMPORT_SECONDS
        self._stopping.set()
        self._may_begin.set()
        while self._thread.is_alive() and not give_up() and (left := self._deadline - time.monotonic()) > 0:
            self._thread.join(min(0.2, left))
        applied = self._spool.load_position().offset >= self._spool.size()
        return applied and not self.rejected and not self._thread.is_alive()

    def _run(self) -> None:
        self._may_begin.wait(self._hold_seconds)
        if self._too_late:  # the next session writes what waits
            self._spool.release()
            return
        with connection.mlflow_environment():
            while True:
                stopping = self._stopping.is_set()  # read before the attempt, which may miss events appended meanwhile
                if self._attempt() and stopping:
                    break
                if self._stopping.is_set():
                    time.sleep(min(self._pause, 0.2))
                else:
                    self._stopping.wait(self._pause)
        self._spool.release()

    def _attempt(self) -> bool:
        """Try to write the next batch. Return whether the thread may end if it is asked to."""
        try:
            if not self._spool.claim():  # another process writes this study, including our events
                self._pause = INTERVAL
                return self._spool.load_position().offset >= self._spool.size() or time.monotonic() > self._deadline
            more = self._write()
        except Exception as error:  # noqa: BLE001 - the thread's boundary: a tracker's error must not reach the search
            return self._after_failure(error)
        if self._failures:
            log.info("the tracker answers again; writing the events that waited")
        self._failures = self._batch_failures = 0
        self._pause = 0.0 if more else INTERVAL
        return not more or time.monotonic() > self._deadline

    def _write(self) -> bool:
        """Apply the next events. Return whether there may be more."""
        position = self._position = self._position or self._load_position()
        entries = self._spool.read(position.offset)
        if not entries:
            self._spool.truncate_if_applied(position)
            return False
        if not all(event for event, _ in entries):
            log.warning("an event that waited for the tracker is damaged and was left out")
        if self._runs is None:
            opened = connection.connect(self._uri, self._home, self._study, {"ktray.study": self._study})
            self._runs = MlflowRuns(opened, self._study_tags, position.runs, self._home.absolute())
        if self._batch_failures >= MOST_BATCH_FAILURES:
            self._write_singly(entries, self._runs, position)
        else:
            apply([event for event, _ in entries], self._runs)
            self._advance(position, entries[-1][1])
        return True

    def _write_singly(self, entries: list[tuple[dict[str, Any], int]], runs: MlflowRuns, position: Position) -> None:
        """Apply events one at a time up to the one that the tracker refuses, and put that aside so that the others go on."""
        for event, end in entries:
            try:
                apply([event], runs)
            except Exception as error:  # noqa: BLE001 - if the tracker accepts other writes, this event is the problem
                runs.clear_buffers()
                runs.check_writable(round(time.time() * 1000))
                reason = without_secrets(str(error))[:300]
                self._spool.reject(event, reason)
                self.rejected += 1
                log.warning("the tracker refuses an event (%s), kept in rejected.jsonl: %s", event.get("do"), reason)
                self._advance(position, end)
                return
            self._advance(position, end)

    def _advance(self, position: Position, offset: int) -> None:
        position.offset = offset
        self._spool.save_position(position)

    def _load_position(self) -> Position:
        position, tracker = self._spool.load_position(), fingerprint(self._uri)
        if position.tracker != tracker:
            position.tracker, position.runs = tracker, {}
        return position

    def _after_failure(self, error: Exception) -> bool:
        """Warn once, choose the pause before the next attempt, and return whether the thread may end if it is asked to."""
        code = getattr(error, "error_code", "")
        if not self._failures:
            text = without_secrets(f"{type(error).__name__}: {error}").splitlines()[0][:300]
            uri = without_secrets(self._uri)
            log.warning("cannot write to the tracker %s (%s); the search continues and the events are kept", uri, text)
        self._failures += 1
        self._pause = min(2.0 ** min(self._failures - 1, 10), LONGEST_PAUSE)
        if self._runs is not None:  # the tracker was up
            permanent = code in PERMANENT_ERRORS
            self._batch_failures = MOST_BATCH_FAILURES if permanent else self._batch_failures + 1
            self._pause = 0.0 if permanent else self._pause
            self._runs = None  # the next attempt opens a new connection
        if code == "RESOURCE_DOES_NOT_EXIST" and self._position:
            self._position.runs.clear()  # perhaps another database under the same URI: find the runs again, or create them
        if self._stopping.is_set():
            self._last_attempts -= 1
        return self._last_attempts <= 0 or time.monotonic() > self._deadline


# --- what each event of `Tracker` does to the runs


def apply(events: Iterable[Event], runs: MlflowRuns) -> None:
    """Apply events in order. All of them are written when it returns."""
    for event in events:
        if handler := _HANDLERS.get(event.get("do", "")):
            handler(runs, event)
    runs.flush_all()


def _open(runs: MlflowRuns, event: Event) -> None:
    if runs.find_or_create(SEARCH, event["name"], event["time"]):
        runs.reopen(SEARCH, event["name"])
    runs.log(SEARCH, tags=event["tags"])
    if event["alone"]:
        runs.end_orphans(event["time"])


def _describe(runs: MlflowRuns, event: Event) -> None:
    runs.tag_experiment(event["tags"])


def _summary(runs: MlflowRuns, event: Event) -> None:
    runs.find_or_create(SEARCH, event["name"], event["time"])
    runs.log(SEARCH, metrics=event["metrics"], time=event["time"], tags=event["tags"])
    _note(runs, SEARCH, event)


def _attach(runs: MlflowRuns, event: Event) -> None:
    runs.find_or_create(SEARCH, event["name"], event["time"])
    tables = [{"path": name, "type": "table"} for name in event["tables"]]
    try:
        for file in event["files"]:
            if (runs.home / file).exists():
                runs.upload(SEARCH, runs.home / file, "")
        runs.log(SEARCH, tags={"mlflow.loggedArtifacts": json.dumps(tables)} if tables else {})
    except Exception as error:  # noqa: BLE001 - as for images: artifact stores raise their own kinds
        runs.check_writable(round(time.time() * 1000))
        runs.log(SEARCH, tags={"ktray.files": without_secrets(f"not stored: {error}")[:500]})


def _trial(runs: MlflowRuns, event: Event) -> None:
    ref, params, tags = f"trial/{event['number']}", event["params"], dict(event["tags"])
    if runs.find_or_create(ref, event["name"], event["time"]):
        old = runs.reopen(ref, event["name"])
        changed = sorted(key for key, text in params.items() if old.get(key, text) != text)
        tags |= {"ktray.changed_params": ", ".join(changed)} if changed else {}
        params = {key: text for key, text in params.items() if key not in old}
    runs.log(ref, params=params, tags=tags)
    _note(runs, ref, event)


def _metrics(runs: MlflowRuns, event: Event) -> None:
    ref = _trial_ref(runs, event)
    runs.log(ref, metrics=event["metrics"], step=event["step"], time=event["time"], tags=event["tags"])


def _curve(runs: MlflowRuns, event: Event) -> None:
    _rows(runs, _trial_ref(runs, event), event["rows"])


def _finish(runs: MlflowRuns, event: Event) -> None:
    ref = _trial_ref(runs, event)
    runs.log(ref, metrics=event["metrics"], time=event["time"], tags=event["tags"])
    _note(runs, ref, event)
    runs.end(ref, event["status"], event["time"])


def _reference(runs: MlflowRuns, event: Event) -> None:
    ref = f"trial-reference/{event['name']}"
    runs.find_or_create(ref, f"({event['name']})", event["time"])
    runs.log(ref, metrics=event["metrics"], time=runs.start_of(ref), tags=event["tags"])
    _note(runs, ref, event)
    runs.end(ref, "FINISHED", event["time"])


def _stage(runs: MlflowRuns, event: Event) -> None:
    ref, (began, ended) = f"stage/{event['key']}", event["span"]
    runs.find_or_create(ref, event["name"], began)
    _rows(runs, ref, event["rows"])
    runs.log(ref, metrics=event["metrics"], time=ended, params=event["params"], tags=event["tags"])
    _note(runs, ref, event)
    runs.end(ref, "FINISHED", ended)


def _images(runs: MlflowRuns, event: Event) -> None:
    ref, images = f"stage/{event['key']}", [runs.home / image for image in event["images"]]
    runs.find_or_create(ref, event["name"], event["time"])
    if not (runs.local or event["share"]):
        runs.log(ref, tags={"ktray.images": f"{len(images)} kept at home; --share-images sends them"})
        return
    names = [image.name for image in images]
    try:
        for index, image in enumerate(images):
            if image.exists():
                runs.upload(ref, image, f"images/{index}" if names.count(image.name) > 1 else "images")
    except Exception as error:  # noqa: BLE001 - artifact stores are a dozen clients, each with its own exceptions
        runs.check_writable(round(time.time() * 1000))  # if the tracker itself is down, the event waits for it
        runs.log(ref, tags={"ktray.images": without_secrets(f"not stored: {error}")[:500]})


def _close(runs: MlflowRuns, event: Event) -> None:
    runs.find_or_create(SEARCH, event["name"], event["time"])
    runs.end(SEARCH, event["status"], event["time"])


_HANDLERS: dict[str, Callable[[MlflowRuns, Event], None]] = {
    "open": _open,
    "describe": _describe,
    "summary": _summary,
    "attach": _attach,
    "trial": _trial,
    "metrics": _metrics,
    "curve": _curve,
    "finish": _finish,
    "reference": _reference,
    "stage": _stage,
    "images": _images,
    "close": _close,
}


def _trial_ref(runs: MlflowRuns, event: Event) -> str:
    """Return the reference of a trial's run, and create the run if its beginning was logged to another tracker."""
    ref = f"trial/{event['number']}"
    runs.find_or_create(ref, run_name(event["number"], ""), event["time"])
    return ref


def _rows(runs: MlflowRuns, ref: str, rows: Iterable[Event]) -> None:
    # A curve has no clock times. Start + step gives a row that is sent again, with a longer curve or from the store, the same
    # time again, and MLflow stores equal points once.
    start = runs.start_of(ref)
    for row in rows:
        runs.log(ref, metrics=row["metrics"], step=row["step"], time=start + row["step"], tags=row["tags"])


def _note(runs: MlflowRuns, ref: str, event: Event) -> None:
    if text := event.get("note"):
        runs.describe(ref, text, images=runs.local or event["share"])
