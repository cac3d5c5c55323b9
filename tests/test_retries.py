"""How often a stage is retried whose workers die, and how long a worker is waited for that does not start."""

from __future__ import annotations

import pytest
from test_scheduler_core import CoreHarness, assigned, results, stage

from ktray.scheduler.fault_tolerance import START_TIMEOUT
from ktray.scheduler.messages import AssignStage, FenceOrphanedAttempts, KillWorker, SchedulerEvent, StartWorker
from ktray.scheduler.placement import DispatchCapacity
from ktray.scheduler.worker_registry import Node, WorkerShape


def test_a_stage_that_gets_further_each_time_survives_any_number_of_worker_deaths() -> None:
    harness, one = CoreHarness(8), stage("one")
    harness.request("a", one)
    for epoch in (2, 5, 6, 9, 12):
        run = harness.core.running[one.key]
        harness.core.handle_heartbeat(
            harness.registry.workers[run.worker], one.key, one, run.attempt, {"epoch": epoch, "of": 20}, harness.now
        )
        harness.core.handle_lost_worker(run.worker, "worker died", "killed by signal 9", harness.now)
        assert assigned(harness.dispatch()) == [one.key]
    for _ in range(2):  # now it kills its worker at the same epoch again and again
        run = harness.core.running[one.key]
        harness.core.handle_heartbeat(
            harness.registry.workers[run.worker], one.key, one, run.attempt, {"epoch": 12, "of": 20}, harness.now
        )
        harness.core.handle_lost_worker(run.worker, "worker died", "killed by signal 9", harness.now)
        answers = results(harness.dispatch())
    assert answers == {"a": "WorkerDied: its worker died 3 times, the last time: killed by signal 9"}


def test_a_worker_that_does_not_start_in_time_is_replaced_and_a_full_cluster_fails_nothing() -> None:
    harness, one = CoreHarness(0), stage("one")
    (first,) = harness.request("a", one)
    assert isinstance(first, StartWorker)
    for _ in range(5):
        harness.core.check_heartbeats(harness.now)
        harness.dispatch(START_TIMEOUT - 1)
        harness.core.check_heartbeats(harness.now)
        assert harness.dispatch() == []
        harness.now += 2
        harness.core.check_heartbeats(harness.now)
        actions = harness.dispatch()
        assert [type(action) for action in actions] == [KillWorker, StartWorker]
        assert results(actions) == {}
    harness.poll(next(action for action in actions if isinstance(action, StartWorker)).worker.name)
    assert assigned(harness.dispatch()) == [one.key]


@pytest.mark.parametrize("noticed", [True, False])
def test_a_node_that_dies_while_many_workers_start_on_it_fails_nothing(noticed: bool) -> None:
    harness = CoreHarness(2, Node(2.0, 0.0, 100.0))
    stages = [stage("one", number=number) for number in range(8)]
    harness.request("a", *stages[:2])
    nodes = harness.registry.nodes
    harness.registry.set_alive_nodes({**nodes, "spot": Node(4.0, 0.0, 100.0)}, harness.now)
    starting = [action.worker.name for action in harness.request("b", *stages[2:]) if isinstance(action, StartWorker)]
    assert len(starting) == 4
    if noticed:
        harness.registry.set_alive_nodes(nodes, harness.now)
    for name in starting:
        harness.core.handle_lost_worker(name, "worker died", "its node died", harness.now)
    assert results(harness.dispatch()) == {}
    harness.registry.set_alive_nodes(nodes, harness.now)
    for each in stages[:-1]:
        harness.publish(each)
    assert results(harness.publish(stages[-1])) == {"b": ["computed"] * 6}


def test_workers_that_never_start_fail_what_waits_after_the_third_round() -> None:
    harness = CoreHarness(0, Node(4.0, 0.0, 100.0))
    actions = harness.request("a", *(stage("one", number=number) for number in range(6)))
    for _ in range(3):
        assert results(actions) == {}
        for worker in [action.worker for action in actions if isinstance(action, StartWorker)]:
            harness.core.handle_lost_worker(worker.name, "worker died", "no torch", harness.now)
        actions = harness.dispatch()
    assert results(actions) == {"a": "WorkerDied: workers die before their first heartbeat: no torch"}


