import gc
import json
import math
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from safetensors.torch import load_file, save_file
from torch import nn

from ktray import plugins
from ktray.errors import UserError
from ktray.spec import Augment, Schedule
from ktray.training import batches, classification, loop, pretrained, snapshot
from tests.toy_images import toy_images

torch.set_num_threads(1)

BACKBONE = plugins.parse("backbone", {"kind": "alexnet", "width": 0.125})
IMAGES = toy_images(50, size=16)
FILES = ("weights.safetensors", "optimizer.safetensors", "history.parquet", "state.json")


def labels_task(**changes):
    task = classification.task(IMAGES.labels, 4, Augment(crop=2, flip=True))
    return replace(task, **changes)


def dropout_task():
    return labels_task(head=lambda width: nn.Sequential(nn.Dropout(0.5), nn.Linear(width, 4)))


def run(out, until, start=None, *, task=None, images=IMAGES, seed=3, on_epoch=None, **schedule):
    settings = {"kind": "warmup_stable", "epochs": 8, "lr": 0.05, "batch_size": 16, **schedule}
    backbone = loop.untrained_backbone(BACKBONE, seed)
    return loop.fit(
        backbone,
        task or labels_task(),
        images,
        Schedule(**settings),
        seed,
        out=out,
        until=until,
        start=start,
        on_epoch=on_epoch,
    )


def assert_same_snapshot(one: Path, other: Path):
    for name in FILES:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


TRAININGS = {
    "constant sgd": {"kind": "constant"},
    "sgd with warmup and decay": {"warmup": 1.5, "decay": 0.5},
    "adamw": {"optimizer": "adamw", "lr": 0.003, "decay": 0.25},
    "cosine": {"kind": "cosine", "warmup": 1.0},
    "no momentum": {"kind": "constant", "momentum": 0.0},
    "dropout": {"task": dropout_task()},
}


@pytest.mark.parametrize("settings", TRAININGS.values(), ids=TRAININGS.keys())
def test_splitting_a_training_changes_no_bit_of_weights_optimiser_or_history(tmp_path, settings):
    whole = run(tmp_path / "8", 8, **settings)
    for middle in (0, 3, 5):
        run(tmp_path / f"{middle}", middle, **settings)
        parts = run(tmp_path / f"{middle}-8", 8, tmp_path / f"{middle}", **settings)
        assert parts == whole
        assert_same_snapshot(tmp_path / f"{middle}-8", tmp_path / "8")


def test_an_intermediate_snapshot_equals_the_last_one_of_a_shorter_training(tmp_path):
    def keep(epoch, metrics, write):
        if epoch == 3:
            write(tmp_path / "on the way")

    run(tmp_path / "5", 5, on_epoch=keep)
    run(tmp_path / "3", 3)
    assert_same_snapshot(tmp_path / "on the way", tmp_path / "3")


def test_a_callback_that_evaluates_and_draws_does_not_disturb_the_training(tmp_path):
    backbone = loop.untrained_backbone(BACKBONE, 3)
    schedule = Schedule(epochs=3, lr=0.05, batch_size=16)

    def meddle(epoch, metrics, write):
        backbone.eval()
        torch.rand(17)

    loop.fit(backbone, dropout_task(), IMAGES, schedule, 3, out=tmp_path / "watched", until=3, on_epoch=meddle)
    run(tmp_path / "alone", 3, task=dropout_task(), epochs=3)
    assert_same_snapshot(tmp_path / "watched", tmp_path / "alone")


def test_trunk_snapshots_of_trainings_of_different_length_are_the_same(tmp_path):
    short, long = {"epochs": 4, "decay": 0.5, "warmup": 1.0}, {"epochs": 9, "decay": 0.0, "warmup": 1.0}
    run(tmp_path / "short", 2, **short)
    run(tmp_path / "long", 2, **long)
    assert_same_snapshot(tmp_path / "short", tmp_path / "long")
    slices = [loop.snapshot_slice(Schedule(lr=0.1, **settings), 2) for settings in (short, long)]
    assert slices[0] == slices[1]
    branch = loop.snapshot_slice(Schedule(lr=0.1, **short), 3)
    assert branch["epochs"] == 4
    assert branch["decay"] == 0.5


