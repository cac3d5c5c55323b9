"""Similarity to a queue and regression of maps: formulas by hand, targets that follow the views, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, softmax
from torch import nn

from ktray.errors import UserError
from ktray.ops import augmentation
from ktray.pipeline.execute import execute
from ktray.pipeline.identity import data_identity
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.pipeline.pair_graph import build
from ktray.pool import StageContext
from ktray.scheduler.local_scheduler import LocalScheduler
from ktray.spec import Augment
from ktray.stores.file import FileStore
from ktray.training import feature_maps, loop, teacher_queue
from ktray.training.feature_maps import PositionHead
from ktray.training.task import Features, Targets
from ktray.transfer import queue_and_spatial, queue_similarity, spatial_regression
from tests.networks import BACKBONE
from tests.toys import HOG, ROTATION, STUDENT, toy_pair

torch.set_num_threads(1)

MAPS = {**ROTATION, "pool": {"grid": 3}}


def rows(count=40, width=12, seed=0):
    return np.random.default_rng(seed).normal(0.3, 1, (count, width)).astype(np.float32)


def unit(array):
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_the_loss_of_a_queue_is_scipys_divergence_over_the_images_that_were_drawn():
    found = rows()
    spec = queue_similarity.Spec(queue=16, temperature=0.1, teacher_temperature=0.05)
    task = queue_similarity.task(spec, Targets(40, features=Features((found[:25], found[25:]))), Augment(crop=0))
    indices = torch.tensor([3, 30, 7])
    draws = task.draw(indices, torch.Generator().manual_seed(0))
    _, targets = task.batch(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), indices, draws)
    outputs = torch.from_numpy(rows(3, seed=1))
    loss, metrics = task.loss(outputs, targets)
    bank = unit(found[draws["queue"].numpy()])
    teacher = softmax(unit(found[indices.numpy()]) @ bank.T / 0.05, axis=1)
    student = softmax(unit(outputs.numpy()) @ bank.T / 0.1, axis=1)
    assert float(loss) == pytest.approx(rel_entr(teacher, student).sum(axis=1).mean(), rel=1e-4)
    assert float(metrics["nearest"]) == pytest.approx((teacher.argmax(1) == student.argmax(1)).mean())
    assert len(draws["queue"]) == 16
    again = task.draw(indices, torch.Generator().manual_seed(1))
    assert not torch.equal(draws["queue"], again["queue"]), "the queue changes from step to step"


def test_features_that_do_not_fit_on_a_device_cannot_be_queued(monkeypatch):
    monkeypatch.setattr("ktray.training.task.RESIDENT_BYTES", 100)
    with pytest.raises(UserError, match="Use 'similarity'"):
        teacher_queue.require_resident(Features((rows(),)))


VIEWS = [
    Augment(crop=2),
    Augment(crop=0, flip=True),
    Augment(crop=3, flip=True),
    Augment(area=0.4),
    Augment(area=0.3, flip=True),
]


@pytest.mark.parametrize("augment", VIEWS)
def test_a_map_as_fine_as_the_image_follows_its_view_pixel_by_pixel(augment):
    ramp = (torch.arange(16.0)[:, None] * 9 + torch.arange(16.0) * 5).round()
    pixels = torch.stack([ramp, ramp.T, 255 - ramp], dim=2).to(torch.uint8).expand(20, -1, -1, -1).contiguous()
    draws = augmentation.draw_views(20, augment, torch.Generator().manual_seed(0))
    expected = augmentation.random_views(pixels, augment, draws).permute(0, 3, 1, 2).float()
    found = feature_maps.view_of_maps(pixels.permute(0, 3, 1, 2).float(), augment, draws, 16)
    inner = (slice(None), slice(None), slice(3, -3), slice(3, -3))  # a padded crop is black outside, a map has its border there
    assert not torch.equal(found, pixels.permute(0, 3, 1, 2).float())
    torch.testing.assert_close(found[inner], expected[inner], atol=0.51, rtol=0)


def test_maps_are_standardised_over_all_images_and_positions():
    found = rows(30, 5 * 9)
    maps = feature_maps.standardised(Features((found,)), 3, True)(torch.from_numpy(found)).numpy()
    assert maps.shape == (30, 5, 3, 3)
    np.testing.assert_allclose(maps.mean(axis=(0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(maps.std(axis=(0, 2, 3)), 1, atol=1e-4)
    plain = feature_maps.standardised(Features((found,)), 3, False)(torch.from_numpy(found)).numpy()
    np.testing.assert_allclose(plain, found.reshape(30, 5, 3, 3))
    with pytest.raises(ValueError, match="no maps of 2 x 2"):
        feature_maps.channels(Features((found,)), 2)


@pytest.mark.parametrize(("side", "grid"), [(6, 3), (3, 3), (2, 4)])
def test_the_head_is_a_linear_layer_at_each_position_of_the_resized_map(side, grid):
    head = PositionHead(5, grid, None)
    head.project = nn.Conv2d(4, 5, 1)
    maps = torch.randn(2, 4, side, side)
    resize = nn.functional.adaptive_avg_pool2d if side >= grid else nn.functional.interpolate
    resized = resize(maps, grid) if side >= grid else resize(maps, (grid, grid), mode="bilinear")
    weight, bias = head.project.weight[:, :, 0, 0], head.project.bias
    torch.testing.assert_close(head(maps), torch.einsum("ow,bwyx->boyx", weight, resized) + bias[:, None, None])


def outputs_of(task, pixels):
    """Outputs of a fresh model in evaluation mode, and the targets, for images 0, 1, ..."""
    indices = torch.arange(len(pixels))
    torch.manual_seed(0)
    backbone = loop.untrained_backbone(BACKBONE, 0)
    model = nn.ModuleDict({"backbone": backbone, "head": task.head(int(backbone.feature_dim))})
    task.prepare(model)
    assert any(parameter.requires_grad for parameter in model["head"].parameters())
    inputs, wanted = task.batch(pixels, indices, task.draw(indices, torch.Generator().manual_seed(0)))
    with torch.no_grad():
        return task.forward(model.eval(), inputs), wanted


def test_the_spatial_loss_is_the_mean_squared_error_and_both_losses_are_added():
    found, pixels = rows(20, 4 * 9), torch.randint(0, 256, (6, 28, 28, 3), dtype=torch.uint8)
    targets = Targets(20, features=Features((found,)), size=28)
    spatial = spatial_regression.task(spatial_regression.Spec(grid=3, standardise=False), targets, Augment(crop=0))
    outputs, wanted = outputs_of(spatial, pixels)
    by_hand = ((outputs.numpy() - found[:6].reshape(6, 4, 3, 3)) ** 2).mean()
    assert float(spatial.loss(outputs, wanted)[0]) == pytest.approx(float(by_hand), rel=1e-4)
    spec = queue_and_spatial.Spec(grid=3, standardise=False, queue=8, spatial=2.0, hidden=(16,))
    both = queue_and_spatial.task(spec, targets, Augment(crop=0))
    outputs, wanted = outputs_of(both, pixels)
    loss, metrics = both.loss(outputs, wanted)
    whole = found.reshape(20, 4, 9).mean(axis=2)
    bank = unit(whole[wanted[0, -8:].long().numpy()])
    teacher, student = (softmax(unit(each) @ bank.T / 0.04, axis=1) for each in (whole[:6], outputs[:, :4].numpy()))
    error = ((outputs[:, 4:].numpy() - found[:6]) ** 2).mean()
    assert float(loss) == pytest.approx(rel_entr(teacher, student).sum(axis=1).mean() + 2 * error, rel=1e-3)
    assert metrics.keys() == {"nearest", "cosine"}


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"teacher": HOG}, "transfer.grid", "no maps"),
    ({"teacher": ROTATION}, "transfer.grid", "pooled to grid=1, and grid=3 is learnt"),
    ({"teacher": {**MAPS, "layer": None}}, "transfer.grid", "no maps"),
    ({"transfer": {"kind": "spatial_regression", "grid": 3, "layer": "conv9"}}, "transfer.layer", "no layer 'conv9'"),
]


@pytest.mark.parametrize(("changes", "where", "said"), REFUSED)
def test_networks_that_do_not_go_together_are_refused_in_the_plan(changes: dict[str, Any], where: str, said: str) -> None:
    pair = toy_pair(**{"teacher": MAPS, "transfer": {"kind": "spatial_regression", "grid": 3}, **changes})
    with pytest.raises(UserError) as refused:
        check_pair(pair, data_loader())
    assert refused.value.where == where or said == "no maps"
    assert said in str(refused.value) or "finer than the features" in str(refused.value)


def test_randaugment_is_refused_where_targets_have_positions() -> None:
    with pytest.raises(ValueError, match="cannot follow; leave it out"):
        toy_pair(teacher=MAPS, transfer="spatial_regression", student={**STUDENT, "augment": {"randaugment": {}}})


@pytest.mark.parametrize("kind", ["spatial_regression", "queue_and_spatial"])
def test_a_student_learns_the_map_of_its_teacher_from_flipped_and_cropped_views(kind: str, tmp_path: Path) -> None:
    transfer = {"kind": kind, "grid": 3, **({"queue": 32} if kind != "spatial_regression" else {})}
    student = {**STUDENT, "augment": {"crop": 2, "flip": True}}
    pair = toy_pair(teacher=MAPS, transfer=transfer, student=student, evals=[])
    check_pair(pair, data_loader())
    graph, store = build(pair, data_identity()), FileStore(tmp_path)
    LocalScheduler(store, execute, StageContext(), lambda event: None).obtain(list(graph.stages), "test")
    made = store.find(graph.keys["student"])
    assert made is not None
    assert made.metrics["cosine"] > 0.1