def test_a_replacement_starts_on_a_responsive_node_if_there_is_one() -> None:
    harness, one = CoreHarness(0), stage("one")
    harness.registry.nodes = {"node": Node(4.0), "other": Node(2.0)}
    (first,) = harness.request("a", one)
    assert first.worker.node == "node"  # the one with most room
    harness.poll(first.worker.name)
    harness.dispatch()
    harness.now += 16
    harness.core.check_heartbeats(harness.now)
    (second,) = [action for action in harness.dispatch() if isinstance(action, StartWorker)]
    assert second.worker.node == "other"
    harness.poll("worker-9")  # a worker of the silent node speaks
    third = DispatchCapacity(harness.registry, harness.now).place_worker(WorkerShape())
    assert third is not None
    assert third.node == "node"


def test_the_pace_of_a_stage_is_counted_in_changes_of_its_progress() -> None:
    harness, one = CoreHarness(1), stage("one")
    (assignment,) = harness.request("a", one)
    for epoch in (1, 1, 2, 2, 2):
        harness.now += 3
        harness.core.handle_heartbeat(
            harness.registry.workers[assignment.worker], one.key, one, assignment.attempt, {"epoch": epoch}, harness.now
        )
    run = harness.core.running[one.key]
    assert (run.progress_changes, run.last_progress - run.since) == (2, 9)


def test_after_a_restart_what_a_silent_worker_wrote_is_fenced_before_its_stage_starts_again() -> None:
    harness, one = CoreHarness(0), stage("one")
    harness.core.first_heartbeats.note_broker_restart(["worker-1", "worker-7"], harness.now)
    harness.poll("worker-1")
    harness.request("a", one)
    harness.now += 14
    harness.poll("worker-1")
    assert harness.dispatch() == []
    harness.now += 2
    harness.core.dispatch(harness.now)
    actions, harness.core.outbox[:] = harness.core.outbox[:], []
    assert [type(action) for action in actions] == [FenceOrphanedAttempts, AssignStage, SchedulerEvent]
    silent = harness.registry.register("worker-7", WorkerShape(), "node")
    assert not harness.core.handle_heartbeat(silent, "two-1", stage("two"), "old", {}, harness.now), "its directory is gone"
    assert list(harness.core.running) == [one.key]


def test_a_worker_whose_attempt_a_restart_fenced_must_exit_and_one_that_was_only_starting_need_not() -> None:
    harness, one = CoreHarness(0), stage("one")
    harness.core.first_heartbeats.note_broker_restart(["worker-1", "worker-7"], harness.now)
    harness.now += 16
    harness.dispatch()
    silent = harness.registry.register("worker-7", WorkerShape(), "node")
    assert harness.core.must_exit(silent, one.key, "old"), "it wakes up, and its stage fails before its next heartbeat"
    harness.poll("worker-1")
    (assignment,) = harness.request("a", one)
    assert not harness.core.must_exit(harness.registry.workers["worker-1"], one.key, assignment.attempt)


def test_after_a_restart_workers_that_were_only_starting_have_the_usual_start_timeout() -> None:
    harness, one, two = CoreHarness(0), stage("one"), stage("two")
    harness.core.first_heartbeats.note_broker_restart(["worker-1", "worker-2", "worker-7"], harness.now)
    harness.request("a", one)
    for seconds, name in ((16, "worker-1"), (START_TIMEOUT - 17, "worker-2")):
        harness.now += seconds
        for worker in harness.registry.workers.values():
            harness.core.handle_heartbeat(worker, "", None, "", {}, harness.now)
        harness.core.check_heartbeats(harness.now)
        harness.poll(name)
        assert not [action for action in harness.dispatch() if isinstance(action, KillWorker)]
    assert harness.core.running[one.key].worker == "worker-1"
    assert assigned(harness.request("b", two)) == [two.key]
    assert harness.core.running[two.key].worker == "worker-2"
    harness.core.outbox.clear()
    for _ in range(2):
        harness.now += 2
        for name in ("worker-1", "worker-2"):
            harness.core.handle_heartbeat(harness.registry.workers[name], "", None, "", {}, harness.now)
        harness.core.check_heartbeats(harness.now)
    kill, event = harness.core.outbox
    assert kill.worker.name == event.worker == "worker-7", "reported only once"
    assert (event.event, event.cause) == ("fenced", "no heartbeat for 120 s after a restart")
