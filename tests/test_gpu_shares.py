"""Stages share a GPU by what they need of its memory, card by card."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_scheduler_core import REQUESTS, CoreHarness, assigned, stage

from ktray.artifact import Artifact
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
    placement = DispatchCapacity(registry, 0.0)
    assert placement.place_worker(WorkerShape(0.0, 1.0)) is None
    assert [worker.gpu_ids for worker in evict_idle(placement, WorkerShape(0.0, 1.0))] == [("0",), ("0",)]
