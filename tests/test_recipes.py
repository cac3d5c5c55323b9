"""Recipes of trainings: averaged weights, clipped gradients, layer-wise rates, micro-batches, LARS and LAMB."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ktray import plugins
from ktray.errors import UserError
from ktray.pipeline.pair_check import check_pair, data_loader
from ktray.spec import Augment, Schedule
from ktray.training import averaged_weights, classification, loop, optimisers, snapshot
from tests.networks import BACKBONE
from tests.toy_images import toy_images
from tests.toys import ROTATION, STUDENT, toy_pair

torch.set_num_threads(1)

IMAGES = toy_images(48, size=16)
TASK = classification.task(IMAGES.labels, 4, Augment(crop=0))  # type: ignore[arg-type]


def fit(out: Path, until: int = 2, start: Path | None = None, backbone: Any = BACKBONE, **fields: Any) -> dict[str, float]:
    """A short training with these fields of the schedule."""
    schedule = Schedule(**{"epochs": 3, "lr": 0.05, "batch_size": 16, **fields})
    network = loop.untrained_backbone(backbone, 0)
    return loop.fit(network, TASK, IMAGES, schedule, 0, out=out, until=until, start=start)


RECIPES: dict[str, dict[str, Any]] = {
    "ema": {"ema": 0.9},
    "clip": {"clip": 0.5},
    "layer_decay": {"layer_decay": 0.7},
    "micro_batch": {"micro_batch": 5},
    "lars": {"optimizer": "lars", "lr": 2.0},
    "lamb": {"optimizer": "lamb", "lr": 0.01, "layer_decay": 0.8, "clip": 1.0, "ema": 0.5},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_every_recipe_trains_to_the_same_bits_however_it_is_split(recipe, tmp_path):
    if "optimizer" in recipe:
        pytest.importorskip("timm")
    whole = fit(tmp_path / "whole", 3, **recipe)
    fit(tmp_path / "1", 1, **recipe)
    assert fit(tmp_path / "parts", 3, tmp_path / "1", **recipe) == whole
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert ("trained.safetensors" in files) == ("ema" in recipe)
    for name in files:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes(), name
    fit(tmp_path / "plain", 3)
    assert (tmp_path / "plain/weights.safetensors").read_bytes() != (tmp_path / "whole/weights.safetensors").read_bytes()
    assert snapshot.epoch_of(tmp_path / "whole") == 3


def test_the_average_is_timms_with_a_decay_that_grows_to_its_value(tmp_path):
    timm_utils = pytest.importorskip("timm.utils")
    torch.manual_seed(0)
    model = nn.ModuleDict({"backbone": nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), "head": nn.Linear(3, 2)})
    theirs = timm_utils.ModelEmaV2(model)
    ours = averaged_weights.averaging(model, 0.3, torch.device("cpu"))
    for step in range(1, 8):
        model["backbone"](torch.randn(5, 4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        theirs.decay = min(0.3, (1 + step) / (10 + step))
        theirs.update(model)
        ours.update()
    for name, tensor in ours.average.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, theirs.module.state_dict()[name], msg=name)
        else:
            assert torch.equal(tensor, model.state_dict()[name]), name
    assert averaged_weights.averaging(model, None, torch.device("cpu")) is None


def test_the_averaged_weights_are_those_that_are_read_and_the_others_go_on_training(tmp_path):
    fit(tmp_path / "averaged", ema=0.9)
    fit(tmp_path / "plain")
    trained = load_file(tmp_path / "averaged/trained.safetensors")
    assert all(torch.equal(trained[name], tensor) for name, tensor in load_file(tmp_path / "plain/weights.safetensors").items())
    network = loop.untrained_backbone(BACKBONE, 1)
    snapshot.load_backbone(network, tmp_path / "averaged")
    kept = load_file(tmp_path / "averaged/weights.safetensors")
    assert all(torch.equal(tensor, kept[f"backbone.{name}"]) for name, tensor in network.state_dict().items())
    assert any(not torch.equal(tensor, trained[name]) for name, tensor in kept.items())


def test_a_clipped_step_is_torchs_step_with_a_clipped_gradient(tmp_path):
    fit(tmp_path / "0", 0)
    one_step = {"batch_size": 48, "momentum": 0.0, "weight_decay": 0.0}
    fit(tmp_path / "clipped", 1, clip=0.05, **one_step)
    fit(tmp_path / "plain", 1, **one_step)
    begun, clipped, plain = (load_file(tmp_path / name / "weights.safetensors") for name in ("0", "clipped", "plain"))
    names = [name for name in begun if not name.startswith("backbone") or ("running" not in name and "num_" not in name)]
    parameters = [nn.Parameter(begun[name]) for name in names]
    for parameter, name in zip(parameters, names, strict=True):
        parameter.grad = (begun[name] - plain[name]) / 0.05
    norm = nn.utils.clip_grad_norm_(parameters, 0.05)
    assert norm > 0.05
    for parameter, name in zip(parameters, names, strict=True):
        torch.testing.assert_close(begun[name] - clipped[name], 0.05 * parameter.grad, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("kind", plugins.kinds("backbone"))
def test_every_backbone_numbers_all_of_its_weights_from_the_first_layer_to_the_head(kind):
    if kind == "timm":
        pytest.importorskip("timm")
    backbone = loop.untrained_backbone(plugins.parse("backbone", kind), 0)
    before = copy.deepcopy(backbone.state_dict())
    numbers, of_head = optimisers.layer_numbers(backbone, 32)
    names = [name for name, _ in backbone.named_parameters()]
    assert set(numbers) == set(names)
    assert set(numbers.values()) | {of_head} == set(range(of_head + 1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


NUMBERED = [
    ("resnet", {"conv1.weight": 0, "layer1.0.conv1.weight": 0, "layer4.1.bn2.weight": 3}, 4),
    ("vit", {"class_token": 0, "encoder.layers.encoder_layer_3.ln_1.weight": 3, "encoder.ln.weight": 12}, 12),
    ("vgg", {"features.0.weight": 0}, 5),
]


@pytest.mark.parametrize(("kind", "expected", "of_head"), NUMBERED)
def test_a_weight_has_the_number_of_layers_that_are_complete_before_it(kind, expected, of_head):
    numbers, head = optimisers.layer_numbers(loop.untrained_backbone(plugins.parse("backbone", kind), 0), 32)
    assert {name: numbers[name] for name in expected} == expected
    assert head == of_head


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "convnext_atto", "resnet18", "mobilenetv4_conv_small"])
def test_layer_wise_rates_of_timms_networks_are_timms(model):
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    spec = plugins.parse("backbone", {"kind": "timm", "model": model})
    backbone = loop.untrained_backbone(spec, 0)
    both = nn.ModuleDict({"backbone": backbone, "head": nn.Linear(int(backbone.feature_dim), 3)})  # type: ignore[arg-type]
    schedule = Schedule(epochs=1, layer_decay=0.7, optimizer="adamw")
    made = optimisers.optimiser(schedule, both, torch.device("cpu"), 224)
    ours = {id(p): group["factor"] for group in made.param_groups for p in group["params"]}
    theirs = timm.create_model(model, num_classes=3)
    names = {id(p): name for name, p in theirs.named_parameters()}
    scales = {names[id(p)]: g["lr_scale"] for g in param_groups_layer_decay(theirs, layer_decay=0.7) for p in g["params"]}
    for name, parameter in backbone.model.named_parameters():  # type: ignore[union-attr]
        assert ours[id(parameter)] == pytest.approx(scales[name]), name
    assert all(ours[id(parameter)] == 1 for parameter in both["head"].parameters())


def test_rates_of_the_layers_follow_the_schedule_by_their_factors():
    model = nn.ModuleDict({"backbone": loop.untrained_backbone(BACKBONE, 0), "head": nn.Linear(32, 2)})
    made = optimisers.optimiser(Schedule(epochs=1, layer_decay=0.5), model, torch.device("cpu"), 16)
    optimisers.set_lr(made, 0.8)
    assert sorted({group["lr"] for group in made.param_groups}) == pytest.approx([0.8 * 0.5**n for n in (5, 4, 3, 2, 1, 0)])
    assert sum(len(group["params"]) for group in made.param_groups) == len([*model.parameters()])


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"student": {**STUDENT, "schedule": {"epochs": 1, "optimizer": "lamb", "momentum": 0.5}}}, "lamb has none"),
    ({"student": {**STUDENT, "schedule": {"epochs": 1, "micro_batch": 128}}}, "make it smaller"),
    ({"transfer": {"kind": "regression"}, "student": {**STUDENT, "augment": {"mixup": 0.2}}}, "leave mixup and cutmix out"),
    (
        {"teacher": {**ROTATION, "pretext": {"kind": "rotation", "augment": {"cutmix": 1.0}}}},
        "this task has none; leave them out",
    ),
]


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_settings_that_mean_nothing_together_are_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        toy_pair(**changes)


def test_micro_batches_are_refused_for_a_task_that_compares_images(tmp_path):
    teacher = {**ROTATION, "pretext": {"kind": "simclr", "hidden": 16, "width": 8}}
    teacher["schedule"] = {**teacher["schedule"], "micro_batch": 4}
    with pytest.raises(UserError, match=r"teacher\.schedule\.micro_batch.*compares all images"):
        check_pair(toy_pair(teacher=teacher), data_loader())


def test_lars_without_timm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim.lamb", None)
    student = {**STUDENT, "schedule": {**STUDENT["schedule"], "optimizer": "lars"}}
    with pytest.raises(UserError, match=r"student\.schedule\.optimizer.*pip install 'ktray\[timm\]'"):
        check_pair(toy_pair(student=student), data_loader())


def test_stochastic_depth_of_a_timm_student_is_off_when_it_is_judged():
    pytest.importorskip("timm")
    spec = plugins.parse("backbone", {"kind": "timm", "model": "convnext_atto", "drop_path": 0.5})
    network, pixels = loop.untrained_backbone(spec, 0), torch.randn(2, 3, 32, 32)
    plain = loop.untrained_backbone(plugins.parse("backbone", {"kind": "timm", "model": "convnext_atto"}), 0)
    torch.testing.assert_close(network.eval()(pixels), plain.eval()(pixels))
    network.train()
    assert not torch.equal(network(pixels), network(pixels))
    with pytest.raises(UserError, match=r"backbone\.drop_path"):
        loop.untrained_backbone(plugins.parse("backbone", {"kind": "timm", "model": "efficientvit_b0", "drop_path": 0.1}), 0)


STUDENTS = ["mobilenetv4_conv_small", "efficientvit_b0", "efficientvit_m0", "convnext_atto", "vit_tiny_patch16_224", "resnet18"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["onnx", "pt2"])
@pytest.mark.parametrize("model", STUDENTS)
def test_every_family_of_small_timm_students_is_exported_as_the_program_that_torch_runs(model, form, tmp_path):
    timm = pytest.importorskip("timm")
    from ktray.export import programs

    fields: dict[str, Any] = {"image": 64} if model.startswith("vit") else {}
    network = loop.untrained_backbone(plugins.parse("backbone", {"kind": "timm", "model": model, **fields}), 0).eval()
    size = 224 if model == "efficientvit_m0" else 64
    path = programs.write_program(network, None, size, form, tmp_path)
    run = programs._loaded(path, form)
    oracle = timm.create_model(model, num_classes=0, **({"img_size": 64} if fields else {})).eval()
    oracle.load_state_dict(network.model.state_dict())  # type: ignore[union-attr,operator]
    for count in (1, 7):
        pixels = torch.randn(count, 3, size, size)
        with torch.no_grad():
            expected = oracle.forward_head(oracle.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(run(pixels), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
        torch.testing.assert_close(network(pixels), expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
