"""Whose worker Ray ends for the memory of its node runs next with the node for itself, and as it would have anyway."""

from __future__ import annotations

import pytest
import ray
from test_memory import QUARTER, run_out, with_small_batches
from test_scheduler_core import REQUESTS, CoreHarness, assigned, results, stage

from ktray.scheduler.messages import AssignStage, StartWorker
from ktray.scheduler.ray_cluster import classify_worker_loss
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.worker_registry import Node

ENDED = classify_worker_loss(ray.exceptions.OutOfMemoryError("1 worker"))


def test_a_stage_whose_worker_was_killed_for_node_memory_runs_exclusively_next_with_its_usual_batches() -> None:
    harness, big, other = CoreHarness(3), stage("big"), stage("one")
    harness.request("a", big)
    harness.request("b", other)
    harness.core.handle_lost_worker(harness.core.running[big.key].worker, *ENDED, harness.now)
    assert assigned(harness.dispatch()) == []
    actions = harness.publish(other)
    assert assigned(actions) == [big.key]
    assert with_small_batches(actions) == [], "few images would change what batch norm sees, and others may be to blame"
    assert assigned(harness.request("b", stage("one", number=1))) == [], "nothing begins beside it"
    assert results(harness.publish(big)) == {"a": ["computed"]}


def test_a_gpu_stage_whose_worker_was_killed_for_node_memory_gets_the_whole_node_and_its_own_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(REQUESTS, "student", ResourceRequest(gpus=0.25))
    harness, big, beside, other = CoreHarness(2, Node(4.0, 1.0)), stage("student"), stage("student", number=1), stage("one")
    for name in ("worker-8", "worker-9"):
        harness.poll(name, QUARTER)
        harness.registry.workers[name].gpu_ids = ("0",)
    harness.request("a", big)
    harness.request("b", beside)
    harness.request("c", other)
    harness.core.handle_lost_worker(harness.core.running[big.key].worker, *ENDED, harness.now)
    assert [action for action in harness.dispatch() if isinstance(action, (AssignStage, StartWorker))] == []
    assert assigned(harness.publish(beside)) == [], "a stage on a CPU takes memory of the node, too"
    actions = harness.publish(other)
    assert assigned(actions) == [big.key]
    assert with_small_batches(actions) == []
    assert harness.registry.workers[harness.core.running[big.key].worker].shape == QUARTER
    assert assigned(harness.request("d", stage("one", number=1), stage("student", number=2))) == []
    assert len(assigned(harness.publish(big))) == 2


def test_a_stage_that_must_run_exclusively_reserves_a_gpu_node_with_a_worker_of_its_shape(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(REQUESTS, "student", ResourceRequest(gpus=0.25))
    harness, big, other = CoreHarness(2), stage("student"), stage("one")
    harness.registry.nodes = {"empty": Node(4.0, 1.0), "node": Node(4.0, 1.0)}
    for name in ("worker-8", "worker-9"):
        harness.poll(name, QUARTER)
        harness.registry.workers[name].gpu_ids = ("0",)
    harness.request("a", big)
    harness.request("b", other)
    harness.core.handle_lost_worker(harness.core.running[big.key].worker, *ENDED, harness.now)
    harness.dispatch()
    assert set(harness.registry.reserved) == {"node"}
    assert assigned(harness.publish(other)) == [big.key]


def test_repeated_kills_for_memory_count_like_any_death_and_an_error_still_brings_small_batches() -> None:
    harness, big = CoreHarness(4), stage("big")
    harness.request("a", big)
    for _ in range(2):
        harness.core.handle_lost_worker(harness.core.running[big.key].worker, *ENDED, harness.now)
        assert assigned(harness.dispatch()) == [big.key]
    assert with_small_batches(run_out(harness, big)) == [big.key]
    harness.core.handle_lost_worker(harness.core.running[big.key].worker, *ENDED, harness.now)
    assert results(harness.dispatch())["a"].startswith("WorkerDied: its worker died 3 times")