def test_a_schedule_that_depends_on_its_total_has_it_in_every_slice():
    cosine = Schedule(kind="cosine", epochs=8, lr=0.1)
    assert loop.snapshot_slice(cosine, 1)["epochs"] == 8
    constant = loop.snapshot_slice(Schedule(kind="constant", epochs=8, lr=0.1), 8)
    assert "epochs" not in constant
    assert constant["lr"] == 0.1
    assert constant["kind"] == "constant"


def test_the_learning_rate_warms_up_stays_constant_and_decays_to_zero():
    schedule = Schedule(epochs=10, lr=0.4, warmup=2.0, decay=0.3)
    rates = [loop.lr_at(schedule, position) for position in (0.0, 1.0, 2.0, 7.0, 8.5, 10.0)]
    assert rates == pytest.approx([0.0, 0.2, 0.4, 0.4, 0.2, 0.0])


def test_cosine_rates_agree_with_pytorch():
    schedule = Schedule(kind="cosine", epochs=7, lr=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=7)
    for epoch in range(8):
        assert loop.lr_at(schedule, float(epoch)) == pytest.approx(oracle.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        oracle.step()


def test_the_loss_falls_and_the_history_has_all_epochs(tmp_path):
    run(tmp_path / "4", 4)
    last = run(tmp_path / "8", 8, tmp_path / "4")
    history = parquet.read_table(tmp_path / "8" / "history.parquet").to_pydict()
    assert history["epoch"] == list(range(1, 9))
    assert list(history) == ["epoch", "loss", "lr", "top1"]
    assert history["loss"][-1] < 0.5 * history["loss"][0]
    assert last == {name: values[-1] for name, values in history.items() if name != "epoch"}
    assert last["top1"] > 0.6
    assert json.loads((tmp_path / "8" / "state.json").read_text()) == {"epoch": 8}


def test_epoch_zero_has_the_initial_weights(tmp_path):
    assert run(tmp_path, 0) == {}
    drawn = loop.untrained_backbone(BACKBONE, 3).state_dict()
    saved = load_file(tmp_path / "weights.safetensors")
    assert {name for name in saved if name.startswith("head.")} == {"head.weight", "head.bias"}
    for name, tensor in drawn.items():
        assert torch.equal(saved[f"backbone.{name}"], tensor)


def test_the_memory_of_a_finished_training_is_free_at_once(tmp_path):
    backbone = loop.untrained_backbone(BACKBONE, 3)
    watched = weakref.ref(backbone.conv1[0].weight)
    gc.disable()
    try:
        loop.fit(backbone, labels_task(), IMAGES, Schedule(epochs=1), 3, out=tmp_path, until=1)
        del backbone
        assert watched() is None
    finally:
        gc.enable()


def test_untrained_backbone_and_fit_do_not_change_the_random_state_of_the_caller(tmp_path):
    torch.manual_seed(11)
    expected = torch.rand(4)
    torch.manual_seed(11)
    run(tmp_path, 1)
    assert torch.equal(torch.rand(4), expected)


def test_another_seed_gives_other_weights():
    one, same, other = (loop.untrained_backbone(BACKBONE, seed).state_dict()["conv1.0.weight"] for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize(("count", "seen"), [(32, [16, 16]), (33, [16, 16]), (34, [16, 16, 2])])
def test_a_small_last_batch_is_kept_unless_it_is_a_single_image(tmp_path, count, seen):
    sizes = []
    task = labels_task(keep=torch.arange(count))
    run(tmp_path, 1, task=replace(task, batch=lambda p, i, d: (sizes.append(len(i)), task.batch(p, i, d))[1]))
    assert sizes == seen


def test_only_kept_images_are_seen_each_once_and_in_another_order_every_epoch(tmp_path):
    seen = []
    keep = torch.tensor([1, 2, 5, 8, 13, 21, 34, 49])
    task = labels_task(keep=keep)

    def watch(pixels, indices, draws):
        assert np.array_equal(pixels.numpy(), IMAGES.read(indices.numpy()))
        seen.append(indices)
        return task.batch(pixels, indices, draws)

    run(tmp_path, 2, task=replace(task, batch=watch), batch_size=8)
    assert [sorted(indices.tolist()) for indices in seen] == [keep.tolist()] * 2
    assert not torch.equal(seen[0], seen[1])


def test_images_that_do_not_fit_on_the_device_give_bitwise_equal_weights(tmp_path, monkeypatch):
    run(tmp_path / "resident", 2)
    readers = set()

    def read(indices):
        readers.add(threading.get_ident())
        assert len(indices) <= 16
        return IMAGES.read(indices)

    monkeypatch.setitem(batches.RESIDENT_BYTES, "cpu", 1000)
    run(tmp_path / "streamed", 2, images=replace(IMAGES, read=read))
    assert_same_snapshot(tmp_path / "resident", tmp_path / "streamed")
    assert threading.get_ident() not in readers


def test_weights_decay_but_biases_and_norms_do_not(tmp_path):
    task = labels_task(loss=lambda outputs, targets: (0.0 * outputs.sum(), {}))
    run(tmp_path / "0", 0, task=task)
    run(tmp_path / "1", 1, task=task, weight_decay=0.1, momentum=0.0)
    before, after = (load_file(tmp_path / epoch / "weights.safetensors") for epoch in ("0", "1"))
    for name in ("backbone.conv1.0.weight", "head.weight"):
        assert after[name].norm() < before[name].norm()
    for name in ("backbone.conv1.1.weight", "head.bias"):
        assert torch.equal(after[name], before[name])


def test_after_step_sees_the_model_after_every_step(tmp_path):
    calls = []
    run(tmp_path, 2, task=labels_task(after_step=lambda model: calls.append(sorted(model))), batch_size=25)
    assert calls == [["backbone", "head"]] * 4


def test_a_loss_that_is_not_finite_names_its_epoch(tmp_path):
    def explode(outputs, targets):
        loss, metrics = classification.cross_entropy(outputs, targets)
        return loss * (1.0 if torch.is_grad_enabled() and len(steps) < 6 else math.inf), metrics

    steps = []
    task = labels_task(loss=explode, after_step=lambda model: steps.append(1))
    with pytest.raises(ValueError, match="the loss of epoch 2 is"):
        run(tmp_path, 4, task=task)


def test_impossible_trainings_are_refused(tmp_path):
    run(tmp_path / "3", 3)
    with pytest.raises(ValueError, match="between the start, 3, and the total, 8"):
        run(tmp_path / "out", 2, tmp_path / "3")
    with pytest.raises(ValueError, match="total, 8"):
        run(tmp_path / "out", 9)
    with pytest.raises(ValueError, match="two images or more, and 1 of 50"):
        run(tmp_path / "out", 1, task=labels_task(keep=torch.tensor([7])))


def test_load_backbone_reads_a_snapshot_and_refuses_that_of_another_network(tmp_path):
    run(tmp_path, 1)
    backbone = loop.untrained_backbone(BACKBONE, 99)
    snapshot.load_backbone(backbone, tmp_path)
    saved = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(saved[f"backbone.{name}"], tensor) for name, tensor in backbone.state_dict().items())
    with pytest.raises(RuntimeError, match="conv1"):
        snapshot.load_backbone(
            loop.untrained_backbone(plugins.parse("backbone", {"kind": "alexnet", "width": 0.25}), 0), tmp_path
        )


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_torchvision_weights_are_imported_without_their_classifier(tmp_path, ending):
    from torchvision.models import resnet18

    oracle = resnet18(num_classes=7).eval()
    file = tmp_path / f"weights.{ending}"
    if ending == "pth":
        torch.save({"state_dict": {f"module.{n}": w for n, w in oracle.state_dict().items()}}, file)
    else:
        save_file(oracle.state_dict(), file)
    spec = plugins.parse("backbone", {"kind": "resnet", "form": "full"})
    assert pretrained.import_weights(spec, file, tmp_path / "out") == sum(p.numel() for p in oracle.parameters()) - 512 * 7 - 7
    backbone = loop.untrained_backbone(spec, 0).eval()
    snapshot.load_backbone(backbone, tmp_path / "out")
    pixels = torch.randn(2, 3, 64, 64)
    assert torch.allclose(oracle.fc(backbone(pixels)), oracle(pixels), atol=1e-5)


def test_a_checkpoint_that_is_missing_foreign_or_executable_is_a_user_error(tmp_path):
    spec = plugins.parse("backbone", "alexnet")
    with pytest.raises(UserError, match=r"no file absent\.pth"):
        pretrained.import_weights(spec, tmp_path / "absent.pth", tmp_path / "out")
    save_file({"conv1.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"has no conv1\.1\.weight of shape \(64,\)"):
        pretrained.import_weights(spec, tmp_path / "part.safetensors", tmp_path / "out")
    torch.save({"state_dict": threading.Thread}, tmp_path / "object.pth")
    with pytest.raises(UserError, match="contains no named tensors"):
        pretrained.import_weights(spec, tmp_path / "object.pth", tmp_path / "out")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(UserError, match="is a text file that begins with 'not tensors'"):
        pretrained.import_weights(spec, tmp_path / "text.safetensors", tmp_path / "out")


def test_bfloat16_trains_in_segments_too_and_stays_near_float32(tmp_path):
    losses = {}
    for precision in ("float32", "bfloat16"):
        whole, half, rest = (tmp_path / f"{precision} {name}" for name in ("whole", "half", "rest"))
        settings = {"kind": "constant", "lr": 0.002, "precision": precision}
        run(whole, 4, **settings)
        run(half, 2, **settings)
        run(rest, 4, half, **settings)
        assert_same_snapshot(rest, whole)
        losses[precision] = parquet.read_table(whole / "history.parquet")["loss"].to_pylist()
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_gpu_trains_in_segments_too_and_agrees_with_the_cpu_within_rounding(tmp_path, optimizer):
    schedule = Schedule(kind="constant", epochs=4, lr=0.002, batch_size=16, optimizer=optimizer)
    losses = {}
    for device in ("cpu", "cuda"):
        for begin, end in ((0, 2), (2, 4)):
            start = tmp_path / f"{device}{begin}" if begin else None
            backbone = loop.untrained_backbone(BACKBONE, 0)
            out = tmp_path / f"{device}{end}"
            loop.fit(backbone, labels_task(), IMAGES, schedule, 0, out=out, until=end, start=start, device=device)
        losses[device] = parquet.read_table(tmp_path / f"{device}4" / "history.parquet")["loss"].to_pylist()
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02)


def test_a_task_may_define_the_order_of_an_epoch(tmp_path):
    seen = []
    keep = torch.tensor([1, 2, 5, 8])

    def watch(pixels, indices, draws):
        assert np.array_equal(pixels.numpy(), IMAGES.read(indices.numpy()))
        seen.append(indices)
        return labels_task().batch(pixels, indices, draws)

    def order(generator):
        return keep[torch.randint(4, (4,), generator=generator)]

    run(tmp_path / "2", 2, task=labels_task(keep=keep, order=order, batch=watch), batch_size=4)
    drawn = [torch.cat(seen[:1]).tolist(), torch.cat(seen[1:]).tolist()]
    assert drawn[0] != drawn[1]
    seen.clear()
    run(tmp_path / "1", 1, task=labels_task(keep=keep, order=order, batch=watch), batch_size=4)
    run(tmp_path / "1-2", 2, tmp_path / "1", task=labels_task(keep=keep, order=order, batch=watch), batch_size=4)
    assert [indices.tolist() for indices in seen] == drawn
    assert_same_snapshot(tmp_path / "1-2", tmp_path / "2")


@pytest.mark.parametrize("wrong", [[1, 2, 5], [1, 2, 5, 7], [1, 2, 5, 49]])
def test_an_order_of_other_images_is_refused(tmp_path, wrong):
    task = labels_task(keep=torch.tensor([1, 2, 5, 8]), order=lambda generator: torch.tensor(wrong))
    with pytest.raises(ValueError, match="must name 4 of the 4 images"):
        run(tmp_path, 1, task=task)
