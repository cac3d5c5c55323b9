"""What runs out of memory runs once more with nothing beside it, and its neighbours are unharmed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from test_families import begun, family, layer
from test_scheduler_core import REQUESTS, CoreHarness, assigned, results, stage
from toy_work import toy

from ktray.errors import StageFailed
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_graph import build
from ktray.pool import SMALL_BATCH_SIZE, StageContext
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.scheduler.messages import (
    DISK_FULL,
    FAILED,
    OUT_OF_MEMORY,
    AssignStage,
    RetireWorker,
    SchedulerEvent,
    StartWorker,
    failure_kind,
)
from ktray.scheduler.ray_cluster import classify_worker_loss
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.worker_registry import Node, WorkerShape
from ktray.stages import features_stage, student_stage
from ktray.stores.file import FileStore
from tests.toys import ROTATION, toy_pair

GIB = 1 << 30
QUARTER = WorkerShape(0.0, 0.25)


# ---- which failures are of memory


class OutOfMemoryError(RuntimeError):
    """As torch calls it."""


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), OUT_OF_MEMORY),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), OUT_OF_MEMORY),
        (OutOfMemoryError("as in another library"), OUT_OF_MEMORY),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), OUT_OF_MEMORY),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), OUT_OF_MEMORY),
        (OSError(errno.ENOSPC, "No space left on device"), DISK_FULL),
        (ValueError("the sentence 'out of memory' alone says nothing"), FAILED),
        (RuntimeError("shapes do not match"), FAILED),
    ],
)
def test_the_kind_of_a_failure_is_found_in_an_error_or_in_its_causes(error: Exception, kind: str, tmp_path: Path) -> None:
    assert failure_kind(error, tmp_path) == kind
    above = ValueError("stage failed")
    above.__cause__ = error
    assert failure_kind(above, tmp_path) == kind


def test_what_torch_raises_for_the_hosts_memory_is_one_of_them(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert failure_kind(raised.value, tmp_path) == OUT_OF_MEMORY


# ---- the core: once more, alone


def run_out(harness: CoreHarness, each: Any) -> list[Any]:
    run = harness.core.running[each.key]
    assert not harness.core.handle_failed_attempt(each.key, run.attempt, OUT_OF_MEMORY, "MemoryError", "", harness.now)
    harness.registry.workers[run.worker].polling = True
    return harness.dispatch()


def with_small_batches(actions: list[Any]) -> list[str]:
    return [action.stage.key for action in actions if isinstance(action, AssignStage) and action.small_batches]


def test_on_a_cpu_it_waits_until_its_node_is_free_and_nothing_starts_beside_it() -> None:
    harness, big = CoreHarness(3), stage("big")
    others = [stage("one", number=number) for number in range(4)]
    harness.request("a", big)
    harness.request("b", *others)
    began = [each for each in others if each.key in harness.core.running]
    assert run_out(harness, big) == []
    assert harness.publish(began[0]) == []
    assert with_small_batches(harness.publish(began[1])) == [big.key]
    assert list(harness.core.running) == [big.key]
    assert harness.dispatch(1.0) == []
    later = harness.publish(big)
    assert results(later) == {"a": ["computed"]}
    assert len(assigned(later)) == 2
    assert with_small_batches(later) == []


def test_other_nodes_go_on_meanwhile() -> None:
    harness, big = CoreHarness(2), stage("big")
    harness.registry.nodes = {"node": Node(4.0, 0.0, 100.0), "other": Node(4.0, 0.0, 50.0)}
    harness.registry.workers["worker-2"].node = "other"
    one, two = stage("one"), stage("two")
    harness.request("a", big)
    harness.request("b", one)
    assert with_small_batches(run_out(harness, big)) == [big.key]
    assert assigned(harness.publish(one)) == []
    harness.request("c", two)
    assert harness.core.running[two.key].worker == "worker-2"


def test_on_a_gpu_it_gets_the_whole_one_although_small_stages_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REQUESTS, "student", ResourceRequest(gpus=0.25))
    harness = CoreHarness(0, Node(8.0, 1.0))
    students = [stage("student", number=number) for number in range(12)]
    for number, each in enumerate(students):
        harness.request(f"trial {number}", each)
    for number in range(4):
        harness.poll(f"worker-{number + 1}")
        harness.registry.workers[f"worker-{number + 1}"].gpu_ids = ("0",)
    harness.dispatch()
    big = students[0]
    actions = run_out(harness, big)
    retired = [action.worker for action in actions if isinstance(action, RetireWorker)]
    for each in students[1:4]:
        actions = harness.publish(each)
        assert assigned(actions) == [], "what would follow waits"
        retired += [action.worker for action in actions if isinstance(action, RetireWorker)]
    assert sorted(retired) == [f"worker-{number + 1}" for number in range(4)]
    for name in retired:
        harness.core.handle_lost_worker(name, "worker died", "retired", harness.now)
    (start,) = [action for action in harness.dispatch() if isinstance(action, StartWorker)]
    assert start.worker.shape == WorkerShape(0.0, 1.0)
    harness.poll(start.worker.name)
    assert with_small_batches(harness.dispatch()) == [big.key]
    assert results(harness.publish(big)) == {"trial 0": ["computed"]}
    assert harness.registry.workers[start.worker.name].retiring, "it makes room for small ones again"


def test_a_second_time_is_a_failure_that_says_what_to_change() -> None:
    harness, big = CoreHarness(1), stage("big")
    harness.request("a", big)
    assert with_small_batches(run_out(harness, big)) == [big.key]
    run = harness.core.running[big.key]
    assert harness.core.handle_failed_attempt(big.key, run.attempt, OUT_OF_MEMORY, "MemoryError", "", harness.now)
    harness.registry.workers["worker-1"].polling = True
    cause = results(harness.dispatch())["a"]
    assert cause.startswith("it ran out of memory even with the whole GPU, or machine, to itself (MemoryError)")
    assert "batch_size" in cause
    actions = harness.request("b", big)
    assert assigned(actions) == [big.key]
    assert with_small_batches(actions) == [], "who asks anew begins as usual"


def test_a_worker_that_dies_for_another_reason_is_not_treated_as_out_of_memory() -> None:
    event, why = classify_worker_loss(ray.exceptions.ActorDiedError())
    harness, big, other = CoreHarness(3), stage("big"), stage("one")
    harness.request("a", big)
    harness.request("b", other)
    harness.core.handle_lost_worker(harness.core.running[big.key].worker, event, why, harness.now)
    actions = harness.dispatch()
    assert assigned(actions) == [big.key]
    assert with_small_batches(actions) == []


def test_a_family_that_runs_out_of_memory_is_split_before_anything_runs_exclusively() -> None:
    harness = CoreHarness(1)
    layers = begun(harness, 2)
    actions = run_out(harness, layers[0])
    assert assigned(actions) == [layers[0].key]
    assert with_small_batches(actions) == []
    events = [action.event for action in harness.core.outbox if isinstance(action, SchedulerEvent)]
    assert OUT_OF_MEMORY not in events


def test_an_exclusive_stage_takes_none_of_its_family_along() -> None:
    harness, one, two = CoreHarness(1), layer(1), layer(2)
    harness.request("a", one)
    harness.request("b", two)
    actions = run_out(harness, one)
    assert with_small_batches(actions) == family(actions) == [one.key]


def test_a_large_share_is_not_kept_waiting_for_ever_by_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REQUESTS, "student", ResourceRequest(gpus=0.5))
    monkeypatch.setitem(REQUESTS, "teacher", ResourceRequest(gpus=1.0))
    harness = CoreHarness(0, Node(8.0, 1.0))
    students = [stage("student", number=number) for number in range(40)]
    harness.request("a", *students)
    for number in range(2):
        harness.poll(f"worker-{number + 1}")
        harness.registry.workers[f"worker-{number + 1}"].gpu_ids = ("0",)
    harness.dispatch()
    harness.request("b", stage("teacher"), priority=1)
    for _ in range(20):
        running = [each for each in students if each.key in harness.core.running]
        if not running:
            break
        harness.now += 5
        for name in harness.registry.workers:
            harness.core.handle_heartbeat(harness.registry.workers[name], "", None, "", {}, harness.now)
        harness.publish(running[0])
    assert all(worker.retiring for worker in harness.registry.workers.values())
    assert harness.now < 100 + 45


# ---- the work: a smaller piece at a time, and a record that says so


class Starved:
    """A stage's work that has memory for few images, or for none."""

    def __init__(self, run: Callable[..., Any], most: int) -> None:
        self.run, self.most = run, most

    def __call__(self, stage: Any, inputs: Any, out: Path, context: StageContext, start: Any) -> Any:
        if (context.max_batch_size or 256) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return self.run(stage, inputs, out, context, start)


