"""Steps as CUDA graphs: the same weights as steps kernel by kernel, whatever the task, the network and the schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ktray import conditions, plugins
from ktray.images import Images
from ktray.ops.random_draws import Draws
from ktray.spec import Augment, Schedule
from ktray.training import batches, classification, compilation, cuda_graph, loop, snapshot
from ktray.training.batches import Batches, RowLayout
from ktray.training.task import Task
from tests import test_micro_batches, test_pretext
from tests.toy_images import toy_images

torch.set_num_threads(1)

IMAGES = toy_images(70, size=28)
ALEXNET = {"kind": "alexnet", "width": 0.125}
BACKBONES = [
    ALEXNET,
    {"kind": "resnet", "width": 0.125},
    {"kind": "vit", "image": 28},
    {"kind": "convnext", "width": 0.25, "drop_path": 0.1},
]


def labels_task(**changes: Any) -> Task:
    return replace(classification.task(IMAGES.labels, 4, Augment(crop=2, flip=True)), **changes)  # type: ignore[arg-type]


def trained(
    out: Path,
    task: Task,
    *,
    backbone: dict[str, Any] = ALEXNET,
    images: Images = IMAGES,
    until: int = 4,
    start: Path | None = None,
    max_batch_size: int | None = None,
    device: str = "cuda",
    on_epoch: loop.OnEpoch | None = None,
    **schedule: Any,
) -> dict[str, Tensor]:
    """All weights, optimiser buffers and the metrics of a training; of 70 images the last batch has 22."""
    settings: dict[str, Any] = {"epochs": 6, "lr": 0.01, "warmup": 1.0, "decay": 0.3, "batch_size": 24, **schedule}
    network = loop.untrained_backbone(plugins.parse("backbone", backbone), 0)
    metrics = loop.fit(
        network,
        task,
        images,
        Schedule(**settings),
        3,
        out=out,
        until=until,
        start=start,
        device=device,
        max_batch_size=max_batch_size,
        on_epoch=on_epoch,
    )
    files = (load_file(out / f"{name}.safetensors") for name in ("weights", "optimizer"))
    return {**next(files), **{f"buffer {name}": value for name, value in next(files).items()}} | {
        f"metric {name}": torch.tensor(value, dtype=torch.float64) for name, value in metrics.items()
    }


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The variants that were captured."""
    captured: list[Any] = []
    real = cuda_graph.Graphs._capture
    monkeypatch.setattr(cuda_graph.Graphs, "_capture", lambda self, *given: (captured.append(given[1]), real(self, *given)))
    return captured


# --- on any machine


def test_what_is_packed_into_a_row_of_bytes_comes_out_as_it_was() -> None:
    drawn: Draws = {
        "flags": torch.tensor([True, False, True]),
        "nested": {"numbers": torch.arange(10).view(2, 5), "scalar": torch.tensor(0.5)},
        "few": torch.arange(3, dtype=torch.uint8).expand(4, 3),
        "half": torch.randn(7).half(),
        "none": {},
        "empty": torch.zeros(0, 3),
    }
    layout = RowLayout(3, drawn)
    rows = torch.full((2, layout.width), 255, dtype=torch.uint8)
    layout.pack(rows[1], drawn)
    found = layout.unpack(rows[1])
    assert list(found) == list(drawn)
    for name in ("flags", "few", "half", "empty"):
        assert torch.equal(found[name], drawn[name])
    assert torch.equal(found["nested"]["numbers"], drawn["nested"]["numbers"])
    assert found["nested"]["scalar"] == 0.5
    assert (rows[0] == 255).all(), "the other row was not touched"


