"""Two schedulers on one store: whoever is slower at a key takes what the faster one has published, and fails nothing."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import pytest
from conftest import SchedulerFactory
from test_broker import until
from test_scheduler_core import CoreHarness, assigned, results, stage
from test_stage_runs import publish
from toy_work import toy, work

from ktray.artifact import Artifact, Stage
from ktray.fingerprint import fingerprint
from ktray.pool import StageContext
from ktray.runs.coordinator import TrialCoordinator, TrialSegment
from ktray.runs.simulation import _NoTracker
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.search.study import Study
from ktray.stores import Store
from ktray.stores.file import FileStore
from tests.toy_space import toy_space


def overtaken(stage: Stage, store: Store, attempt: str, context: StageContext) -> tuple[Artifact, bool]:
    """Another scheduler publishes while this one still writes."""
    scratch = store.scratch(stage.key, attempt)
    assert work(stage, store, "theirs-1", context)[1]
    (scratch / "weights").write_bytes(b"w")
    raise AssertionError("its directory is still there")


def test_one_process_that_is_overtaken_in_the_middle_of_a_stage_reuses_what_the_other_one_made(tmp_path: Path) -> None:
    store, told = FileStore(tmp_path), list[Any]()
    (outcome,) = LocalScheduler(store, overtaken, StageContext(), told.append).obtain([toy("overtaken")], "test")
    assert (outcome["state"], outcome["metrics"]) == ("reused", {"toy/steps": 0.0})
    assert [event["event"] for event in told] == ["started", "found"]
    assert store.failure(outcome["key"]) is None


def test_a_stage_that_another_scheduler_has_published_meanwhile_has_not_failed() -> None:
    harness, one = CoreHarness(1), stage("one")
    reader = stage("reader", one)
    harness.request("a", one, reader)
    harness.store.add(one.key)
    assert assigned(harness.fail(one)) == [reader.key]
    assert results(harness.publish(reader)) == {"a": ["reused", "computed"]}
    assert harness.core.computed == {"reader": 1}


def test_what_failed_here_is_reused_once_another_search_has_made_it(tmp_path: Path) -> None:
    pair = {"teacher": {"descriptor": {"kind": "hog", "cell": 4}}}
    space, store = toy_space(tmp_path, pair, budget={"trials": 6, "concurrent": 1}), FileStore(tmp_path / "store")
    with Study.open(tmp_path, space) as study:
        identity = lambda spec: fingerprint(spec.model_dump())  # noqa: E731
        coordinator = TrialCoordinator(space, study, store, identity, cast(Any, _NoTracker()), lambda *said: None)
        first = coordinator.next()
        assert isinstance(first, TrialSegment)
        key = first.graph.keys["features"]
        coordinator.fail(first, f"{key} failed: ValueError: no", key)
        publish(store, key, 0.0)
        second = coordinator.next()
        assert isinstance(second, TrialSegment)
        assert second.graph.keys["features"] == key
        assert [trial.state for trial in study.trials()] == ["failed", "running"]


def tardy(stage: Stage, store: Store, attempt: str, context: StageContext) -> tuple[Artifact, bool]:
    """Writes only once somebody else has published."""
    scratch = store.scratch(stage.key, attempt)
    while store.find(stage.key) is None:
        time.sleep(0.05)
    (scratch / "weights").write_bytes(b"w")
    raise AssertionError("its directory is still there")


@pytest.mark.slow
def test_two_schedulers_that_make_the_same_at_once_both_get_it(start_scheduler: SchedulerFactory, tmp_path: Path) -> None:
    slower, faster = start_scheduler(tmp_path / "store", tardy), start_scheduler(tmp_path / "store")
    same = toy("slow", {"steps": 3})
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(slower.obtain, [same], "trial")
        until(lambda: list((tmp_path / "store" / ".scratch").glob(f"{same.key}.*")))
        assert faster.obtain([same], "trial")[0]["state"] == "computed"
        assert waits.result()[0]["state"] == "reused"
