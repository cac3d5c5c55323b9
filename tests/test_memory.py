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
from test_ledger import NEEDS, House, answers, given, stage
from toy_work import toy

from ktray.errors import StageFailed
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_graph import build
from ktray.pool import FEW_IMAGES, StageContext
from ktray.scheduler.failure_kinds import DISK_FULL, FAILED, OUT_OF_MEMORY, failure_kind
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.scheduler.messages import AssignStage, RetireWorker, SchedulerEvent, StartWorker
from ktray.scheduler.ray_cluster import loss_of
from ktray.scheduler.resources import ResourceRequest
from ktray.scheduler.workers import Node, WorkerShape
from ktray.stages import WORK
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
def test_an_error_is_told_by_what_it_is_also_below_another_one(error: Exception, kind: str, tmp_path: Path) -> None:
    assert failure_kind(error, tmp_path) == kind
    above = ValueError("stage failed")
    above.__cause__ = error
    assert failure_kind(above, tmp_path) == kind


def test_what_torch_raises_for_the_hosts_memory_is_one_of_them(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(1 << 60)
    assert failure_kind(raised.value, tmp_path) == OUT_OF_MEMORY


# ---- the core: once more, alone


def run_out(house: House, each: Any) -> list[Any]:
    run = house.core.running[each.key]
    assert not house.core.attempt_failed(each.key, run.attempt, OUT_OF_MEMORY, "MemoryError", "", house.now)
    house.registry.workers[run.worker].polling = True
    return house.turn()


def with_few(actions: list[Any]) -> list[str]:
    return [action.stage.key for action in actions if isinstance(action, AssignStage) and action.small_batches]


def test_on_a_cpu_it_waits_until_its_node_is_quiet_and_nothing_begins_beside_it() -> None:
    house, big = House(3), stage("big")
    others = [stage("one", number=number) for number in range(4)]
    house.want("a", big)
    house.want("b", *others)
    began = [each for each in others if each.key in house.core.running]
    assert run_out(house, big) == []
    assert house.publish(began[0]) == []
    assert with_few(house.publish(began[1])) == [big.key]
    assert list(house.core.running) == [big.key]
    assert house.turn(1.0) == []
    later = house.publish(big)
    assert answers(later) == {"a": ["computed"]}
    assert len(given(later)) == 2
    assert with_few(later) == []


def test_other_nodes_go_on_meanwhile() -> None:
    house, big = House(2), stage("big")
    house.registry.nodes = {"node": Node(4.0, 0.0, 100.0), "other": Node(4.0, 0.0, 50.0)}
    house.registry.workers["worker-2"].node = "other"
    one, two = stage("one"), stage("two")
    house.want("a", big)
    house.want("b", one)
    assert with_few(run_out(house, big)) == [big.key]
    assert given(house.publish(one)) == []
    house.want("c", two)
    assert house.core.running[two.key].worker == "worker-2"


def test_on_a_gpu_it_gets_the_whole_one_although_small_stages_follow_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEEDS, "student", ResourceRequest(gpus=0.25))
    house = House(0, Node(8.0, 1.0))
    students = [stage("student", number=number) for number in range(12)]
    for number, each in enumerate(students):
        house.want(f"trial {number}", each)
    for number in range(4):
        house.arrive(f"worker-{number + 1}")
        house.registry.workers[f"worker-{number + 1}"].gpu_ids = ("0",)
    house.turn()
    big = students[0]
    actions = run_out(house, big)
    dismissed = [action.worker for action in actions if isinstance(action, RetireWorker)]
    for each in students[1:4]:
        actions = house.publish(each)
        assert given(actions) == [], "what would follow waits"
        dismissed += [action.worker for action in actions if isinstance(action, RetireWorker)]
    assert sorted(dismissed) == [f"worker-{number + 1}" for number in range(4)]
    for name in dismissed:
        house.core.worker_lost(name, "worker died", "told to go", house.now)
    (hire,) = [action for action in house.turn() if isinstance(action, StartWorker)]
    assert hire.worker.shape == WorkerShape(0.0, 1.0)
    house.arrive(hire.worker.name)
    assert with_few(house.turn()) == [big.key]
    assert answers(house.publish(big)) == {"trial 0": ["computed"]}
    assert house.registry.workers[hire.worker.name].retiring, "it makes room for small ones again"


def test_a_second_time_is_a_failure_that_says_what_to_change() -> None:
    house, big = House(1), stage("big")
    house.want("a", big)
    assert with_few(run_out(house, big)) == [big.key]
    run = house.core.running[big.key]
    assert house.core.attempt_failed(big.key, run.attempt, OUT_OF_MEMORY, "MemoryError", "", house.now)
    house.registry.workers["worker-1"].polling = True
    said = answers(house.turn())["a"]
    assert said.startswith("its memory does not suffice even with the whole GPU, or machine, for itself (MemoryError)")
    assert "batch_size" in said
    actions = house.want("b", big)
    assert given(actions) == [big.key]
    assert with_few(actions) == [], "who asks anew begins as usual"


