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
from ktray.scheduler.worker_registry import Node, WorkerRegistry, WorkerShape

REQUESTS = {"split": ResourceRequest(helpers=2), "student": ResourceRequest(gpus=1.0), "half": ResourceRequest(gpus=0.5)}
REQUESTS |= {"large": ResourceRequest(memory_bytes=60), "impossible": ResourceRequest(gpus=8.0)}


class CoreHarness:
    """A core with a store that is a set of keys, and a clock."""

    def __init__(self, workers: int = 2, node: Node | None = None) -> None:
        self.store: set[str] = set()
        self.now = 100.0
        numbers: Iterator[int] = iter(range(1000))
        self.registry = WorkerRegistry({"node": node or Node(4.0, 1.0, 100.0)})
        self.core = SchedulerCore(
            self.find,
            lambda name: REQUESTS.get(name, ResourceRequest()),
            self.registry,
            lambda: f"attempt-{next(numbers)}",
            15.0,
        )
        for number in range(workers):
            self.poll(f"worker-{number + 1}")

    def find(self, key: str) -> Artifact | None:
        return Artifact(key, Path(key), {"m": 1.0}, {"seconds": 2.0}) if key in self.store else None

    def poll(self, name: str, shape: WorkerShape | None = None) -> None:
        worker = self.registry.workers.get(name) or self.registry.register(name, shape or WorkerShape(), "node")
        self.core.handle_heartbeat(worker, "", None, "", {}, self.now)
        worker.polling = True

    def request(self, name: str, *stages: Stage, priority: int = 0, waiter: str | None = None) -> list[Any]:
        self.core.requests.add_request(name, name if waiter is None else waiter, "driver", stages, priority, self.now)
        return self.dispatch()

    def dispatch(self, seconds: float = 0.0) -> list[Any]:
        self.now += seconds
        self.core.dispatch(self.now)
        outbox = self.core.outbox[:]
        self.core.outbox.clear()
        return [action for action in outbox if not isinstance(action, SchedulerEvent)]

    def publish(self, stage: Stage) -> list[Any]:
        run = self.core.running[stage.key]
        self.store.add(stage.key)
        self.core.handle_succeeded_attempt(stage.key, run.attempt, True, 1.0, self.now)
        if run.worker in self.registry.workers:
            self.registry.workers[run.worker].polling = True
        return self.dispatch()

    def fail(self, stage: Stage, missing: str = "") -> list[Any]:
        run = self.core.running[stage.key]
        self.core.handle_failed_attempt(stage.key, run.attempt, "failed", "ValueError: no", missing, self.now)
        self.registry.workers[run.worker].polling = True
        return self.dispatch()


def stage(name: str, *inputs: Stage, number: int = 0, resume_from: tuple[Stage, ...] = ()) -> Stage:
    roles = {f"role{index}": each.key for index, each in enumerate(inputs)}
    return Stage(name, {"number": number}, {}, roles, tuple(each.key for each in resume_from))


def assigned(actions: list[Any]) -> list[str]:
    return [action.stage.key for action in actions if isinstance(action, AssignStage)]


def results(actions: list[Any]) -> dict[str, Any]:
    answers = [action for action in actions if isinstance(action, RequestResult)]
    return {answer.request_id: answer.cause or [outcome["state"] for outcome in answer.outcomes] for answer in answers}


def test_equal_stages_run_once_and_answer_all() -> None:
    harness, one = CoreHarness(), stage("one")
    assert assigned(harness.request("a", one)) == [one.key]
    assert assigned(harness.request("b", one)) == []
    assert results(harness.publish(one)) == {"a": ["computed"], "b": ["joined"]}
    assert results(harness.request("c", one)) == {"c": ["reused"]}


def test_a_repeated_request_changes_nothing() -> None:
    harness, one = CoreHarness(), stage("one")
    harness.request("a", one)
    assert harness.request("a", one) == []
    assert results(harness.publish(one)) == {"a": ["computed"]}


