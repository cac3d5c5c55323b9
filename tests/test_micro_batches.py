"""A batch too large for the memory trains in parts with the same step, but only if the loss is a mean over images."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ktray import plugins
from ktray.errors import StageFailed
from ktray.ops.random_draws import Draws
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_graph import build
from ktray.pool import SMALL_BATCH_SIZE, StageContext
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.scheduler.messages import OUT_OF_MEMORY
from ktray.spec import Augment, Schedule
from ktray.stores.file import FileStore
from ktray.training import classification, loop
from ktray.training.batches import Batches
from ktray.training.task import Labels, Task, make_batch
from tests import test_pretext, test_transfer
from tests.networks import BACKBONE
from tests.toy_images import toy_images
from tests.toys import DATA, ROTATION, toy_pair

torch.set_num_threads(1)

WITHOUT_NORM = plugins.parse("backbone", {"kind": "alexnet", "form": "grouped_stride2", "width": 0.0625})
IMAGES = toy_images(46, size=36)
ATOL = 1e-14  # of weights up to 0.4 in float64


def task_of(room: str, kind: str) -> Task:
    task: Task = {"pretext": test_pretext, "transfer": test_transfer}[room].task_of(kind)
    return task


def trained(out: Path, task: Task, max_batch_size: int | None, **settings: Any) -> dict[str, float]:
    """Two epochs of float64, in which parts and whole differ by nothing but rounding far below any mistake."""

    def batch(pixels: Tensor, indices: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        inputs, targets = task.batch(pixels, indices, draws)
        return inputs.double(), targets

    return loop.fit(
        loop.untrained_backbone(settings.pop("backbone", WITHOUT_NORM), 0).double(),
        replace(task, batch=batch, head=lambda width: task.head(width).double()),
        settings.pop("images", IMAGES),
        Schedule(**{"epochs": 2, "lr": 0.01, "batch_size": 23, "warmup": 1.0, **settings}),
        3,
        out=out,
        until=2,
        max_batch_size=max_batch_size,
    )


def clusters_task(*left_out: int, **mixed: float) -> Task:
    """Two heads; of the second some images are left out."""
    augment = Augment(crop=4, flip=True, **mixed)  # type: ignore[arg-type]
    second = np.where(np.isin(np.arange(46), left_out), -1, np.arange(46) % 3)
    return classification.joint_task([Labels(IMAGES.labels, 4), Labels(second, 3)], augment)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("task", "batch_size", "max_batch_size"),
    [
        (clusters_task(), 23, 5),
        (clusters_task(*range(1, 30, 3)), 23, 5),
        (clusters_task(1, 2, 3, mixup=0.3, cutmix=1.0), 23, 5),
        (clusters_task(), 9, 2),
        (test_pretext.task_of("rotation", 36), 23, 4),
    ],
    ids=["two heads", "two heads for different images", "mixed images", "in pairs", "rotation"],
)
def test_without_batch_norm_parts_take_the_same_steps_as_whole_batches(
    task: Task, batch_size: int, max_batch_size: int, tmp_path: Path
) -> None:
    whole = trained(tmp_path / "whole", task, None, batch_size=batch_size)
    parts = trained(tmp_path / "parts", task, max_batch_size, batch_size=batch_size)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-9)
    assert parts == pytest.approx(whole, rel=1e-6)  # top1 is a mean of float32
    for file in ("weights.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(tmp_path / "parts" / file), load_file(tmp_path / "whole" / file)
        assert ours.keys() == theirs.keys()
        assert any(not torch.equal(ours[name], theirs[name]) for name in ours), "they were not cut"
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("images", "batch_size", "max_batch_size", "sizes"),
    [
        (130, 65, 32, [13] * 10),
        (128, 128, 32, [32] * 4),
        (256, 256, 32, [32] * 8),
        (32, 32, 32, [8] * 4),
        (7, 7, 32, [3, 2, 2]),
        (40, 32, 32, [8] * 5),
        (6, 3, 32, [3, 3]),
        (128, 128, None, [128]),
    ],
)
def test_parts_are_a_quarter_of_a_batch_or_less_and_never_a_single_image(
    images: int, batch_size: int, max_batch_size: int | None, sizes: list[int]
) -> None:
    task = classification.task(toy_images(images).labels, 4, Augment())  # type: ignore[arg-type]
    batches = Batches(toy_images(images, size=8), task, batch_size, 0, torch.device("cpu"))
    most = loop.largest_part(task, Schedule(epochs=1, batch_size=batch_size), max_batch_size)
    found = []
    for pixels, indices, _ in batches.made_for_each_step(1):
        parts = loop.parts(pixels.repeat_interleave(2, dim=0), indices, most)
        assert sum(share for share, _, _ in parts) == pytest.approx(1)
        assert torch.equal(torch.cat([wanted for _, _, wanted in parts]), indices)
        assert all(
            torch.equal(some[::2], torch.from_numpy(toy_images(images, size=8).read(wanted.numpy())))
            for _, some, wanted in parts
        )
        found += [len(wanted) for _, _, wanted in parts]
    assert found == sizes


def test_after_step_runs_once_per_step_and_batch_norm_sees_each_part(tmp_path: Path) -> None:
    steps = []
    task = replace(
        task_of("pretext", "rotation"),
        after_step=lambda model: steps.append(int(model["backbone"].conv1[1].num_batches_tracked)),
    )
    trained(tmp_path, task, 32, backbone=BACKBONE, images=toy_images(32, size=28), batch_size=16)
    assert steps == [4, 8, 12, 16]


KINDS = [("pretext", kind) for kind in test_pretext.KINDS] + [("transfer", kind) for kind in test_transfer.TRAINED]


@pytest.mark.parametrize(("room", "kind"), KINDS, ids=[".".join(names) for names in KINDS])
def test_a_task_declared_as_a_mean_over_images_is_one_in_loss_and_gradient(room: str, kind: str) -> None:
    task, images = task_of(room, kind), toy_images(12, size=28) if room == "pretext" else test_transfer.IMAGES
    torch.manual_seed(0)
    backbone = loop.untrained_backbone(BACKBONE, 0)
    model = nn.ModuleDict({"backbone": backbone, "head": task.head(backbone.feature_dim)})  # type: ignore[arg-type]
    if task.prepare:
        task.prepare(model)
    model.eval()  # so that batch norm is not what differs
    indices = torch.arange(12)
    pixels = torch.from_numpy(images.read(indices.numpy()))
    inputs, targets = make_batch(task, pixels, indices, torch.Generator().manual_seed(0))
    cut = loop.parts(
        inputs, targets, loop.largest_part(replace(task, mean_over_images=True), Schedule(epochs=1, batch_size=20), 5)
    )
    assert len(cut) == 3
    losses, gradients = [], []
    for parts in ([(1.0, inputs, targets)], cut):
        model.zero_grad()
        losses.append(0.0)
        for share, some, wanted in parts:
            loss, _ = task.loss(task.forward(model, some) if task.forward else model["head"](backbone(some)), wanted)
            (share * loss).backward()
            losses[-1] += share * float(loss.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    same = losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert same or not task.mean_over_images
    if task.mean_over_images:
        assert float(gradients[0].norm()) > 0
        assert float((gradients[1] - gradients[0]).norm()) < 1e-4 * float(gradients[0].norm())


@pytest.mark.parametrize("kind", ["simclr", "counting", "dino"])
def test_tasks_that_compare_images_or_store_batch_means_are_not_means_over_images(kind: str) -> None:
    assert not task_of("pretext", kind).mean_over_images


# ---- a stage that runs out of memory


class Small:
    """Networks for a machine that holds the gradients of few inputs: a larger forward pass runs out of memory."""

    def __init__(self, most: int) -> None:
        self.most, self.real = most, loop.untrained_backbone
        self.seen: list[int] = []

    def untrained_backbone(self, spec: Any, seed: int) -> nn.Module:
        network = self.real(spec, seed)
        network.register_forward_pre_hook(self._look)
        return network

    def _look(self, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen.append(len(inputs[0]))
        if len(inputs[0]) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")


def test_a_student_too_large_for_the_memory_is_trained_in_parts_and_tagged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, small, told = build(toy_pair(data={**DATA, "count": 120}), data_identity()), Small(8), []
    monkeypatch.setattr(loop, "untrained_backbone", small.untrained_backbone)
    store = FileStore(tmp_path)
    LocalScheduler(store, execute, StageContext(), lambda event: told.append(event["event"])).obtain(list(graph.stages), "test")
    tags = {name: store.find(key).record["after_out_of_memory"] for name, key in graph.keys.items() if isinstance(key, str)}  # type: ignore[union-attr]
    assert tags == {name: name == "student" for name in tags}
    assert told.count(OUT_OF_MEMORY) == 1
    assert small.seen[0] == 32, "the first attempt had the whole batch"
    assert max(small.seen[1:]) == 8
    student = store.find(graph.keys["student"])  # type: ignore[arg-type]
    assert student is not None
    assert np.isfinite(student.metrics["loss"])


def test_a_teacher_is_trained_in_parts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graph, small = build(toy_pair(teacher=ROTATION), data_identity()), Small(4 * 8)
    monkeypatch.setattr(loop, "untrained_backbone", small.untrained_backbone)
    store = FileStore(tmp_path)
    stages = [each for each in graph.stages if each.name in ("images", "teacher")]
    LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(stages, "test")
    assert store.find(stages[-1].key).record["after_out_of_memory"]  # type: ignore[union-attr]
    assert set(small.seen[1:]) == {32}


def test_a_task_that_compares_images_is_never_cut_and_fails_with_a_clear_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = {**ROTATION, "pretext": {"kind": "simclr", "hidden": 16, "width": 8}}
    graph, small = build(toy_pair(teacher=teacher), data_identity()), Small(SMALL_BATCH_SIZE)
    monkeypatch.setattr(loop, "untrained_backbone", small.untrained_backbone)
    with pytest.raises(StageFailed, match=r"even with the whole GPU.*use a smaller batch_size"):
        LocalScheduler(FileStore(tmp_path), execute, StageContext(), lambda event: None).obtain(list(graph.stages), "test")
    assert small.seen == [64, 64], "both views of a whole batch, twice"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_on_a_gpu_a_batch_that_really_does_not_fit_is_trained_in_parts(precision: str, tmp_path: Path) -> None:
    teacher = {
        **ROTATION,
        "backbone": {"kind": "alexnet", "form": "grouped_stride2"},
        "schedule": {"epochs": 1, "lr": 0.01, "batch_size": 256, "precision": precision},
    }
    graph = build(toy_pair(data={**DATA, "count": 400, "size": 64}, teacher=teacher), data_identity())
    stages = [each for each in graph.stages if each.name in ("images", "teacher")]
    store, told = FileStore(tmp_path), []
    scheduler = LocalScheduler(store, execute, StageContext(device="cuda:0"), lambda event: told.append(event["event"]))
    for _ in range(2):  # in the first run of a process libraries try kernels that take far more memory
        scheduler.obtain(stages, "test")
        whole = store.find(stages[-1].key)
        assert whole is not None
        store.remove(whole.key)
    gc.collect()
    torch.cuda.empty_cache()  # the limit does not count for memory that torch has already
    half = whole.record["device_peak_bytes"] / 2
    torch.cuda.set_per_process_memory_fraction(half / whole.record["device_bytes"], 0)
    try:
        scheduler.obtain(stages, "test")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
    parts = store.find(whole.key)
    assert parts is not None
    assert told.count(OUT_OF_MEMORY) == 1
    assert parts.record["after_out_of_memory"]
    assert parts.record["device_peak_bytes"] < half
    assert parts.metrics["loss"] == pytest.approx(whole.metrics["loss"], rel=0.02)
