"""DINO: the loss equals explicit loops; views; target and centre follow the network and survive snapshots."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ktray.ops.colour import Jitter
from ktray.ops.distortions import Distortions
from ktray.pretext import dino
from ktray.spec import Schedule
from ktray.training import loop, snapshot
from ktray.training.task import make_batch
from tests.networks import BACKBONE, model_of
from tests.toy_images import toy_images

torch.set_num_threads(1)

SMALL = {"answers": 32, "hidden": 16, "bottleneck": 8, "local": 2}


def run(out, until, start=None, count=48, lr=2e-3, **fields):
    metrics = []
    loop.fit(
        loop.untrained_backbone(BACKBONE, 0),
        dino.task(dino.Spec(**{**SMALL, **fields}), 28),
        toy_images(count),
        Schedule(epochs=12, lr=lr, batch_size=count // 3, optimizer="adamw"),
        0,
        out=out,
        until=until,
        start=start,
        on_epoch=lambda epoch, found, write: metrics.append(found),
    )
    return metrics


def test_the_loss_equals_its_formula():
    rng = np.random.default_rng(0)
    own, wanted = rng.normal(size=(3, 4, 6)), rng.normal(size=(3, 2, 6))
    total, pairs = 0.0, 0
    for image in range(3):
        for t in range(2):
            p = np.exp(wanted[image, t]) / np.exp(wanted[image, t]).sum()
            for v in range(4):
                if v != t:
                    q = np.exp(own[image, v]) / np.exp(own[image, v]).sum()
                    total -= sum(float(p[k]) * math.log(q[k]) for k in range(6))
                    pairs += 1
    assert pairs == 3 * 6
    ours = torch.from_numpy(own).requires_grad_()
    theirs = torch.from_numpy(wanted).requires_grad_()
    loss, _ = dino.agreement(ours, theirs)
    assert float(loss.detach()) == pytest.approx(total / pairs, rel=1e-5)
    loss.backward()
    assert ours.grad.abs().sum() > 0
    assert theirs.grad is None


def test_entropy_is_low_after_a_collapse_and_high_if_all_outputs_are_used():
    own = torch.zeros(8, 3, 8)
    one = torch.zeros(8, 2, 8)
    one[..., 3] = 100
    assert float(dino.agreement(own, one)[1]["entropy"]) == pytest.approx(0, abs=1e-4)
    each = 100 * torch.eye(8)[:, None].expand(8, 2, 8)
    assert float(dino.agreement(own, each)[1]["entropy"]) == pytest.approx(1, abs=1e-4)


def test_the_first_two_views_show_most_of_an_image_and_the_others_a_part():
    images = np.zeros((200, 32, 32, 3), np.uint8)
    images[..., 0], images[..., 1] = np.arange(32)[:, None] * 8, np.arange(32) * 8  # red tells the row, green the column
    plain = {"flip": False, "jitter": Jitter(share=0), "grey": 0.0}
    spec = dino.Spec(local=3, whole=Distortions(area=0.4, **plain), part=Distortions(area=0.1, most=0.4, **plain))
    inputs, _ = make_batch(dino.task(spec, 32), torch.from_numpy(images), torch.arange(200), torch.Generator().manual_seed(0))
    shown = ((inputs + 2) * 255 / 4 / 8).unflatten(0, (200, 5))
    rows = (shown[:, :, 0, -1] - shown[:, :, 0, 0]).mean(-1) + 1  # pixels of the image that a view spans
    columns = (shown[:, :, 1, :, -1] - shown[:, :, 1, :, 0]).mean(-1) + 1
    shares = rows * columns / 32**2
    assert shares[:, :2].min() > 0.35
    assert shares[:, :2].max() > 0.9
    assert shares[:, 2:].min() < 0.15
    assert shares[:, 2:].max() < 0.48


def test_a_part_larger_than_the_whole_is_refused():
    with pytest.raises(ValueError, match=r"is larger than most=0\.2"):
        Distortions(area=0.5, most=0.2)


def test_the_target_sees_only_global_views_and_its_outputs_are_centred_and_sharpened():
    task = dino.task(dino.Spec(**SMALL), 28)
    model = model_of(task)
    head = model["head"]
    head.centre.uniform_(-1, 1)
    with torch.no_grad():
        for moving in head.target.parameters():
            moving.mul_(0.7)
    inputs = torch.randn(12, 3, 28, 28)  # three images of four views
    outputs = task.forward(model, inputs)
    assert outputs.shape == (3, 4 + 2, 32)
    seen = inputs[[0, 1, 4, 5, 8, 9]]
    target = head.target["projector"](head.target["backbone"](seen))
    torch.testing.assert_close(outputs[:, 4:].flatten(0, 1), (target - head.centre) / 0.04)
    torch.testing.assert_close(outputs[:, :4].flatten(0, 1), head.projector(model["backbone"](inputs)) / 0.1)
    task.loss(outputs, torch.arange(3))[0].backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, _ in model.named_parameters() if ".target." not in name}


def test_a_step_moves_target_and_centre_by_their_decay():
    task = dino.task(dino.Spec(**SMALL, decay=0.75, centre_decay=0.6), 28)
    model = model_of(task)
    head = model["head"]
    outputs = task.forward(model, torch.randn(8, 3, 28, 28))
    said = (outputs[:, 4:] * 0.04).mean(dim=(0, 1)).detach()  # the centre was zero
    first = head.target["projector"].answers.clone()
    with torch.no_grad():
        head.projector.answers.add_(1)
    task.after_step(model)
    torch.testing.assert_close(head.target["projector"].answers, first + 0.25)
    torch.testing.assert_close(head.centre, 0.4 * said)


def test_dino_in_segments_equals_dino_at_once_because_snapshots_hold_target_and_centre(tmp_path):
    run(tmp_path / "whole", 2)
    run(tmp_path / "half", 1)
    run(tmp_path / "rest", 2, tmp_path / "half")
    for name in ("weights.safetensors", "optimizer.safetensors", "history.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "rest" / name).read_bytes(), name
    weights = load_file(tmp_path / "whole" / "weights.safetensors")
    assert weights["head.centre"].abs().max() > 0
    assert "head.target.projector.answers" in weights
    snapshot.load_backbone(loop.untrained_backbone(BACKBONE, 1), tmp_path / "whole")  # the backbone alone, strictly


def test_a_network_learns_to_match_its_moving_average_without_collapsing(tmp_path):
    metrics = run(tmp_path, 12, count=96, lr=5e-3, hidden=32, bottleneck=16, decay=0.95, target_temperature=0.07)
    assert metrics[-1]["loss"] < 0.9 * metrics[0]["loss"]
    assert metrics[-1]["entropy"] > 0.5