def test_a_stage_waits_for_its_inputs_and_for_shorter_trainings_on_their_way() -> None:
    harness = CoreHarness(4)
    images = stage("images")
    short = stage("teacher", images, number=5)
    long = stage("teacher", images, number=9, resume_from=(short,))
    assert assigned(harness.request("a", images, long)) == [images.key]
    harness.request("b", images, short)
    assert assigned(harness.publish(images)) == [short.key]
    assert assigned(harness.publish(short)) == [long.key]


def test_a_start_that_nobody_wants_is_not_waited_for() -> None:
    harness, short = CoreHarness(), stage("teacher", number=5)
    long = stage("teacher", number=9, resume_from=(short,))
    assert assigned(harness.request("a", long)) == [long.key]


def test_priority_goes_first_then_the_stage_with_more_waiters_then_the_older() -> None:
    harness = CoreHarness(0)
    stages = [stage("one", number=number) for number in range(4)]
    for number, each in enumerate(stages):
        harness.request(f"first {number}", each)
    harness.request("second", stages[2])
    harness.request("urgent", stages[3], priority=1)
    for number in range(4):
        harness.poll(f"worker-{number + 1}")
    assert assigned(harness.dispatch()) == [stages[number].key for number in (3, 2, 0, 1)]


def test_a_failure_ends_all_requests_that_need_it_once_and_the_next_one_computes_again() -> None:
    harness, broken, other = CoreHarness(), stage("broken"), stage("other")
    reader = stage("reader", broken)
    harness.request("a", broken, reader)
    harness.request("b", broken)
    harness.request("c", other, broken)
    answers = results(harness.fail(broken))
    assert answers == dict.fromkeys("abc", "ValueError: no")
    assert reader.key not in harness.core.requests.pending
    assert results(harness.publish(other)) == {}
    assert assigned(harness.request("d", broken)) == [broken.key]


def test_a_reader_in_another_request_fails_with_the_input_that_it_needs() -> None:
    harness, broken = CoreHarness(), stage("broken")
    reader = stage("reader", broken)
    harness.request("a", broken)
    harness.request("b", reader)
    assert results(harness.fail(broken))["b"] == f"it reads {broken.key}, which failed: ValueError: no"


def test_a_missing_input_is_computed_first_if_its_stage_is_known() -> None:
    harness, images = CoreHarness(1), stage("images")
    reader = stage("reader", images)
    harness.request("a", images)
    harness.publish(images)
    harness.request("b", reader)
    harness.store.remove(images.key)
    assert assigned(harness.fail(reader, missing=images.key)) == [images.key]
    assert assigned(harness.publish(images)) == [reader.key]
    assert results(harness.publish(reader)) == {"b": ["computed"]}


def test_an_input_that_is_always_missing_fails_its_reader() -> None:
    harness, images = CoreHarness(1), stage("images")
    reader = stage("reader", images)
    harness.request("a", images, reader)
    harness.publish(images)
    for _ in range(2):
        harness.store.remove(images.key)
        harness.fail(reader, missing=images.key)
        harness.publish(images)
    harness.store.remove(images.key)
    assert results(harness.fail(reader, missing=images.key)) == {"a": "ValueError: no"}


def test_a_dead_worker_is_fenced_and_its_stage_given_to_another_one() -> None:
    harness, one = CoreHarness(2), stage("one")
    (assignment,) = harness.request("a", one)
    harness.core.handle_lost_worker(assignment.worker, "worker died", "killed", harness.now)
    actions = harness.dispatch()
    assert FenceAttempt(one.key, assignment.attempt) in actions
    assert assigned(actions) == [one.key]
    again = next(action for action in actions if isinstance(action, AssignStage))
    assert again.worker != assignment.worker
    assert again.attempt != assignment.attempt


def test_a_stage_fails_when_its_third_worker_died() -> None:
    harness, one = CoreHarness(3), stage("one")
    harness.request("a", one)
    for _ in range(3):
        harness.core.handle_lost_worker(harness.core.running[one.key].worker, "worker died", "killed by signal 9", harness.now)
        answers = results(harness.dispatch())
    assert answers == {"a": "WorkerDied: its worker died 3 times, the last time: killed by signal 9"}


