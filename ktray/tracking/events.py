"""What each event does to the runs. Applying one twice changes nothing, so a replay after a kill -9 is safe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ktray.tracking.mlflow_names import run_name, without_password
from ktray.tracking.mlflow_runs import SEARCH, MlflowRuns

Event = Mapping[str, Any]


def apply(events: Iterable[Event], runs: MlflowRuns) -> None:
    """Applies `events` in order; when it returns, all of them are written."""
    for event in events:
        if handler := _HANDLERS.get(event.get("do", "")):
            handler(runs, event)
    runs.flush_all()


def _open(runs: MlflowRuns, event: Event) -> None:
    if runs.ensure(SEARCH, event["name"], event["time"]):
        runs.reopen(SEARCH, event["name"])
    runs.log(SEARCH, tags=event["tags"])
    if event["alone"]:
        runs.kill_orphans(event["time"])


def _describe(runs: MlflowRuns, event: Event) -> None:
    runs.tag_experiment(event["tags"])


def _summary(runs: MlflowRuns, event: Event) -> None:
    runs.ensure(SEARCH, event["name"], event["time"])
    runs.log(SEARCH, metrics=event["metrics"], time=event["time"], tags=event["tags"])
    _note(runs, SEARCH, event)


def _trial(runs: MlflowRuns, event: Event) -> None:
    slot, params, tags = f"trial/{event['number']}", event["params"], dict(event["tags"])
    if runs.ensure(slot, event["name"], event["time"]):
        old = runs.reopen(slot, event["name"])
        changed = sorted(key for key, text in params.items() if old.get(key, text) != text)
        tags |= {"ktray.changed_params": ", ".join(changed)} if changed else {}
        params = {key: text for key, text in params.items() if key not in old}
    runs.log(slot, params=params, tags=tags)
    _note(runs, slot, event)


def _metrics(runs: MlflowRuns, event: Event) -> None:
    slot = _trial_slot(runs, event)
    runs.log(slot, metrics=event["metrics"], step=event["step"], time=event["time"], tags=event["tags"])


def _curve(runs: MlflowRuns, event: Event) -> None:
    _rows(runs, _trial_slot(runs, event), event["rows"])


def _finish(runs: MlflowRuns, event: Event) -> None:
    slot = _trial_slot(runs, event)
    runs.log(slot, metrics=event["metrics"], time=event["time"], tags=event["tags"])
    _note(runs, slot, event)
    runs.end(slot, event["status"], event["time"])


def _stage(runs: MlflowRuns, event: Event) -> None:
    slot, (began, ended) = f"stage/{event['key']}", event["span"]
    runs.ensure(slot, event["name"], began)
    _rows(runs, slot, event["rows"])
    runs.log(slot, metrics=event["metrics"], time=ended, params=event["params"], tags=event["tags"])
    _note(runs, slot, event)
    runs.end(slot, "FINISHED", ended)


def _images(runs: MlflowRuns, event: Event) -> None:
    slot, images = f"stage/{event['key']}", [Path(image) for image in event["images"]]
    runs.ensure(slot, event["name"], event["time"])
    if not (runs.local or event["share"]):
        runs.log(slot, tags={"ktray.images": f"{len(images)} kept at home; --share-images sends them"})
        return
    names = [image.name for image in images]
    try:
        for index, image in enumerate(images):
            if image.exists():
                runs.attach(slot, image, f"images/{index}" if names.count(image.name) > 1 else "images")
    except Exception as error:  # noqa: BLE001 - an artifact store is any of a dozen clients, each with its own exceptions
        runs.touch(round(time.time() * 1000))  # raises if the tracker itself is down: then the event waits for it
        runs.log(slot, tags={"ktray.images": without_password(f"not stored: {error}")[:500]})


def _close(runs: MlflowRuns, event: Event) -> None:
    runs.ensure(SEARCH, event["name"], event["time"])
    runs.end(SEARCH, event["status"], event["time"])


_HANDLERS: dict[str, Callable[[MlflowRuns, Event], None]] = {
    "open": _open,
    "describe": _describe,
    "summary": _summary,
    "trial": _trial,
    "metrics": _metrics,
    "curve": _curve,
    "finish": _finish,
    "stage": _stage,
    "images": _images,
    "close": _close,
}


def _trial_slot(runs: MlflowRuns, event: Event) -> str:
    """The slot of a trial that may never have been announced to this tracker, because it was another one then."""
    slot = f"trial/{event['number']}"
    runs.ensure(slot, run_name(event["number"], ""), event["time"])
    return slot


def _rows(runs: MlflowRuns, slot: str, rows: Iterable[Event]) -> None:
    # A curve tells no clock time. Start + step gives a row that comes again, with a longer curve or from the store, the
    # same time again, and MLflow keeps one copy of equal points.
    start = runs.start_of(slot)
    for row in rows:
        runs.log(slot, metrics=row["metrics"], step=row["step"], time=start + row["step"], tags=row["tags"])


def _note(runs: MlflowRuns, slot: str, event: Event) -> None:
    if text := event.get("note"):
        runs.describe(slot, text, images=runs.local or event["share"])
