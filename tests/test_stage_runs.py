"""Stages that were published but not logged are logged later, once, and only those of the study that computed them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from ktray.errors import SearchStopped
from ktray.fingerprint import fingerprint
from ktray.runs import search_run
from ktray.runs.coordinator import TrialCoordinator, TrialSegment
from ktray.runs.interruption import Interruption
from ktray.runs.search_run import _EventFollower
from ktray.runs.settings import Settings
from ktray.runs.simulation import _NoTracker
from ktray.runs.study_logger import log_missed_stages
from ktray.search.study import Study
from ktray.stores.file import FileStore
from ktray.tracking import Tracker, default_uri
from ktray.tracking.spool import Position, Spool
from ktray.tracking.tracker import logged_stages
from tests.toy_space import toy_space

BEGAN = 1_700_000_000.0


def publish(store: FileStore, key: str, at: float, attempt: str = "a") -> str:
    published = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    record = {"metrics": {"count": 1.0}, "stage": "images", "spec": {"kind": "synthetic"}, "inputs": {}, "seconds": 1.0}
    record |= {"peak_bytes": 1, "device": "cpu", "commit": None, "started_from": None, "published": published}
    record["attempt"] = attempt
    store.publish(store.scratch(key, "a"), key, record)
    return key


def logged_keys(spool: Spool) -> list[Any]:
    return [event["key"] for event, _ in spool.read(0) if event["do"] == "stage"]


def test_stages_that_were_published_but_not_logged_are_logged_once_and_none_older_than_the_study(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    keys = [publish(store, f"images-{number}", BEGAN + number) for number in (-50, 0, 50)]
    for _ in range(2):  # the second time is another session
        tracker = Tracker("http://127.0.0.1:9", tmp_path, "toy")
        tracker.start()
        log_missed_stages(tracker, store, [*keys, "images-absent"], BEGAN)
        log_missed_stages(tracker, store, keys, BEGAN)
        tracker.close("FINISHED", timeout=0)
    assert logged_keys(Spool(tmp_path / "studies/toy/tracking")) == keys[1:]


def test_stages_count_as_logged_if_they_were_written_to_this_tracker_or_wait_in_the_spool(tmp_path: Path) -> None:
    spool, uri = Spool(tmp_path), fingerprint(default_uri(tmp_path))
    spool.append({"do": "stage", "key": "images-1"})
    spool.save_position(Position(spool.size(), uri, {"stage/images-0": ("run", 0), "trial/3": ("run", 0)}))
    spool.append({"do": "stage", "key": "images-2"})
    assert logged_stages(spool, uri) == {"images-0", "images-2"}
    assert logged_stages(spool, "another") == {"images-1", "images-2"}


class _Scheduler:
    """A scheduler that reports what it published, except before a restart of its broker, which loses events."""

    def __init__(self) -> None:
        self.reported: list[str] = []

    def status(self) -> dict[str, Any]:
        return {"name": "ours"}

    def events(self, since: int) -> list[dict[str, Any]]:
        keys = ["images-before", *self.reported]
        events = [{"n": n, "event": "published", "key": key} for n, key in enumerate(keys, 1)]
        return [event for event in events if event["n"] > since]


def test_on_a_shared_store_a_follower_counts_only_what_its_own_scheduler_has_published(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "store")
    by = {"before": "ours-0", "seen": "ours-1", "missed": "ours-2", "theirs": "oursel-1", "here": "4711-18c"}
    for name, attempt in by.items():
        publish(store, f"images-{name}", BEGAN, attempt)
    scheduler: Any = _Scheduler()
    follower = _EventFollower(
        scheduler, store, Tracker("http://127.0.0.1:9", tmp_path, "toy"), lambda events, status: None, print
    )
    scheduler.reported = ["images-seen"]
    follower.close([f"images-{name}" for name in ("seen", "missed", "theirs", "here", "absent")])
    assert follower.published == {"images-seen", "images-missed"}


def test_what_another_search_publishes_on_the_store_meanwhile_does_not_count_as_computed_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    space, store = toy_space(tmp_path), FileStore(tmp_path / "store")
    published: list[str] = []

    def meanwhile(coordinator: TrialCoordinator, *rest: Any) -> SearchStopped:
        first, _ = coordinator.first_segments(1)
        published.extend(publish(store, stage.key, BEGAN, "theirs-1") for stage in first[0].graph.stages)
        return SearchStopped("it is enough")

    monkeypatch.setattr(search_run, "_make_images", lambda *given: None)
    monkeypatch.setattr(search_run, "_run_trials", meanwhile)
    settings = Settings(tmp_path, f"file://{tmp_path / 'store'}")
    tracker, display = Tracker("http://127.0.0.1:9", tmp_path, "toy"), cast(Any, _NoTracker())
    options = search_run.SearchOptions("toy", trials="1")
    outcome = search_run.search_study(space, options, settings, tracker, Interruption(), display)
    assert published
    assert outcome.published == set()
    assert outcome.reused == set(published)


def test_stages_that_a_killed_session_computed_and_did_not_log_are_found_at_every_rung(tmp_path: Path) -> None:
    space, store = toy_space(tmp_path, budget={"trials": 1, "concurrent": 1}), FileStore(tmp_path / "store")

    def coordinator(study: Study) -> TrialCoordinator:
        return TrialCoordinator(
            space, study, store, lambda spec: fingerprint(spec.model_dump()), cast(Any, _NoTracker()), lambda *_: None
        )

    stages: set[str] = set()
    with Study.open(tmp_path, space) as study:
        killed = coordinator(study)
        for _ in space.early_stop.rungs if space.early_stop else ():
            segment = killed.next()
            assert isinstance(segment, TrialSegment)
            stages |= {stage.key for stage in segment.graph.stages}
            if segment.final:
                study.finish(0, {}, {"linear_probe/top1": 0.5}, segment.graph.keys, {})
            else:
                study.pause_at_rung(0, segment.epoch, 0.5, segment.graph.keys)
    with Study.open(tmp_path, space) as study:
        again = coordinator(study)
        assert again.next() == "done"
        assert again.untracked() == stages
        assert not again.demanded
        logged = study.trials()[0].artifact_keys  # by a session that computed the rest and was killed as well
        cast(Any, again.tracker).has_stage = logged.__contains__
        assert again.untracked() == stages - logged
        assert stages - logged
        cast(Any, again.tracker).has_stage = lambda key: True
        assert again.untracked() == set()