def test_workers_that_never_start_fail_what_waits_instead_of_being_replaced_for_ever() -> None:
    harness, one = CoreHarness(0), stage("one")
    actions = harness.request("a", one)
    for _ in range(3):
        (start,) = [action for action in actions if isinstance(action, StartWorker)]
        harness.core.handle_lost_worker(start.worker.name, "worker died", "ModuleNotFoundError: no torch", harness.now)
        actions = harness.dispatch()
    assert results(actions) == {"a": "WorkerDied: workers die before their first heartbeat: ModuleNotFoundError: no torch"}


def test_a_silent_worker_is_killed_after_its_timeout_and_its_late_heartbeat_is_refused() -> None:
    harness, one = CoreHarness(1), stage("one")
    (assignment,) = harness.request("a", one)
    frozen = harness.registry.workers[assignment.worker]
    harness.now += 14
    harness.core.check_heartbeats(harness.now)
    assert harness.dispatch() == []
    harness.now += 2
    harness.core.check_heartbeats(harness.now)
    actions = harness.dispatch()
    assert KillWorker(frozen) in actions
    assert FenceAttempt(one.key, assignment.attempt) in actions
    revived = harness.registry.register("worker-1", WorkerShape(), "node")
    assert not harness.core.handle_heartbeat(revived, one.key, one, assignment.attempt, {}, harness.now)


def test_a_worker_that_froze_before_it_heard_of_a_stage_says_nothing_about_it() -> None:
    harness, one = CoreHarness(1), stage("one")
    harness.request("a", one)
    for number in range(2, 6):
        harness.now += 16
        harness.core.check_heartbeats(harness.now)
        harness.poll(f"worker-{number}")
        assert assigned(harness.dispatch()) == [one.key]
    assert results(harness.publish(one)) == {"a": ["computed"]}


def test_silence_while_the_broker_slept_proves_nothing() -> None:
    harness, one = CoreHarness(1), stage("one")
    harness.request("a", one)
    harness.now += 100
    harness.core.compensate_pause(100)
    harness.core.check_heartbeats(harness.now)
    assert harness.dispatch() == []
    (run,) = harness.core.running.values()
    assert harness.now - run.last_progress < 1, "nor does it count as time without progress"


def test_a_late_report_of_a_fenced_attempt_does_not_count() -> None:
    harness, one = CoreHarness(2), stage("one")
    (assignment,) = harness.request("a", one)
    harness.core.handle_lost_worker(assignment.worker, "fenced", "silent", harness.now)
    harness.dispatch()
    assert not harness.core.handle_failed_attempt(
        one.key, assignment.attempt, "failed", "FileNotFoundError: fenced", "", harness.now
    )
    assert results(harness.publish(one)) == {"a": ["computed"]}


def test_after_a_restart_nothing_starts_until_known_workers_were_heard_from_and_their_attempts_are_adopted() -> None:
    harness, one, two = CoreHarness(0), stage("one"), stage("two")
    harness.core.first_heartbeats.note_broker_restart(["worker-1", "worker-2"], harness.now)
    harness.request("a", one, two)
    worker = harness.registry.register("worker-1", WorkerShape(), "node")
    harness.core.handle_heartbeat(worker, one.key, one, "old", {"epoch": 3.0}, harness.now)
    assert harness.dispatch() == []
    harness.poll("worker-2")
    assert assigned(harness.dispatch()) == [two.key]
    assert harness.core.running[one.key].attempt == "old"
    assert harness.core.running[one.key].progress == {"epoch": 3.0}
    harness.publish(two)
    assert results(harness.publish(one)) == {"a": ["computed", "computed"]}


def test_after_a_restart_a_silent_worker_is_waited_for_only_so_long() -> None:
    harness, one = CoreHarness(1), stage("one")
    harness.core.first_heartbeats.note_broker_restart(["worker-7"], harness.now)
    assert harness.request("a", one) == []
    harness.dispatch(16)
    harness.poll("worker-1")
    assert assigned(harness.dispatch()) == [one.key]


