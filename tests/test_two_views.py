"""SimCLR and BYOL: losses equal independently written formulas, and BYOL's target survives snapshots."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ktray.pretext import byol, simclr
from ktray.spec import Schedule
from ktray.training import loop, snapshot
from tests.networks import BACKBONE, model_of
from tests.toy_images import toy_images

torch.set_num_threads(1)

SMALL = {"hidden": 16, "width": 8}


def run(task, out: Path, until: int, start: Path | None = None, count: int = 24, **schedule):
    metrics = []
    loop.fit(
        loop.untrained_backbone(BACKBONE, 0),
        task,
        toy_images(count, size=28),
        Schedule(**{"epochs": 8, "lr": 0.02, "batch_size": 12, **schedule}),
        0,
        out=out,
        until=until,
        start=start,
        on_epoch=lambda epoch, found, write: metrics.append(found),
    )
    return metrics


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_the_loss_of_simclr_equals_its_formula(temperature):
    outputs = np.random.default_rng(0).normal(size=(12, 5))
    total, hits = 0.0, 0
    for i in range(12):
        j = i + 1 if i % 2 == 0 else i - 1
        like = [float(a @ b / math.sqrt((a @ a) * (b @ b))) for a in [outputs[i]] for b in outputs]
        others = sum(math.exp(like[k] / temperature) for k in range(12) if k != i)
        total -= math.log(math.exp(like[j] / temperature) / others)
        hits += max((k for k in range(12) if k != i), key=lambda k, like=like: like[k]) == j
    loss, metrics = simclr.nt_xent(torch.from_numpy(outputs), temperature)
    assert float(loss) == pytest.approx(total / 12, rel=1e-5)
    assert float(metrics["top1"]) == pytest.approx(hits / 12)


def test_simclr_is_lowest_when_views_of_an_image_agree_and_all_others_are_far():
    twice = torch.eye(6).repeat_interleave(2, dim=0)
    best, metrics = simclr.nt_xent(twice, 0.5)
    assert float(best) == pytest.approx(-math.log(math.exp(2) / (math.exp(2) + 10)), rel=1e-5)
    assert metrics["top1"] == 1
    collapsed, _ = simclr.nt_xent(torch.ones(12, 6), 0.5)
    assert float(collapsed) == pytest.approx(math.log(11), rel=1e-5)


def test_the_loss_of_byol_equals_its_formula_and_its_target_gets_no_gradient():
    predictions = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    projections = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    loss, _ = byol.regression(predictions, projections)
    cosine = nn.CosineSimilarity(dim=0)
    total = sum(
        2 - 2 * cosine(predictions[2 * i], projections[2 * i + 1]) + 2 - 2 * cosine(predictions[2 * i + 1], projections[2 * i])
        for i in range(4)
    )
    assert float(loss.detach()) == pytest.approx(float(total.detach()) / 4, rel=1e-5)
    loss.backward()
    assert predictions.grad.abs().sum() > 0
    assert projections.grad is None


def test_spread_is_zero_after_a_collapse_and_one_over_a_full_sphere():
    predictions = torch.zeros(400, 16)
    assert byol.regression(predictions, torch.ones(400, 16))[1]["spread"] == 0
    assert float(byol.regression(predictions, torch.randn(400, 16))[1]["spread"]) == pytest.approx(1, abs=0.05)


def test_the_target_starts_equal_to_the_network_and_follows_it_by_a_share_of_every_step():
    task = byol.task(byol.Spec(decay=0.9, **SMALL), 28)
    model = model_of(task)
    pairs = list(zip(model["backbone"].parameters(), model["head"].target["backbone"].parameters(), strict=True))
    pairs += zip(model["head"].projector.parameters(), model["head"].target["projector"].parameters(), strict=True)
    assert all(torch.equal(own, moving) and not moving.requires_grad for own, moving in pairs)
    begun = [moving.clone() for _, moving in pairs]
    with torch.no_grad():
        for own, _ in pairs:
            own.add_(1)
    for _ in range(2):
        task.after_step(model)
    for (own, moving), first in zip(pairs, begun, strict=True):
        torch.testing.assert_close(moving, 0.81 * first + 0.19 * own.detach())


def test_the_prediction_target_comes_from_the_moving_average_and_only_the_network_learns():
    task = byol.task(byol.Spec(**SMALL), 28)
    model = model_of(task)
    with torch.no_grad():
        for moving in model["head"].target.parameters():
            moving.mul_(0.5)
    inputs = torch.randn(8, 3, 28, 28)
    outputs = task.forward(model, inputs)
    target = model["head"].target
    torch.testing.assert_close(outputs[:, 8:], target["projector"](target["backbone"](inputs)))
    task.loss(outputs, torch.arange(4))[0].backward()
    learns = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learns == {name for name, _ in model.named_parameters() if ".target." not in name}


def test_byol_in_segments_equals_byol_at_once_because_snapshots_hold_the_target(tmp_path):
    task = byol.task(byol.Spec(**SMALL), 28)
    run(task, tmp_path / "whole", 2)
    run(task, tmp_path / "half", 1)
    run(task, tmp_path / "rest", 2, tmp_path / "half")
    for name in ("weights.safetensors", "optimizer.safetensors", "history.parquet"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "rest" / name).read_bytes(), name
    weights = load_file(tmp_path / "whole" / "weights.safetensors")
    moving, own = (weights[f"{place}backbone.conv1.0.weight"] for place in ("head.target.", ""))
    assert not torch.equal(moving, own)
    buffers = load_file(tmp_path / "whole" / "optimizer.safetensors")
    assert not any(".target." in name for name in buffers)
    assert json.loads((tmp_path / "whole" / "state.json").read_text()) == {"epoch": 2}
    snapshot.load_backbone(loop.untrained_backbone(BACKBONE, 1), tmp_path / "whole")  # the backbone alone, strictly


def test_both_learn_from_views_alone(tmp_path):
    compared = run(simclr.task(simclr.Spec(**SMALL), 28), tmp_path / "simclr", 6, count=48, batch_size=16)
    assert compared[-1]["loss"] < compared[0]["loss"] - 0.3
    assert compared[-1]["top1"] > compared[0]["top1"]
    predicted = run(byol.task(byol.Spec(**SMALL), 28), tmp_path / "byol", 6, count=48, batch_size=16)
    assert predicted[-1]["loss"] < 0.8 * predicted[0]["loss"]
    assert predicted[-1]["spread"] > 0.1
