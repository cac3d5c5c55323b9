"""Fine-tuning of judged networks: draws of labels, frozen layers, crops, and killed trainings that continue."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from ktray import plugins
from ktray.evals import fine_tune, nonlinear_probe
from ktray.fine_tuning import image_classifier
from ktray.images import Images
from ktray.scoring import per_image
from ktray.training import loop
from ktray.training.step_task import Recipe, StepTask
from ktray.training.step_training import SeedResult, Shuffled, seed_metrics
from tests.judged_networks import attempt, judged_network, run_whole_and_killed

pytestmark = pytest.mark.usefixtures("one_thread")


def coloured(count: int, seed: int, classes: int = 3, size: int = 16) -> Images:
    """Images of noise whose class is the brighter channel."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    pixels = rng.integers(0, 120, (count, size, size, 3), dtype=np.uint8)
    pixels[np.arange(count), :, :, labels] += 60
    return Images(count, size, lambda rows: pixels[rows], labels, tuple("abc"[:classes]), tuple(map(str, range(count))))


def judge(kind: str, tmp_path, tries=None, network=None, **fields):
    module = plugins.module("evaluation", kind)
    return module.evaluate(
        module.Spec(**fields),
        features=None,
        train=coloured(60, 0),
        judged=coloured(40, 1),
        pseudo_labels=None,
        out=tmp_path,
        device="cpu",
        network=network or judged_network(),
        attempt=tries or attempt(tmp_path),
    )


FEW = {"share": 0.5, "min_steps": 60, "epochs": 1, "batch_size": 16, "lr": 0.05, "head_factor": 2.0}


def test_fine_tuning_learns_what_the_network_did_not_know_and_gives_an_interval(tmp_path):
    found = judge("fine_tune", tmp_path, seeds=2, **FEW)
    assert found["top1"] > 0.9  # one of three classes by chance
    assert found["labels"] == 30
    assert found["top1_low"] <= found["top1"] <= found["top1_high"]
    assert all(type(value) is float and math.isfinite(value) for value in found.values())


def test_a_killed_fine_tuning_ends_in_the_metrics_of_the_uninterrupted_one(tmp_path):
    few = {**FEW, "min_steps": 110}

    def evaluate(tries):
        return judge("fine_tune", tmp_path, tries, seeds=2, **few)

    whole, continued = run_whole_and_killed(evaluate, tmp_path, kill_at=130)  # in the training of the second seed
    assert continued == whole
    images = per_image.metrics_of(per_image.read(tmp_path / per_image.FILE), None)
    assert images == pytest.approx({name: whole[name] for name in ("top1", "loss")}, abs=1e-12)


def test_a_killed_non_linear_probe_ends_in_the_metrics_of_the_uninterrupted_one(tmp_path):
    fields = {"layer": "conv2", "hidden": (8,), "epochs": 20, "batch_size": 16, "lr": 0.02}

    def evaluate(tries):
        return judge("nonlinear_probe", tmp_path, tries, **fields)

    whole, continued = run_whole_and_killed(evaluate, tmp_path, kill_at=50)
    assert continued == whole
    assert whole["top1"] > 0.6
    assert per_image.metrics_of(per_image.read(tmp_path / per_image.FILE), None) == pytest.approx(whole, abs=1e-12)


@pytest.mark.parametrize("layer", [None, "conv1", "conv3"])
def test_layers_up_to_the_probed_one_stay_and_later_ones_are_new(layer, tmp_path, monkeypatch):
    models = []
    kept = image_classifier.train

    def train(network, model, *args, **kwargs):
        models.append(model)
        kept(network, model, *args, **kwargs)

    monkeypatch.setattr(image_classifier, "train", train)
    network = judged_network(seed=7)
    judge("nonlinear_probe", tmp_path, network=network, layer=layer, hidden=(), epochs=1, seed=3)
    before, after = network.build().state_dict(), models[0]["backbone"].state_dict()
    names = ["conv1", "conv2", "conv3", "conv4", "conv5"]
    frozen = names if layer is None else names[: names.index(layer) + 1]
    for name, value in after.items():
        same = torch.equal(value, before[name])
        assert same or name.split(".")[0] not in frozen, f"{name} changed"
        assert not same or name.split(".")[0] in frozen or value.ndim <= 1, f"{name} is not new"


def test_the_modules_up_to_a_layer_are_found_by_running_the_network_and_not_by_the_order_in_which_they_are_stated():
    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.scale = nn.Conv2d(4, 5, 1), nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(1))

        def forward(self, x):
            return self.last(self.first(x) * self.scale)

    network = Reversed()
    assert image_classifier.modules_up_to(network, "first", 8) == [network, network.first]


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_labels_are_drawn_class_by_class_and_a_larger_share_includes_a_smaller(share):
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    drawn = fine_tune.balanced_draw(labels, share, seed=0)
    counts = np.bincount(labels[drawn])
    assert counts.tolist() == ([50, 30, 20] if share == 1 else [min(round(share * 100 / 3), n) for n in (50, 30, 20)])
    assert set(fine_tune.balanced_draw(labels, 0.05, seed=0)) <= set(drawn)
    assert share == 1 or set(fine_tune.balanced_draw(labels, share, seed=1)) != set(drawn)


