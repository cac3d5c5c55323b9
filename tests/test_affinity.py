"""Which worker a stage goes to, what starts before the first stage, and what waits until nobody else needs a worker."""

from __future__ import annotations

from typing import Any

import pytest
from test_scheduler_core import REQUESTS, CoreHarness, assigned, stage

from ktray.scheduler.messages import BACKGROUND, AssignStage, StartWorker
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.worker_registry import RECENT_KEYS, Node, Worker, WorkerShape

QUARTER = WorkerShape(0.0, 0.25)


def worker_of(actions: list[Any], key: str) -> str:
    (found,) = [action.worker for action in actions if isinstance(action, AssignStage) and action.stage.key == key]
    return str(found)


@pytest.mark.parametrize("reverse", [False, True], ids=["as started", "reversed"])
def test_each_stage_of_a_student_goes_to_the_worker_that_ran_the_one_before(
    reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(REQUESTS, "student", ResourceRequest())
    harness = CoreHarness(3)
    images = [stage("images", number=1), stage("images", number=2)]
    harness.request("images", *images)
    for each in images:
        harness.publish(each)
    students = [stage("student", each, number=10) for each in images]
    ran = {each.key: worker_of(harness.request(f"trial {each.key}", each), each.key) for each in students}
    for each in students:
        harness.publish(each)
    for each, pixels in sorted(zip(students, images, strict=True), key=lambda pair: pair[0].key, reverse=reverse):
        judged, longer = stage("evaluation", each), stage("student", pixels, number=99, resume_from=(each,))
        for follower in (judged, longer):
            assert worker_of(harness.request(f"wait for {follower.key}", follower), follower.key) == ran[each.key]
            harness.publish(follower)


def test_a_worker_that_nobody_has_borrowed_goes_before_the_one_that_knows_the_inputs() -> None:
    harness = CoreHarness(3)
    images, split = stage("images"), stage("split")
    knows = worker_of(harness.request("images", images), images.key)
    harness.publish(images)
    for name in {f"worker-{number}" for number in (1, 2, 3)} - {knows}:
        harness.registry.workers[name].polling = False
    leader = worker_of(harness.request("split", split), split.key)
    assert leader == knows
    harness.publish(split)
    for worker in harness.registry.workers.values():
        worker.polling = True
    harness.registry.workers[knows].lent_to = "someone"
    reader = stage("features", images)
    assert worker_of(harness.request("reader", reader), reader.key) != knows


def test_a_worker_remembers_a_bounded_number_of_keys_the_newest_last() -> None:
    worker = Worker("worker-1", WorkerShape(), "node")
    for number in range(100):
        worker.note_stage([f"a-{number}", "images"], float(number))
    assert len(worker.recent) == RECENT_KEYS
    assert worker.recent[-2:] == ("a-99", "images")
    assert worker.affinity({"images", "a-99", "a-0"}) == 2


def test_background_stages_start_on_workers_that_were_idle_for_a_second_and_start_none() -> None:
    harness = CoreHarness(1)
    trial, line = stage("one", number=1), stage("one", number=2)
    assert assigned(harness.request("trial", trial)) == [trial.key]
    assert harness.request("line", line, priority=BACKGROUND) == [], "no worker starts for it"
    assert assigned(harness.publish(trial)) == [], "the trial may ask for its next stage at any moment"
    assert assigned(harness.dispatch(0.9)) == []
    follow = stage("one", number=3)
    assert assigned(harness.request("trial again", follow)) == [follow.key]
    harness.publish(follow)
    assert assigned(harness.dispatch(1.1)) == [line.key]


def test_a_background_stage_that_somebody_asks_for_starts_like_any_other() -> None:
    harness, line = CoreHarness(1), stage("one")
    harness.registry.workers["worker-1"].last_busy = harness.now
    assert harness.request("line", line, priority=BACKGROUND) == []
    assert assigned(harness.request("the end", line)) == [line.key]


def test_workers_with_gpus_start_once_before_the_first_stage_with_the_share_of_a_training() -> None:
    harness = CoreHarness(0, Node(8.0, 1.0))

    def started() -> list[WorkerShape]:
        harness.core.scaling.prestart(2, 0.25, 4)
        found = [action.worker.shape for action in harness.core.outbox if isinstance(action, StartWorker)]
        harness.core.outbox.clear()
        return found

    assert started() == [*2 * [WorkerShape()], *4 * [QUARTER]]
    assert started() == [], "they are starting already"
    for name in [worker.name for worker in harness.registry.workers.values() if worker.shape == QUARTER]:
        del harness.registry.workers[name]
    assert started() == [], "later ones start on demand, with the share that is known to be needed by then"


def test_no_gpu_worker_starts_ahead_where_no_node_has_a_gpu_until_one_joins() -> None:
    harness = CoreHarness(0, Node(2.0, 0.0))
    harness.core.scaling.prestart(1, 0.25, 4)
    harness.registry.set_alive_nodes({**harness.registry.nodes, "gpu": Node(2.0, 1.0)}, harness.now)
    harness.core.outbox.clear()
    harness.core.scaling.prestart(1, 0.25, 4)
    assert [action.worker.node for action in harness.core.outbox] == 4 * ["gpu"]  # type: ignore[union-attr]


def test_idle_workers_are_lent_in_equal_parts_and_go_over_to_a_stage_that_begins_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REQUESTS, "split", ResourceRequest(helpers=9))
    harness = CoreHarness(6, Node(6.0))
    first, second = stage("split", number=1), stage("split", number=2)
    (one,) = [action.attempt for action in harness.request("a", first) if isinstance(action, AssignStage)]
    assert len(harness.core.lent_workers(one)) == 5
    (two,) = [action.attempt for action in harness.request("b", second) if isinstance(action, AssignStage)]
    harness.dispatch()
    assert [len(harness.core.lent_workers(attempt)) for attempt in (one, two)] == [2, 2]
    harness.publish(second)
    assert len(harness.core.lent_workers(one)) == 5


def test_workers_start_to_help_a_stage_only_once_it_has_run_for_longer_than_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REQUESTS, "split", ResourceRequest(helpers=9))
    harness, split = CoreHarness(1, Node(4.0)), stage("split")
    assert [action for action in harness.request("a", split) if isinstance(action, StartWorker)] == []
    assert harness.dispatch(4.0) == []
    assert len([action for action in harness.dispatch(1.1) if isinstance(action, StartWorker)]) == 3
