"""Every stage says that its work moves, often enough that no healthy one looks stuck, and seldom enough to cost nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

import ktray.progress
from ktray.artifact import Artifact, Stage
from ktray.pipeline.execute import execute
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.progress import advance, reporting
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.scheduler.resources import STAGES
from ktray.stores import Store
from ktray.stores.file import FileStore
from tests.toys import ROTATION, STUDENT, toy_pair

PAIRS = {
    "trained": toy_pair(
        teacher={**ROTATION, "schedule": {"epochs": 1, "batch_size": 32}},
        student={**STUDENT, "schedule": {"epochs": 1, "batch_size": 32}},
    ),
    "fitted": toy_pair(teacher={"descriptor": {"kind": "bag_of_hog", "words": 4}}, evals=[{"kind": "linear_probe"}]),
}


@pytest.fixture(scope="module", params=PAIRS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Mapping[str, float]]]:
    """Stage -> what it told, of all stages of a pair."""
    said: dict[str, list[Mapping[str, float]]] = {}

    def work(stage: Stage, store: Store, attempt: str, context: StageContext) -> tuple[Artifact, bool]:
        return execute(stage, store, attempt, StageContext(progress=said.setdefault(stage.name, []).append))

    stages = build(PAIRS[request.param], lambda spec: "0" * 64).stages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ktray.progress, "REPORT_INTERVAL", 0.0)
        LocalScheduler(FileStore(tmp_path_factory.mktemp("store")), work, StageContext(), lambda event: None).obtain(
            list(stages), "test"
        )
    return said


def test_every_stage_says_that_its_work_moves(told: dict[str, list[Mapping[str, float]]]) -> None:
    assert told.keys() == set(STAGES)
    assert [stage for stage, reports in told.items() if not reports] == []


def test_a_training_moves_within_an_epoch_and_a_probe_within_its_fit(told: dict[str, list[Mapping[str, float]]]) -> None:
    reports = told["student"]
    assert reports[1] == {"step": 2}  # no epoch is named before it has ended: that would claim that it is saved
    assert reports[-1]["epoch"] == reports[-1]["of"]
    assert told["evaluation"][0].keys() == {"images"}
    assert any(each.keys() & {"judged", "iterations"} for each in told["evaluation"])


def test_what_moves_is_told_with_what_the_stage_said_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ktray.progress, "REPORT_INTERVAL", 0.0)
    said: list[Mapping[str, float]] = []
    with reporting(said.append) as report:
        advance("step")
        report({"epoch": 1, "of": 2})
        advance("step")
    assert said == [{"step": 1}, {"epoch": 1, "of": 2}, {"epoch": 1, "of": 2, "step": 1}]


def test_loops_are_heard_every_few_seconds_however_often_they_speak(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(ktray.progress, "time", SimpleNamespace(monotonic=lambda: clock.now))
    said: list[Any] = []
    with reporting(said.append):
        for _ in range(310):
            clock.now += 0.1
            advance("images", 256)
    assert [each["images"] for each in said] == pytest.approx([25600, 51200, 76800], rel=0.02)


def test_what_moves_outside_a_stage_or_for_another_worker_is_heard_by_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ktray.progress, "REPORT_INTERVAL", 0.0)
    said: list[Any] = []
    advance("images")
    with reporting(said.append):
        elsewhere = threading.Thread(target=advance, args=("images",))
        elsewhere.start()
        elsewhere.join()
    advance("images")
    assert said == []


def test_saying_that_work_moved_costs_less_than_a_batch_notices() -> None:
    with reporting(lambda values: None):
        began = time.perf_counter()
        for _ in range(10_000):
            advance("step")
    assert time.perf_counter() - began < 0.5  # 1 us each on an idle machine
