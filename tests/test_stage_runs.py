"""A stage that was published while nobody could tell the tracker is told later, once, and none of another study."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ktray.drivers.stage_runs import track_missed
from ktray.fingerprint import fingerprint
from ktray.stores.file import FileStore
from ktray.tracking import Tracker, _told_stages, default_uri
from ktray.tracking.spool import Position, Spool

BEGAN = 1_700_000_000.0


def publish(store: FileStore, key: str, at: float) -> str:
    published = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    record = {"metrics": {"count": 1.0}, "stage": "images", "spec": {"kind": "synthetic"}, "inputs": {}, "seconds": 1.0}
    record |= {"peak_bytes": 1, "device": "cpu", "commit": None, "started_from": None, "published": published}
    store.publish(store.scratch(key, "a"), key, record)
    return key


def stages_in(spool: Spool) -> list[Any]:
    return [event["key"] for event, _ in spool.read(0) if event["do"] == "stage"]


def test_what_was_published_and_not_told_is_told_once_and_nothing_older_than_the_study(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    keys = [publish(store, f"images-{number}", BEGAN + number) for number in (-50, 0, 50)]
    for _ in range(2):  # the second time is another session
        tracker = Tracker("http://127.0.0.1:9", tmp_path, "toy")
        tracker.start()
        track_missed(tracker, store, [*keys, "images-absent"], BEGAN)
        track_missed(tracker, store, keys, BEGAN)
        tracker.close("FINISHED", timeout=0)
    assert stages_in(Spool(tmp_path / "studies/toy/tracking")) == keys[1:]


def test_stages_that_were_applied_or_that_wait_are_known_and_those_of_another_tracker_are_not(tmp_path: Path) -> None:
    spool, uri = Spool(tmp_path), fingerprint(default_uri(tmp_path))
    spool.append({"do": "stage", "key": "images-1"})
    spool.save(Position(spool.size(), uri, {"stage/images-0": ("run", 0), "trial/3": ("run", 0)}))
    spool.append({"do": "stage", "key": "images-2"})
    assert _told_stages(spool, uri) == {"images-0", "images-2"}
    assert _told_stages(spool, "another") == {"images-1", "images-2"}
