"""Stages share a GPU by what they need of its memory, card by card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_scheduler_core import REQUESTS, CoreHarness, assigned, stage

from ktray.artifact import Artifact
from ktray.scheduler.messages import StartWorker
from ktray.scheduler.placement import DispatchCapacity, evict_idle, free_gpu_shares, gpus_have_room
from ktray.scheduler.resources import GpuShares, ResourceRequest, smallest_sufficient_share
from ktray.scheduler.worker_registry import Node, WorkerRegistry, WorkerShape

GIB = 1 << 30
QUARTER = WorkerShape(0.0, 0.25)


@pytest.mark.parametrize(
    ("peak", "share"), [(1 * GIB, 0.25), (15 * GIB, 0.25), (20 * GIB, 0.5), (40 * GIB, 1.0), (79 * GIB, 1.0)]
)
def test_the_share_holds_the_recorded_peak_and_what_comes_with_it(peak: int, share: float) -> None:
    assert smallest_sufficient_share(peak, 80 * GIB) == share
    assert peak < share * 80 * GIB


def shares(has_gpus: bool = True) -> GpuShares:
    given = {"teacher": ResourceRequest(gpus=0.25), "student": ResourceRequest(cpus=2.0)}
    return GpuShares(lambda name: given.get(name, ResourceRequest()), lambda: has_gpus)


def peaked(name: str, peak: int, whole: int = 80 * GIB) -> Artifact:
    return Artifact(f"{name}-{peak:012x}", Path(), {}, {"device_peak_bytes": peak, "device_bytes": whole})


def test_a_kind_that_the_runtime_file_leaves_open_grows_with_its_peaks_and_never_shrinks() -> None:
    found = shares()
    assert found("student").gpus == 0.25
    for peak in (30 * GIB, 1 * GIB):
        for name in ("student", "teacher"):
            found.learn_peak_memory(peaked(name, peak))
        assert found("student").gpus == 0.5
        assert found("teacher").gpus == 0.25, "its share stands in the runtime file"
    assert found("pseudo_labels").gpus == 0.0


def test_what_ran_out_of_memory_teaches_a_larger_share_than_it_had_although_its_second_peak_was_small() -> None:
    found = shares()
    tagged = peaked("student", 1 * GIB)
    tagged.record["after_out_of_memory"] = True  # type: ignore[index]
    for _ in range(2):  # the store is asked again and again
        found.learn_peak_memory(tagged)
        assert found("student").gpus == 0.5
    for share, then in ((0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        found.increase_after_out_of_memory("student", share)
        assert found("student").gpus == then
    large = shares()
    large.learn_peak_memory(replace(tagged, record=tagged.record | peaked("student", 20 * GIB).record))  # type: ignore[operator]
    assert large("student").gpus == 0.5, "its peak says so, and no more is needed"


def test_what_ran_out_of_memory_on_a_cpu_teaches_no_share() -> None:
    found = shares()
    found.increase_after_out_of_memory("student", 0.0)
    assert found("student").gpus == 0.25


def test_a_record_from_a_cpu_says_nothing_of_a_gpu_and_without_gpus_nobody_needs_one() -> None:
    found = shares()
    found.learn_peak_memory(peaked("student", 0, 0))
    assert found("student").gpus == 0.25
    assert shares(has_gpus=False)("student") == ResourceRequest(cpus=2.0, gpus=0.0)


def test_four_small_students_run_at_once_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REQUESTS, "student", ResourceRequest(gpus=0.25))
    harness = CoreHarness(0, Node(8.0, 1.0))
    started = [each.worker for each in harness.request("a", *(stage("student", number=number) for number in range(6)))]
    assert [worker.shape for worker in started] == 4 * [QUARTER]
    for worker in started:
        harness.poll(worker.name)
    assert len(assigned(harness.dispatch())) == 4


# ---- which card


def test_halves_of_two_gpus_do_not_make_a_whole_one() -> None:
    free = free_gpu_shares(2.0, [(0.5, ("0",)), (0.5, ("1",))])
    assert free == {"0": 0.5, "1": 0.5}
    assert gpus_have_room(free, 0.5)
    assert not gpus_have_room(free, 1.0)


def test_a_worker_that_is_still_starting_is_assumed_on_the_fullest_gpu_with_room() -> None:
    free = free_gpu_shares(3.0, [(0.5, ("a",)), (0.25, ("b",)), (0.5, ())])
    assert sorted(free.values()) == [0.0, 0.75, 1.0]
    assert free["a"] == 0.0
    assert sorted(free_gpu_shares(3.0, [(2.0, ()), (0.25, ("b",))]).values()) == [0.0, 0.0, 0.75]


def test_eviction_makes_room_for_a_whole_gpu_on_one_gpu() -> None:
    registry = WorkerRegistry({"node": Node(8.0, 2.0)})
    for number, card in enumerate("0101"):
        worker = registry.register(f"worker-{number + 1}", WorkerShape(0.0, 0.5), "node")
        worker.gpu_ids, worker.last_heartbeat, worker.polling = (card,), 0.0, True
    capacity = DispatchCapacity(registry, 0.0)
    assert capacity.place_worker(WorkerShape(0.0, 1.0)) is None
    assert [worker.gpu_ids for worker in evict_idle(capacity, WorkerShape(0.0, 1.0))] == [("0",), ("0",)]


def cluster_harness(monkeypatch: pytest.MonkeyPatch, cpus: float, gpu: float, workers: int = 1) -> CoreHarness:
    monkeypatch.setitem(REQUESTS, "student", ResourceRequest(gpus=1.0))
    monkeypatch.setitem(REQUESTS, "clusters", ResourceRequest(gpus=1.0))
    harness = CoreHarness(workers)
    harness.core.resources_on_cpus = lambda name: ResourceRequest() if name == "clusters" else None
    harness.core.seconds_on = lambda on_gpu, stage: gpu if on_gpu else cpus
    harness.core.requests.expected_seconds = lambda stage: 10.0
    harness.poll("gpu-worker", WorkerShape(0.0, 1.0))
    return harness


@pytest.mark.parametrize(
    ("elapsed", "students", "cpus", "on_cpus"),
    [
        (0.0, 1, 11.9, True),
        (0.0, 1, 12.1, False),
        (8.0, 1, 4.1, False),
        (8.0, 1, 3.9, True),
        (8.0, 2, 13.9, True),
        (8.0, 2, 14.1, False),
        (99.0, 1, 2.1, False),
    ],
)
def test_clusters_run_on_cpus_where_the_gpu_is_busy_for_longer(
    elapsed: float, students: int, cpus: float, on_cpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take 2 s on the GPU, after students of 10 s each, of which the first runs for some time already."""
    harness = cluster_harness(monkeypatch, cpus, 2.0)
    for number in range(students):
        harness.request(f"trial {number}", stage("student", number=number))
    harness.now += elapsed
    harness.poll("worker-1")
    harness.registry.workers["gpu-worker"].last_heartbeat = harness.now
    clusters = stage("clusters")
    actions = harness.request("clusters", clusters)
    assert assigned(actions) == ([clusters.key] if on_cpus else [])
    if on_cpus:
        assert harness.core.running[clusters.key].worker == "worker-1"


