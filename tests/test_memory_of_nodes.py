"""Whose worker Ray ends for the memory of its node runs next with the node for itself, and as it would have anyway."""

from __future__ import annotations

import pytest
import ray
from test_ledger import NEEDS, House, answers, given, stage
from test_memory import QUARTER, run_out, with_few

from ktray.scheduler.messages import AssignStage, StartWorker
from ktray.scheduler.ray_cluster import loss_of
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.workers import Node

ENDED = loss_of(ray.exceptions.OutOfMemoryError("1 worker"))


def test_a_stage_whose_worker_is_ended_for_the_memory_of_its_node_runs_alone_next_and_as_it_would_have() -> None:
    house, big, other = House(3), stage("big"), stage("one")
    house.want("a", big)
    house.want("b", other)
    house.core.worker_lost(house.core.running[big.key].worker, *ENDED, house.now)
    assert given(house.turn()) == []
    actions = house.publish(other)
    assert given(actions) == [big.key]
    assert with_few(actions) == [], "few images would change what batch norm sees, and others may be to blame"
    assert given(house.want("b", stage("one", number=1))) == [], "nothing begins beside it"
    assert answers(house.publish(big)) == {"a": ["computed"]}


def test_a_stage_on_a_gpu_whose_worker_is_ended_for_the_memory_of_its_node_has_the_whole_node_and_its_own_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(NEEDS, "student", ResourceRequest(gpus=0.25))
    house, big, beside, other = House(2, Node(4.0, 1.0)), stage("student"), stage("student", number=1), stage("one")
    for name in ("worker-8", "worker-9"):
        house.arrive(name, QUARTER)
        house.registry.workers[name].gpu_ids = ("0",)
    house.want("a", big)
    house.want("b", beside)
    house.want("c", other)
    house.core.worker_lost(house.core.running[big.key].worker, *ENDED, house.now)
    assert [action for action in house.turn() if isinstance(action, (AssignStage, StartWorker))] == []
    assert given(house.publish(beside)) == [], "a stage on a CPU takes memory of the node, too"
    actions = house.publish(other)
    assert given(actions) == [big.key]
    assert with_few(actions) == []
    assert house.registry.workers[house.core.running[big.key].worker].shape == QUARTER
    assert given(house.want("d", stage("one", number=1), stage("student", number=2))) == []
    assert len(given(house.publish(big))) == 2


def test_a_stage_that_waits_for_a_quiet_gpu_node_keeps_one_where_a_worker_of_its_shape_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(NEEDS, "student", ResourceRequest(gpus=0.25))
    house, big, other = House(2), stage("student"), stage("one")
    house.registry.nodes = {"empty": Node(4.0, 1.0), "node": Node(4.0, 1.0)}
    for name in ("worker-8", "worker-9"):
        house.arrive(name, QUARTER)
        house.registry.workers[name].gpu_ids = ("0",)
    house.want("a", big)
    house.want("b", other)
    house.core.worker_lost(house.core.running[big.key].worker, *ENDED, house.now)
    house.turn()
    assert set(house.registry.reserved) == {"node"}
    assert given(house.publish(other)) == [big.key]


def test_a_worker_that_is_ended_so_each_time_counts_like_any_death_and_an_error_still_brings_few_images() -> None:
    house, big = House(4), stage("big")
    house.want("a", big)
    for _ in range(2):
        house.core.worker_lost(house.core.running[big.key].worker, *ENDED, house.now)
        assert given(house.turn()) == [big.key]
    assert with_few(run_out(house, big)) == [big.key]
    house.core.worker_lost(house.core.running[big.key].worker, *ENDED, house.now)
    assert answers(house.turn())["a"].startswith("WorkerDied: its worker died 3 times")