def test_in_one_process_it_is_tried_again_with_few_images_and_tagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = build(toy_pair(teacher=ROTATION), data_identity())
    store, events = FileStore(tmp_path), []
    monkeypatch.setattr(features_stage, "run", Starved(features_stage.run, SMALL_BATCH_SIZE))
    LocalScheduler(store, execute, StageContext(), lambda event: events.append(event["event"])).obtain(
        list(graph.stages), "test"
    )
    tags = {name: store.find(key).record["after_out_of_memory"] for name, key in graph.keys.items() if isinstance(key, str)}
    assert tags == {name: name == "features" for name in tags}
    assert events.count(OUT_OF_MEMORY) == 1
    assert not list((tmp_path / ".scratch").iterdir())


def test_a_training_that_does_not_fit_alone_fails_with_a_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = build(toy_pair(), data_identity())
    monkeypatch.setattr(student_stage, "run", Starved(student_stage.run, 0))
    with pytest.raises(StageFailed, match=r"even with the whole GPU.*use a smaller batch_size"):
        LocalScheduler(FileStore(tmp_path), execute, StageContext(), lambda event: None).obtain(list(graph.stages), "test")


def test_the_record_of_a_cpu_holds_no_peak_of_a_gpu(tmp_path: Path) -> None:
    artifact, _ = execute(build(toy_pair(), data_identity()).stages[0], FileStore(tmp_path), "a", StageContext())
    assert artifact.record["device_peak_bytes"] == artifact.record["device_bytes"] == 0
    assert artifact.record["peak_bytes"] > 1 << 20