def test_clusters_run_on_an_idle_gpu_and_start_a_worker_on_cpus_where_none_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = cluster_harness(monkeypatch, 0.5, 2.0, workers=0)
    first, second = stage("clusters", number=1), stage("clusters", number=2)
    harness.request("first", first)
    assert harness.core.running[first.key].worker == "gpu-worker", "the GPU serves what waits for nothing else"
    started = [action.worker.shape for action in harness.request("second", second) if isinstance(action, StartWorker)]
    assert started == [WorkerShape()]


def test_clusters_do_not_wait_for_a_gpu_that_is_gone_and_students_do(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = cluster_harness(monkeypatch, 1000.0, 1.0)
    del harness.registry.workers["gpu-worker"]
    harness.registry.set_alive_nodes({"node": Node(4.0)}, harness.now)
    harness.registry._departed["lost"] = (Node(4.0, 1.0), harness.now)
    clusters, student = stage("clusters"), stage("student")
    assert assigned(harness.request("clusters", clusters)) == [clusters.key]
    harness.publish(clusters)
    assert assigned(harness.request("student", student)) == []
    assert student.key in harness.core.requests.pending


def test_the_runtime_file_says_where_clusters_run_if_it_speaks_of_gpus() -> None:
    given = {"clusters": ResourceRequest(helpers=3)}
    found = GpuShares(given.__getitem__, lambda: True)
    assert found("clusters").gpus == 0.25
    assert found.on_cpus("clusters") == ResourceRequest(gpus=0.0, helpers=3)
    given["clusters"] = ResourceRequest(gpus=1.0)
    assert found.on_cpus("clusters") is None
    given["student"] = ResourceRequest()
    assert found.on_cpus("student") is None, "a training has other bits on CPUs"