def test_draws_that_change_their_shape_or_names_from_step_to_step_are_refused() -> None:
    layout = RowLayout(2, {"angle": torch.zeros(2)})
    row = torch.zeros(layout.width, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"'angle' is torch\.float32"):
        layout.pack(row, {"angle": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"drew \['angle', 'more'\] in one step and \['angle'\] in another"):
        layout.pack(row, {"angle": torch.zeros(2), "more": torch.zeros(1)})


@pytest.mark.parametrize("kind", ["rotation", "context", "jigsaw_pp"])
@pytest.mark.parametrize("resident", [True, False])
def test_steps_from_uploaded_rows_are_those_made_one_by_one(
    kind: str, resident: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = test_pretext.task_of(kind)
    alone = trained(tmp_path / "alone", task, device="cpu", until=2, batch_size=12)
    monkeypatch.setattr(loop, "_uploads_ahead", lambda device: True)
    monkeypatch.setattr(cuda_graph, "EAGER_CALLS", 1000)
    monkeypatch.setattr(batches, "_THREADED_BYTES", 1 << 12)
    monkeypatch.setitem(batches.RESIDENT_BYTES, "cpu", (1 << 30) * resident)
    uploaded = trained(tmp_path / "uploaded", task, device="cpu", until=2, batch_size=12)
    assert not differing(alone, uploaded)


def test_the_rows_of_an_epoch_come_in_few_uploads_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Batches(toy_images(103, size=8), labels_task(keep=torch.arange(103)), 4, 0, torch.device("cpu"))
    uploads = []
    real = Batches._upload
    monkeypatch.setattr(Batches, "_upload", lambda *given: (uploads.append(len(given[2])), real(*given))[1])
    seen = [
        (layout.count, float(layout.unpack(row)["lr"]), layout.unpack(row)["positions"].tolist())
        for layout, row, _ in made.uploaded_ahead(2, [step / 8 for step in range(made.steps)])
    ]
    assert uploads == [4, 8, 13, 1], "the last batch has three images, and so a layout of its own"
    assert [count for count, _, _ in seen] == [4] * 25 + [3]
    assert [lr for _, lr, _ in seen] == [step / 8 for step in range(26)]
    assert [positions for _, _, positions in seen] == [positions.tolist() for positions in made.order(2)]


def test_every_task_that_ktray_comes_with_can_be_captured() -> None:
    for kind in test_pretext.KINDS:
        assert test_pretext.task_of(kind).capturable, kind


@pytest.mark.parametrize(("seconds_left", "wanted"), [(3.6, False), (100, False), (200, True), (3600, True)])
def test_compiling_is_left_to_trainings_of_minutes(seconds_left: float, wanted: bool) -> None:
    assert compilation.pays(seconds_left) is wanted


def test_a_training_goes_on_when_its_compiler_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*given: Any) -> Any:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    double = compilation.compiled(lambda number: 2 * number)
    assert [double(1), double(2)] == [2, 4]
    assert caplog.text.count("torch.compile failed (RuntimeError)") == 1


def test_an_error_of_the_training_itself_is_raised_and_not_blamed_on_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(number: int) -> int:
        raise ValueError("not finite")

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(ValueError, match="not finite"):
        compilation.compiled(wrong)(1)


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("room", "kind"), test_micro_batches.KINDS, ids=[".".join(k) for k in test_micro_batches.KINDS])
def test_graphed_steps_of_every_task_equal_eager_ones_bit_for_bit(
    room: str, kind: str, tmp_path: Path, graphs: list[Any]
) -> None:
    task = test_micro_batches.task_of(room, kind)
    images = IMAGES if room == "pretext" else test_micro_batches.test_transfer.IMAGES
    eager = trained(tmp_path / "eager", replace(task, capturable=False), images=images)
    assert not graphs
    graphed = trained(tmp_path / "graphed", task, images=images)
    if kind == "split_brain":  # the sum of the loss over a map of cells is in the order of arrival; its gradient is not
        assert graphed["metric loss"] == pytest.approx(float(eager["metric loss"]), rel=1e-6)
        graphed["metric loss"] = eager["metric loss"]
    count = len(images) if task.keep is None else len(task.keep)
    assert {layout.count for layout in graphs} == {24, count % 24} - {0}
    assert not differing(eager, graphed)