def test_a_stage_that_ended_while_the_broker_was_down_is_counted_once() -> None:
    harness, one = CoreHarness(1), stage("one")
    harness.store.add(one.key)
    for _ in range(2):
        harness.core.handle_succeeded_attempt(one.key, "old", True, 3.0, harness.now)
    assert harness.core.outbox == [SchedulerEvent("published", one.key, "one", "", 3.0)]
    assert harness.core.computed == {"one": 1}


def test_a_heartbeat_that_comes_after_the_report_adopts_nothing() -> None:
    harness, one = CoreHarness(1), stage("one")
    (assignment,) = harness.request("a", one)
    harness.publish(one)
    assert harness.core.handle_heartbeat(
        harness.registry.workers[assignment.worker], one.key, one, assignment.attempt, {}, harness.now
    )
    assert not harness.core.running


def test_cancelling_ends_one_wait_and_drops_what_only_it_requested() -> None:
    harness, one, two = CoreHarness(1), stage("one"), stage("two")
    harness.request("a", one, two)
    harness.request("b", one)
    harness.core.requests.cancel_requests("another driver", "a")
    assert not harness.dispatch()
    harness.core.requests.cancel_requests("driver", "a")
    assert results(harness.dispatch()) == {"a": "the wait was cancelled"}
    assert two.key not in harness.core.requests.pending
    assert results(harness.publish(one)) == {"b": ["computed"]}


def test_idle_workers_are_lent_and_called_back_for_a_stage_of_their_own() -> None:
    harness, split, one = CoreHarness(3), stage("split"), stage("one")
    (assignment,) = [action for action in harness.request("a", split) if isinstance(action, AssignStage)]
    assert len(harness.core.lent_workers(assignment.attempt)) == 2
    assert assigned(harness.request("b", one)) == [one.key]
    assert len(harness.core.lent_workers(assignment.attempt)) == 1
    harness.publish(split)
    assert harness.core.lent_workers(assignment.attempt) == []


def test_a_worker_that_becomes_idle_is_lent_to_a_running_stage() -> None:
    harness, split, one = CoreHarness(2), stage("split"), stage("one")
    harness.request("b", one)
    (assignment,) = [action for action in harness.request("a", split) if isinstance(action, AssignStage)]
    assert harness.core.lent_workers(assignment.attempt) == []
    harness.publish(one)
    assert len(harness.core.lent_workers(assignment.attempt)) == 1


def test_memory_admits_one_large_stage_at_a_time() -> None:
    harness, one, two = CoreHarness(2), stage("large", number=1), stage("large", number=2)
    assert assigned(harness.request("a", one, two)) == [one.key]
    assert assigned(harness.publish(one)) == [two.key]


def test_workers_with_gpu_shares_start_on_demand_and_are_evicted_for_another_shape() -> None:
    harness, student, half = CoreHarness(0), stage("student"), stage("half")
    (start,) = harness.request("a", student)
    assert start.worker.shape == WorkerShape(0.0, 1.0)
    harness.poll(start.worker.name)
    assert assigned(harness.dispatch()) == [student.key]
    assert harness.request("b", half) == []
    harness.publish(student)
    assert RetireWorker(start.worker.name) in harness.core.outbox or harness.registry.workers[start.worker.name].retiring
    harness.core.handle_lost_worker(start.worker.name, "worker died", "told to go", harness.now)
    (second,) = harness.dispatch()
    assert second.worker.shape == WorkerShape(0.0, 0.5)


def test_a_stage_that_fits_no_node_fails_at_once() -> None:
    harness = CoreHarness()
    answers = results(harness.request("a", stage("impossible")))
    assert answers == {"a": "it needs 8 GPU, more than any node of the cluster has"}


def test_a_prefetched_stage_counts_as_computed_by_the_first_that_requests_it() -> None:
    harness, one = CoreHarness(1), stage("one")
    assert assigned(harness.request("p", one, waiter="", priority=-1)) == [one.key]
    harness.publish(one)
    assert results(harness.request("a", one)) == {"a": ["computed"]}
    assert results(harness.request("b", one)) == {"b": ["reused"]}