def test_a_worker_that_dies_otherwise_is_no_matter_of_memory() -> None:
    event, why = loss_of(ray.exceptions.ActorDiedError())
    house, big, other = House(3), stage("big"), stage("one")
    house.want("a", big)
    house.want("b", other)
    house.core.worker_lost(house.core.running[big.key].worker, event, why, house.now)
    actions = house.turn()
    assert given(actions) == [big.key]
    assert with_few(actions) == []


def test_a_family_that_runs_out_of_memory_is_made_apart_before_anything_is_alone() -> None:
    house = House(1)
    layers = begun(house, 2)
    actions = run_out(house, layers[0])
    assert given(actions) == [layers[0].key]
    assert with_few(actions) == []
    events = [action.event for action in house.core.outbox if isinstance(action, SchedulerEvent)]
    assert OUT_OF_MEMORY not in events


def test_what_is_alone_takes_none_of_its_family_along() -> None:
    house, one, two = House(1), layer(1), layer(2)
    house.want("a", one)
    house.want("b", two)
    actions = run_out(house, one)
    assert with_few(actions) == family(actions) == [one.key]


def test_a_large_share_is_not_kept_waiting_for_ever_by_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NEEDS, "student", ResourceRequest(gpus=0.5))
    monkeypatch.setitem(NEEDS, "teacher", ResourceRequest(gpus=1.0))
    house = House(0, Node(8.0, 1.0))
    students = [stage("student", number=number) for number in range(40)]
    house.want("a", *students)
    for number in range(2):
        house.arrive(f"worker-{number + 1}")
        house.registry.workers[f"worker-{number + 1}"].gpu_ids = ("0",)
    house.turn()
    house.want("b", stage("teacher"), priority=1)
    for _ in range(20):
        running = [each for each in students if each.key in house.core.running]
        if not running:
            break
        house.now += 5
        for name in house.registry.workers:
            house.core.heartbeat(house.registry.workers[name], "", None, "", {}, house.now)
        house.publish(running[0])
    assert all(worker.retiring for worker in house.registry.workers.values())
    assert house.now < 100 + 45


# ---- the work: a smaller piece at a time, and a record that says so


class Starved:
    """A stage's work that has memory for few images, or for none."""

    def __init__(self, run: Callable[..., Any], most: int) -> None:
        self.run, self.most = run, most

    def __call__(self, stage: Any, inputs: Any, out: Path, context: StageContext, start: Any) -> Any:
        if (context.most_images or 256) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        return self.run(stage, inputs, out, context, start)


def test_in_one_process_it_is_tried_again_with_few_images_and_tagged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = build(toy_pair(teacher=ROTATION), data_identity())
    store, told = FileStore(tmp_path), []
    monkeypatch.setitem(WORK, "features", Starved(WORK["features"], FEW_IMAGES))  # type: ignore[arg-type]
    LocalScheduler(store, execute, StageContext(), lambda event: told.append(event["event"])).obtain(list(graph.stages), "test")
    tags = {name: store.find(key).record["after_out_of_memory"] for name, key in graph.keys.items() if isinstance(key, str)}
    assert tags == {name: name == "features" for name in tags}
    assert told.count(OUT_OF_MEMORY) == 1
    assert not list((tmp_path / ".scratch").iterdir())


def test_a_training_that_does_not_fit_alone_fails_with_a_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = build(toy_pair(), data_identity())
    monkeypatch.setitem(WORK, "student", Starved(WORK["student"], 0))  # type: ignore[arg-type]
    with pytest.raises(StageFailed, match=r"even with the whole GPU.*use a smaller batch_size"):
        LocalScheduler(FileStore(tmp_path), execute, StageContext(), lambda event: None).obtain(list(graph.stages), "test")


def test_the_record_of_a_cpu_holds_no_peak_of_a_gpu(tmp_path: Path) -> None:
    artifact, _ = execute(build(toy_pair(), data_identity()).stages[0], FileStore(tmp_path), "a", StageContext())
    assert artifact.record["device_peak_bytes"] == artifact.record["device_bytes"] == 0
    assert artifact.record["peak_bytes"] > 1 << 20


def test_on_ray_it_runs_again_alone_and_its_neighbours_are_unharmed(start_scheduler: Any, tmp_path: Path) -> None:
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
    real = WORK["features"]

    def beside_a_neighbour(*given: Any) -> Any:
        if not given[3].most_images:
            held[0] = torch.empty(2 * whole, dtype=torch.uint8, device="cuda:0")  # more than there is: a real shortage
        return real(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(WORK, "features", beside_a_neighbour)  # type: ignore[arg-type]
        LocalScheduler(store, execute, context, lambda event: None).obtain([features], "test")
    again = store.find(features.key)
    assert again is not None
    assert again.record["after_out_of_memory"]
    assert again.metrics["dim"] == expected.metrics["dim"]