@pytest.mark.gpu
@pytest.mark.parametrize("backbone", BACKBONES, ids=lambda backbone: backbone["kind"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_graphed_steps_of_every_network_equal_eager_ones_bit_for_bit(
    backbone: dict[str, Any], precision: str, optimizer: str, tmp_path: Path, graphs: list[Any]
) -> None:
    settings = {"backbone": backbone, "precision": precision, "optimizer": optimizer}
    eager = trained(tmp_path / "eager", labels_task(capturable=False), **settings)
    graphed = trained(tmp_path / "graphed", labels_task(), **settings)
    assert len(graphs) == 2
    assert not differing(eager, graphed)


@pytest.mark.gpu
def test_graphed_steps_with_dropout_momentum_zero_parts_and_streamed_images_equal_eager_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "dropout": lambda: {"head": lambda width: nn.Sequential(nn.Dropout(0.5), nn.Linear(width, 4))},
        "no momentum": lambda: {},
        "parts": lambda: {},
        "streamed": lambda: {},
    }
    for name, changes in cases.items():
        given: dict[str, Any] = {"momentum": 0.0} if name == "no momentum" else {}
        given |= {"max_batch_size": 5} if name == "parts" else {}
        monkeypatch.setitem(batches.RESIDENT_BYTES, "cuda", 0 if name == "streamed" else 1 << 30)
        eager = trained(tmp_path / f"{name} eager", labels_task(capturable=False, **changes()), **given)
        graphed = trained(tmp_path / f"{name} graphed", labels_task(**changes()), **given)
        assert not differing(eager, graphed), name


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["rotation", "byol", "dino"])
def test_a_graphed_training_that_is_killed_resumes_to_the_same_weights(kind: str, optimizer: str, tmp_path: Path) -> None:
    task = test_pretext.task_of(kind)
    whole = trained(tmp_path / "whole", task, until=5, optimizer=optimizer)

    class Killed(BaseException):
        """Ends a training as a signal does."""

    def kill(epoch: int, metrics: dict[str, float], save: loop.Save) -> None:
        if epoch == 3:
            save(tmp_path / "checkpoint")
            raise Killed

    with pytest.raises(Killed):
        trained(tmp_path / "killed", task, until=5, optimizer=optimizer, on_epoch=kill)
    resumed = trained(tmp_path / "resumed", task, until=5, start=tmp_path / "checkpoint", optimizer=optimizer)
    assert not differing(whole, resumed)


@pytest.mark.gpu
def test_a_network_that_cannot_be_captured_is_trained_eagerly(tmp_path: Path, graphs: list[Any]) -> None:
    calls: Iterator[int] = iter(range(1000))
    task = labels_task(loss=lambda outputs, targets: (next(calls), classification.cross_entropy(outputs, targets))[1])
    with conditions.collecting() as noted:
        trained(tmp_path, replace(task, capturable=False), until=2)
    assert next(calls) == 6, "each step ran Python"
    assert noted["training"]["because"] == "the task cannot be captured"
    assert not graphs


@pytest.mark.gpu
def test_one_training_after_the_other_needs_no_more_memory(tmp_path: Path) -> None:
    held = []
    for number in range(4):
        trained(tmp_path / str(number), labels_task(), until=3)
        held.append(torch.cuda.memory_allocated())
    assert held[3] <= held[0]


@pytest.mark.gpu
def test_a_gpu_sees_the_batches_of_the_cpu_in_the_same_order(tmp_path: Path) -> None:
    seen: dict[str, list[Tensor]] = {"cpu": [], "cuda": []}
    for device, found in seen.items():
        task = labels_task(capturable=False)

        def batch(pixels: Tensor, indices: Tensor, draws: Draws, *, task: Task = task, found: Any = found) -> Any:
            made = task.batch(pixels, indices, draws)
            found.append(torch.cat([made[0].flatten(1).cpu(), made[1][:, None].cpu()], dim=1))
            return made

        trained(tmp_path / device, replace(task, batch=batch), until=2, device=device)
    for ours, theirs in zip(seen["cpu"], seen["cuda"], strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["rotation", "colorization", "dino"])
def test_a_compiled_training_computes_the_same_up_to_rounding_and_a_resumed_one_is_compiled_too(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilation, "SKIPPED_STEPS", 1)
    monkeypatch.setattr(compilation, "TIMED_STEPS", 1)
    task, said = test_pretext.task_of(kind), []

    def keep(epoch: int, metrics: dict[str, float], save: loop.Save) -> None:
        if epoch == 3:
            save(tmp_path / f"checkpoint {len(said)}")

    losses = {}
    for compiled in (False, True):
        monkeypatch.setattr(compilation, "pays", lambda seconds, compiled=compiled: compiled)
        with conditions.collecting() as noted:
            found = trained(tmp_path / str(compiled), task, until=5, on_epoch=keep, lr=0.001)
        said.append(noted["training"])
        losses[compiled] = float(found["metric loss"])
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert said == [{"cuda_graph": True, "compiled": False}, {"cuda_graph": True, "compiled": True}]
    assert not snapshot.was_compiled(tmp_path / "checkpoint 0")
    assert snapshot.was_compiled(tmp_path / "checkpoint 1")
    assert not snapshot.was_compiled(tmp_path / "True"), "the next training of a chain decides for itself"
    with conditions.collecting() as noted:
        resumed = trained(tmp_path / "resumed", task, until=5, start=tmp_path / "checkpoint 1", lr=0.001)
    assert noted["training"]["compiled"]
    assert float(resumed["metric loss"]) == pytest.approx(losses[True], rel=1e-3)