def test_on_ray_it_runs_again_exclusively_and_its_neighbours_are_unharmed(start_scheduler: Any, tmp_path: Path) -> None:
    scheduler = start_scheduler(tmp_path / "store")
    log = tmp_path / "log"
    big = toy("big", {"error": "memory", "log": str(log)})
    slow = [toy("slow", {"steps": 8, "number": number, "log": str(log)}) for number in range(3)]
    scheduler.obtain([big, *slow], "trial")
    store = FileStore(tmp_path / "store")
    assert [store.find(each.key).record["after_out_of_memory"] for each in (big, *slow)] == [True, False, False, False]  # type: ignore[union-attr]
    events = [event["event"] for event in scheduler.events() if event["key"] == big.key]
    assert events == ["started", OUT_OF_MEMORY, "started", "published"]
    assert sum(line.startswith("slow-") for line in log.read_text().splitlines()) == 3


@pytest.mark.gpu
def test_on_a_gpu_the_peak_is_recorded_and_a_provoked_shortage_is_overcome(tmp_path: Path) -> None:
    graph = build(toy_pair(teacher=ROTATION), data_identity())
    store = FileStore(tmp_path)
    context = StageContext(device="cuda:0")
    before = [each for each in graph.stages if each.name in ("images", "teacher")]
    LocalScheduler(store, execute, context, lambda event: None).obtain(before, "test")
    whole = torch.cuda.get_device_properties(0).total_memory
    teacher = store.find(graph.keys["teacher"]).record  # type: ignore[union-attr]
    assert 0 < teacher["device_peak_bytes"] < teacher["device_bytes"] == whole
    features = next(each for each in graph.stages if each.key == graph.keys["features"])
    expected, _ = execute(features, store, "plain", context)
    store.remove(features.key)
    held = [torch.empty(0, device="cuda:0")]
    real = features_stage.run

    def beside_a_neighbour(*given: Any) -> Any:
        if not given[3].max_batch_size:
            held[0] = torch.empty(2 * whole, dtype=torch.uint8, device="cuda:0")  # more than there is: a real shortage
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features_stage, "run", beside_a_neighbour)
        LocalScheduler(store, execute, context, lambda event: None).obtain([features], "test")
    again = store.find(features.key)
    assert again is not None
    assert again.record["after_out_of_memory"]
    assert again.metrics["dim"] == expected.metrics["dim"]
