"""The core's decisions, without Ray and on a clock that the test turns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ktray.artifact import Artifact, Stage
from ktray.scheduler.core import SchedulerCore
from ktray.scheduler.messages import (
    AssignStage,
    FenceAttempt,
    KillWorker,
    RequestResult,
    RetireWorker,
    SchedulerEvent,
    StartWorker,
)
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.workers import Node, WorkerRegistry, WorkerShape

NEEDS = {"split": ResourceRequest(helpers=2), "student": ResourceRequest(gpus=1.0), "half": ResourceRequest(gpus=0.5)}
NEEDS |= {"large": ResourceRequest(memory_bytes=60), "impossible": ResourceRequest(gpus=8.0)}


class House:
    """A core with a store that is a set of keys, and a clock."""

    def __init__(self, workers: int = 2, node: Node | None = None) -> None:
        self.store: set[str] = set()
        self.now = 100.0
        numbers: Iterator[int] = iter(range(1000))
        self.registry = WorkerRegistry({"node": node or Node(4.0, 1.0, 100.0)})
        self.core = SchedulerCore(
            self.find, lambda name: NEEDS.get(name, ResourceRequest()), self.registry, lambda: f"attempt-{next(numbers)}", 15.0
        )
        for number in range(workers):
            self.arrive(f"worker-{number + 1}")

    def find(self, key: str) -> Artifact | None:
        return Artifact(key, Path(key), {"m": 1.0}, {"seconds": 2.0}) if key in self.store else None

    def arrive(self, name: str, shape: WorkerShape | None = None) -> None:
        worker = self.registry.workers.get(name) or self.registry.register(name, shape or WorkerShape(), "node")
        self.core.heartbeat(worker, "", None, "", {}, self.now)
        worker.polling = True

    def want(self, name: str, *stages: Stage, priority: int = 0, waiter: str | None = None) -> list[Any]:
        self.core.requests.add_request(name, name if waiter is None else waiter, "driver", stages, priority, self.now)
        return self.turn()

    def turn(self, seconds: float = 0.0) -> list[Any]:
        self.now += seconds
        self.core.dispatch(self.now)
        outbox = self.core.outbox[:]
        self.core.outbox.clear()
        return [action for action in outbox if not isinstance(action, SchedulerEvent)]

    def publish(self, stage: Stage) -> list[Any]:
        run = self.core.running[stage.key]
        self.store.add(stage.key)
        self.core.attempt_succeeded(stage.key, run.attempt, True, 1.0, self.now)
        if run.worker in self.registry.workers:
            self.registry.workers[run.worker].polling = True
        return self.turn()

    def fail(self, stage: Stage, missing: str = "") -> list[Any]:
        run = self.core.running[stage.key]
        self.core.attempt_failed(stage.key, run.attempt, "failed", "ValueError: no", missing, self.now)
        self.registry.workers[run.worker].polling = True
        return self.turn()


def stage(name: str, *inputs: Stage, number: int = 0, starts: tuple[Stage, ...] = ()) -> Stage:
    roles = {f"role{index}": each.key for index, each in enumerate(inputs)}
    return Stage(name, {"number": number}, {}, roles, tuple(each.key for each in starts))


def given(actions: list[Any]) -> list[str]:
    return [action.stage.key for action in actions if isinstance(action, AssignStage)]


def answers(actions: list[Any]) -> dict[str, Any]:
    said = [action for action in actions if isinstance(action, RequestResult)]
    return {answer.request: answer.cause or [outcome["state"] for outcome in answer.outcomes] for answer in said}


def test_equal_stages_run_once_and_answer_all() -> None:
    house, one = House(), stage("one")
    assert given(house.want("a", one)) == [one.key]
    assert given(house.want("b", one)) == []
    assert answers(house.publish(one)) == {"a": ["computed"], "b": ["joined"]}
    assert answers(house.want("c", one)) == {"c": ["reused"]}


def test_a_repeated_request_changes_nothing() -> None:
    house, one = House(), stage("one")
    house.want("a", one)
    assert house.want("a", one) == []
    assert answers(house.publish(one)) == {"a": ["computed"]}


def test_a_stage_waits_for_its_inputs_and_for_shorter_trainings_on_their_way() -> None:
    house = House(4)
    images = stage("images")
    short = stage("teacher", images, number=5)
    long = stage("teacher", images, number=9, starts=(short,))
    assert given(house.want("a", images, long)) == [images.key]
    house.want("b", images, short)
    assert given(house.publish(images)) == [short.key]
    assert given(house.publish(short)) == [long.key]


def test_a_start_that_nobody_wants_is_not_waited_for() -> None:
    house, short = House(), stage("teacher", number=5)
    long = stage("teacher", number=9, starts=(short,))
    assert given(house.want("a", long)) == [long.key]


def test_priority_goes_first_then_the_stage_with_more_waiters_then_the_older() -> None:
    house = House(0)
    stages = [stage("one", number=number) for number in range(4)]
    for number, each in enumerate(stages):
        house.want(f"first {number}", each)
    house.want("second", stages[2])
    house.want("urgent", stages[3], priority=1)
    for number in range(4):
        house.arrive(f"worker-{number + 1}")
    assert given(house.turn()) == [stages[number].key for number in (3, 2, 0, 1)]


def test_a_failure_ends_all_requests_that_need_it_once_and_the_next_one_computes_again() -> None:
    house, broken, other = House(), stage("broken"), stage("other")
    reader = stage("reader", broken)
    house.want("a", broken, reader)
    house.want("b", broken)
    house.want("c", other, broken)
    said = answers(house.fail(broken))
    assert said == dict.fromkeys("abc", "ValueError: no")
    assert reader.key not in house.core.requests.pending
    assert answers(house.publish(other)) == {}
    assert given(house.want("d", broken)) == [broken.key]


def test_a_reader_in_another_request_fails_with_the_input_that_it_needs() -> None:
    house, broken = House(), stage("broken")
    reader = stage("reader", broken)
    house.want("a", broken)
    house.want("b", reader)
    assert answers(house.fail(broken))["b"] == f"it reads {broken.key}, which failed: ValueError: no"


def test_a_missing_input_is_computed_first_if_its_stage_is_known() -> None:
    house, images = House(1), stage("images")
    reader = stage("reader", images)
    house.want("a", images)
    house.publish(images)
    house.want("b", reader)
    house.store.remove(images.key)
    assert given(house.fail(reader, missing=images.key)) == [images.key]
    assert given(house.publish(images)) == [reader.key]
    assert answers(house.publish(reader)) == {"b": ["computed"]}


def test_an_input_that_is_always_missing_fails_its_reader() -> None:
    house, images = House(1), stage("images")
    reader = stage("reader", images)
    house.want("a", images, reader)
    house.publish(images)
    for _ in range(2):
        house.store.remove(images.key)
        house.fail(reader, missing=images.key)
        house.publish(images)
    house.store.remove(images.key)
    assert answers(house.fail(reader, missing=images.key)) == {"a": "ValueError: no"}


def test_a_dead_worker_is_fenced_and_its_stage_given_to_another_one() -> None:
    house, one = House(2), stage("one")
    (give,) = house.want("a", one)
    house.core.worker_lost(give.worker, "worker died", "killed", house.now)
    actions = house.turn()
    assert FenceAttempt(one.key, give.attempt) in actions
    assert given(actions) == [one.key]
    again = next(action for action in actions if isinstance(action, AssignStage))
    assert again.worker != give.worker
    assert again.attempt != give.attempt


def test_a_stage_fails_when_its_third_worker_died() -> None:
    house, one = House(3), stage("one")
    house.want("a", one)
    for _ in range(3):
        house.core.worker_lost(house.core.running[one.key].worker, "worker died", "killed by signal 9", house.now)
        said = answers(house.turn())
    assert said == {"a": "WorkerDied: its worker died 3 times, the last time: killed by signal 9"}


def test_workers_that_never_come_fail_what_waits_instead_of_hiring_for_ever() -> None:
    house, one = House(0), stage("one")
    actions = house.want("a", one)
    for _ in range(3):
        (hire,) = [action for action in actions if isinstance(action, StartWorker)]
        house.core.worker_lost(hire.worker.name, "worker died", "ModuleNotFoundError: no torch", house.now)
        actions = house.turn()
    assert answers(actions) == {"a": "WorkerDied: workers die before their first heartbeat: ModuleNotFoundError: no torch"}


def test_a_silent_worker_is_killed_after_its_time_and_its_late_beat_is_refused() -> None:
    house, one = House(1), stage("one")
    (give,) = house.want("a", one)
    frozen = house.registry.workers[give.worker]
    house.now += 14
    house.core.check_heartbeats(house.now)
    assert house.turn() == []
    house.now += 2
    house.core.check_heartbeats(house.now)
    actions = house.turn()
    assert KillWorker(frozen) in actions
    assert FenceAttempt(one.key, give.attempt) in actions
    revived = house.registry.register("worker-1", WorkerShape(), "node")
    assert not house.core.heartbeat(revived, one.key, one, give.attempt, {}, house.now)


def test_a_worker_that_froze_before_it_heard_of_a_stage_says_nothing_about_it() -> None:
    house, one = House(1), stage("one")
    house.want("a", one)
    for number in range(2, 6):
        house.now += 16
        house.core.check_heartbeats(house.now)
        house.arrive(f"worker-{number}")
        assert given(house.turn()) == [one.key]
    assert answers(house.publish(one)) == {"a": ["computed"]}


def test_silence_while_the_broker_slept_proves_nothing() -> None:
    house, one = House(1), stage("one")
    house.want("a", one)
    house.now += 100
    house.core.excuse_silence(100)
    house.core.check_heartbeats(house.now)
    assert house.turn() == []


def test_a_late_report_of_a_fenced_attempt_does_not_count() -> None:
    house, one = House(2), stage("one")
    (give,) = house.want("a", one)
    house.core.worker_lost(give.worker, "fenced", "silent", house.now)
    house.turn()
    assert not house.core.attempt_failed(one.key, give.attempt, "failed", "FileNotFoundError: fenced", "", house.now)
    assert answers(house.publish(one)) == {"a": ["computed"]}


def test_after_a_restart_nothing_starts_until_known_workers_were_heard_of_and_their_runs_are_adopted() -> None:
    house, one, two = House(0), stage("one"), stage("two")
    house.core.startup.restart(["worker-1", "worker-2"], house.now)
    house.want("a", one, two)
    worker = house.registry.register("worker-1", WorkerShape(), "node")
    house.core.heartbeat(worker, one.key, one, "old", {"epoch": 3.0}, house.now)
    assert house.turn() == []
    house.arrive("worker-2")
    assert given(house.turn()) == [two.key]
    assert house.core.running[one.key].attempt == "old"
    assert house.core.running[one.key].progress == {"epoch": 3.0}
    house.publish(two)
    assert answers(house.publish(one)) == {"a": ["computed", "computed"]}


def test_after_a_restart_a_worker_that_stays_away_is_waited_for_only_so_long() -> None:
    house, one = House(1), stage("one")
    house.core.startup.restart(["worker-7"], house.now)
    assert house.want("a", one) == []
    house.turn(16)
    house.arrive("worker-1")
    assert given(house.turn()) == [one.key]


def test_a_stage_that_ended_while_the_broker_was_down_is_told_once() -> None:
    house, one = House(1), stage("one")
    house.store.add(one.key)
    for _ in range(2):
        house.core.attempt_succeeded(one.key, "old", True, 3.0, house.now)
    assert house.core.outbox == [SchedulerEvent("published", one.key, "one", "", 3.0)]
    assert house.core.computed == {"one": 1}


def test_a_beat_that_comes_after_the_report_revives_nothing() -> None:
    house, one = House(1), stage("one")
    (give,) = house.want("a", one)
    house.publish(one)
    assert house.core.heartbeat(house.registry.workers[give.worker], one.key, one, give.attempt, {}, house.now)
    assert not house.core.running


def test_release_ends_one_wait_and_what_only_it_wanted() -> None:
    house, one, two = House(1), stage("one"), stage("two")
    house.want("a", one, two)
    house.want("b", one)
    house.core.requests.cancel("another driver", "a")
    assert not house.turn()
    house.core.requests.cancel("driver", "a")
    assert answers(house.turn()) == {"a": "the wait was cancelled"}
    assert two.key not in house.core.requests.pending
    assert answers(house.publish(one)) == {"b": ["computed"]}


def test_idle_workers_are_lent_and_called_back_for_a_stage_of_their_own() -> None:
    house, split, one = House(3), stage("split"), stage("one")
    (give,) = [action for action in house.want("a", split) if isinstance(action, AssignStage)]
    assert len(house.core.helpers(give.attempt)) == 2
    assert given(house.want("b", one)) == [one.key]
    assert len(house.core.helpers(give.attempt)) == 1
    house.publish(split)
    assert house.core.helpers(give.attempt) == []


def test_a_worker_that_becomes_idle_is_lent_to_a_running_stage() -> None:
    house, split, one = House(2), stage("split"), stage("one")
    house.want("b", one)
    (give,) = [action for action in house.want("a", split) if isinstance(action, AssignStage)]
    assert house.core.helpers(give.attempt) == []
    house.publish(one)
    assert len(house.core.helpers(give.attempt)) == 1


def test_memory_admits_one_large_stage_at_a_time() -> None:
    house, one, two = House(2), stage("large", number=1), stage("large", number=2)
    assert given(house.want("a", one, two)) == [one.key]
    assert given(house.publish(one)) == [two.key]


def test_gpu_shares_are_hired_on_demand_and_given_up_for_another_shape() -> None:
    house, student, half = House(0), stage("student"), stage("half")
    (hire,) = house.want("a", student)
    assert hire.worker.shape == WorkerShape(0.0, 1.0)
    house.arrive(hire.worker.name)
    assert given(house.turn()) == [student.key]
    assert house.want("b", half) == []
    house.publish(student)
    assert RetireWorker(hire.worker.name) in house.core.outbox or house.registry.workers[hire.worker.name].retiring
    house.core.worker_lost(hire.worker.name, "worker died", "told to go", house.now)
    (second,) = house.turn()
    assert second.worker.shape == WorkerShape(0.0, 0.5)


def test_a_stage_that_fits_no_node_fails_at_once() -> None:
    house = House()
    said = answers(house.want("a", stage("impossible")))
    assert said == {"a": "it needs 8 GPU, more than any node of the cluster has"}


def test_a_prefetch_waits_for_nobody_and_counts_for_who_comes_first() -> None:
    house, one = House(1), stage("one")
    assert given(house.want("p", one, waiter="", priority=-1)) == [one.key]
    house.publish(one)
    assert answers(house.want("a", one)) == {"a": ["computed"]}
    assert answers(house.want("b", one)) == {"b": ["reused"]}
