"""How long the core believes in a stage whose workers die, and in a worker that does not come."""

from __future__ import annotations

import pytest
from test_ledger import House, answers, given, stage

from ktray.scheduler.liveness import START_TIMEOUT
from ktray.scheduler.messages import AssignStage, FenceOrphans, KillWorker, SchedulerEvent, StartWorker
from ktray.scheduler.placement import Placement
from ktray.scheduler.workers import Node, WorkerShape


def test_a_stage_that_gets_further_each_time_outlives_any_number_of_workers() -> None:
    house, one = House(8), stage("one")
    house.want("a", one)
    for epoch in (2, 5, 6, 9, 12):
        run = house.core.running[one.key]
        house.core.heartbeat(
            house.registry.workers[run.worker], one.key, one, run.attempt, {"epoch": epoch, "of": 20}, house.now
        )
        house.core.worker_lost(run.worker, "worker died", "killed by signal 9", house.now)
        assert given(house.turn()) == [one.key]
    for _ in range(2):  # now it kills its worker at the same epoch again and again
        run = house.core.running[one.key]
        house.core.heartbeat(house.registry.workers[run.worker], one.key, one, run.attempt, {"epoch": 12, "of": 20}, house.now)
        house.core.worker_lost(run.worker, "worker died", "killed by signal 9", house.now)
        said = answers(house.turn())
    assert said == {"a": "WorkerDied: its worker died 3 times, the last time: killed by signal 9"}


def test_another_worker_is_hired_for_one_that_does_not_come_and_a_full_cluster_fails_nothing() -> None:
    house, one = House(0), stage("one")
    (first,) = house.want("a", one)
    assert isinstance(first, StartWorker)
    for _ in range(5):
        house.core.check_heartbeats(house.now)
        house.turn(START_TIMEOUT - 1)
        house.core.check_heartbeats(house.now)
        assert house.turn() == []
        house.now += 2
        house.core.check_heartbeats(house.now)
        actions = house.turn()
        assert [type(action) for action in actions] == [KillWorker, StartWorker]
        assert answers(actions) == {}
    house.arrive(next(action for action in actions if isinstance(action, StartWorker)).worker.name)
    assert given(house.turn()) == [one.key]


@pytest.mark.parametrize("noticed", [True, False])
def test_a_node_that_dies_while_many_workers_start_on_it_fails_nothing(noticed: bool) -> None:
    house = House(2, Node(2.0, 0.0, 100.0))
    stages = [stage("one", number=number) for number in range(8)]
    house.want("a", *stages[:2])
    nodes = house.registry.nodes
    house.registry.update_nodes({**nodes, "spot": Node(4.0, 0.0, 100.0)}, house.now)
    starting = [action.worker.name for action in house.want("b", *stages[2:]) if isinstance(action, StartWorker)]
    assert len(starting) == 4
    if noticed:
        house.registry.update_nodes(nodes, house.now)
    for name in starting:
        house.core.worker_lost(name, "worker died", "its node died", house.now)
    assert answers(house.turn()) == {}
    house.registry.update_nodes(nodes, house.now)
    for each in stages[:-1]:
        house.publish(each)
    assert answers(house.publish(stages[-1])) == {"b": ["computed"] * 6}


def test_workers_that_never_come_fail_what_waits_after_the_third_generation() -> None:
    house = House(0, Node(4.0, 0.0, 100.0))
    actions = house.want("a", *(stage("one", number=number) for number in range(6)))
    for _ in range(3):
        assert answers(actions) == {}
        for worker in [action.worker for action in actions if isinstance(action, StartWorker)]:
            house.core.worker_lost(worker.name, "worker died", "no torch", house.now)
        actions = house.turn()
    assert answers(actions) == {"a": "WorkerDied: workers die before their first heartbeat: no torch"}


def test_a_replacement_is_hired_on_a_node_that_is_heard_of_while_there_is_one() -> None:
    house, one = House(0), stage("one")
    house.registry.nodes = {"node": Node(4.0), "other": Node(2.0)}
    (first,) = house.want("a", one)
    assert first.worker.node == "node"  # the one with most room
    house.arrive(first.worker.name)
    house.turn()
    house.now += 16
    house.core.check_heartbeats(house.now)
    (second,) = [action for action in house.turn() if isinstance(action, StartWorker)]
    assert second.worker.node == "other"
    house.arrive("worker-9")  # a worker of the silent node speaks
    third = Placement(house.registry, house.now).place_worker(WorkerShape())
    assert third is not None
    assert third.node == "node"


def test_the_pace_of_a_stage_is_counted_in_moves_of_its_progress() -> None:
    house, one = House(1), stage("one")
    (give,) = house.want("a", one)
    for epoch in (1, 1, 2, 2, 2):
        house.now += 3
        house.core.heartbeat(house.registry.workers[give.worker], one.key, one, give.attempt, {"epoch": epoch}, house.now)
    run = house.core.running[one.key]
    assert (run.progress_changes, run.last_progress - run.since) == (2, 9)


def test_after_a_restart_what_a_silent_worker_wrote_is_fenced_before_its_stage_starts_again() -> None:
    house, one = House(0), stage("one")
    house.core.startup.restart(["worker-1", "worker-7"], house.now)
    house.arrive("worker-1")
    house.want("a", one)
    house.now += 14
    house.arrive("worker-1")
    assert house.turn() == []
    house.now += 2
    house.core.dispatch(house.now)
    told, house.core.outbox[:] = house.core.outbox[:], []
    assert [type(action) for action in told] == [FenceOrphans, AssignStage, SchedulerEvent]
    silent = house.registry.register("worker-7", WorkerShape(), "node")
    assert not house.core.heartbeat(silent, "two-1", stage("two"), "old", {}, house.now), "its directory is no more"
    assert list(house.core.running) == [one.key]


def test_after_a_restart_workers_that_were_only_starting_have_as_long_to_come_as_any_other() -> None:
    house, one, two = House(0), stage("one"), stage("two")
    house.core.startup.restart(["worker-1", "worker-2", "worker-7"], house.now)
    house.want("a", one)
    for seconds, name in ((16, "worker-1"), (START_TIMEOUT - 17, "worker-2")):
        house.now += seconds
        for worker in house.registry.workers.values():
            house.core.heartbeat(worker, "", None, "", {}, house.now)
        house.core.check_heartbeats(house.now)
        house.arrive(name)
        assert not [action for action in house.turn() if isinstance(action, KillWorker)]
    assert house.core.running[one.key].worker == "worker-1"
    assert given(house.want("b", two)) == [two.key]
    assert house.core.running[two.key].worker == "worker-2"
    house.core.outbox.clear()
    for _ in range(2):
        house.now += 2
        for name in ("worker-1", "worker-2"):
            house.core.heartbeat(house.registry.workers[name], "", None, "", {}, house.now)
        house.core.check_heartbeats(house.now)
    kill, event = house.core.outbox
    assert kill.worker.name == event.worker == "worker-7", "it is told once"
    assert (event.event, event.cause) == ("fenced", "no heartbeat for 120 s after a restart")