def test_every_class_keeps_an_image_in_a_share_that_is_too_small_for_it():
    assert len(fine_tune.balanced_draw(np.repeat(np.arange(10), 5), 0.01, seed=0)) == 10


def test_ten_crops_are_torchvisions():
    from torchvision.transforms.v2.functional import ten_crop

    pixels = torch.randint(0, 255, (2, 16, 16, 3), dtype=torch.uint8)
    expected = ten_crop(pixels.permute(0, 3, 1, 2), [14, 14])
    found = image_classifier.ten_crops(pixels, 14).permute(1, 0, 4, 2, 3)
    wanted = {tuple(crop.flatten().tolist()) for crop in expected}
    assert {tuple(crop.flatten().tolist()) for crop in found} == wanted
    assert image_classifier.centre_crop(pixels, 14).shape == (2, 1, 14, 14, 3)


def test_resized_crops_show_parts_of_the_image_and_the_whole_one_if_nothing_smaller_is_allowed():
    ramp = torch.arange(32, dtype=torch.uint8).mul(8)[None, None, :, None].expand(64, 32, 32, 3).contiguous()
    draws = torch.Generator().manual_seed(0)
    seen = image_classifier.resized_crops(ramp, 0.1, draws)
    widths = (seen[:, 16, 0, 0].int() - seen[:, 16, -1, 0].int()).abs()
    assert seen.shape == ramp.shape
    assert widths.min() < 120 < 200 < widths.max()
    assert 0.2 < (seen[:, 16, 0, 0] > seen[:, 16, -1, 0]).float().mean() < 0.8  # mirrored


@pytest.mark.parametrize("size", [1, 7, 10, 25])
def test_each_pass_shows_every_image_once_wherever_the_batches_end(size):
    rows = np.arange(10) + 5
    shuffled = Shuffled(rows, size, seed=0)
    shown = np.concatenate([shuffled.of(step) for step in range(-(-30 // size))])[:30].reshape(3, 10)
    for one_pass in shown:
        assert sorted(one_pass) == rows.tolist()
    assert not np.array_equal(shown[0], shown[1])
    np.testing.assert_array_equal(Shuffled(rows, size, seed=0).of(1), shuffled.of(1))


def test_the_learning_rate_drops_at_milestones_rises_in_the_warmup_and_follows_a_cosine():
    drops = Recipe(steps=150_000, lr=0.001, milestones=(50_000, 100_000))
    assert [drops.lr_at(step) for step in (0, 49_999, 50_000, 149_999)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-5])
    warm = Recipe(steps=10, lr=1.0, warmup=4, cosine=True)
    assert [warm.lr_at(step) for step in (0, 3, 4, 7)] == pytest.approx([0.25, 1.0, 1.0, 0.5])


def test_steps_are_those_of_pytorch():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(3, 2), nn.Linear(3, 2)
    theirs.load_state_dict(ours.state_dict())
    inputs = torch.randn(5, 4, 3)
    task = StepTask(lambda step, _: inputs[step], lambda model, x: {"loss": model["backbone"](x).square().mean()})
    recipe = Recipe(steps=5, lr=0.1, milestones=(3,), weight_decay=0.01, clip=0.2)
    loop.fit_steps(nn.ModuleDict({"backbone": ours}), task, recipe, 0, device="cpu")
    groups = [{"params": [theirs.weight], "weight_decay": 0.01}, {"params": [theirs.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 if step < 3 else 0.01
        optimizer.zero_grad()
        theirs(inputs[step]).square().mean().backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.2)
        optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_a_loss_that_is_not_finite_names_the_step():
    task = StepTask(lambda *_: None, lambda model, _: {"loss": model["backbone"].weight.sum() * math.nan})
    with pytest.raises(ValueError, match="loss before step 3 is nan"):
        loop.fit_steps(nn.ModuleDict({"backbone": nn.Linear(1, 1)}), task, Recipe(steps=3, lr=1.0), 0, device="cpu")


def test_metrics_of_seeds_are_means_with_students_interval():
    from scipy import stats

    values = [0.5, 0.6, 0.55, 0.7]
    found = seed_metrics([SeedResult({"top1": value}, {}) for value in values])
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found["top1"], found["top1_low"], found["top1_high"]) == pytest.approx((np.mean(values), low, high))
    assert seed_metrics([SeedResult({"top1": 0.5}, {})]) == {"top1": 0.5}


@pytest.mark.parametrize("kind", ["fine_tune", "nonlinear_probe"])
def test_missing_labels_are_an_error(kind, tmp_path):
    module = plugins.module("evaluation", kind)
    bare = Images(4, 8, lambda rows: np.zeros((len(rows), 8, 8, 3), np.uint8))
    given = {"features": None, "pseudo_labels": None, "out": tmp_path, "device": "cpu", "network": None, "attempt": None}
    with pytest.raises(ValueError, match="labelled"):
        module.evaluate(module.Spec(), train=bare, judged=bare, **given)


def test_defaults_follow_their_sources():
    krizhevsky = nonlinear_probe.recipe_of(nonlinear_probe.Spec(), 1_281_167)
    assert krizhevsky.steps == pytest.approx(450_000, rel=0.01)
    assert krizhevsky.milestones[0] == pytest.approx(100_000, rel=0.01)
