"""Full forms are torchvision's networks: equal outputs after a strict load, here and where an exported student is used."""

from __future__ import annotations

import json

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision import models

from ktray import plugins
from ktray.export import student_files
from ktray.spec import Student
from ktray.training import loop

torch.set_num_threads(1)

VIT = models.VisionTransformer  # tiny and small have no name of their own there
FULL = {  # fields of the backbone -> torchvision's model, its part after the backbone's features, a size of images
    "vgg": ({"depth": 11, "form": "full", "batch_norm": False}, models.vgg11, "classifier", 32),
    "vgg_bn": ({"kind": "vgg", "depth": 13, "form": "full"}, models.vgg13_bn, "classifier", 32),
    "mobilenet_v3": ({"form": "full"}, models.mobilenet_v3_small, "classifier", 64),
    "mobilenet_v3_large": (
        {"kind": "mobilenet_v3", "size": "large", "form": "full"},
        models.mobilenet_v3_large,
        "classifier",
        64,
    ),
    "convnext": ({"form": "full"}, models.convnext_tiny, "classifier.2", 64),
    "vit": ({"patch": 8, "image": 48, "readout": "token"}, lambda: VIT(48, 8, 12, 3, 192, 768), "heads", 48),
    "resnet": ({"form": "full"}, models.resnet18, "fc", 64),
}


def parsed(name: str):
    """The spec of a full form."""
    return plugins.parse("backbone", {"kind": name, **FULL[name][0]})


def changed(backbone: nn.Module) -> nn.Module:
    """The backbone with weights and statistics unlike any initial value, so that no part of it goes unnoticed."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in backbone.state_dict().items():
        if "running_var" in name:
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point() and tensor.ndim < 4:
            tensor.add_(torch.empty(tensor.shape).normal_(0, 0.1, generator=generator))
    return backbone.eval()


def headless(model: nn.Module, head: str) -> nn.Module:
    """The model without what follows the backbone's features."""
    if isinstance(model, models.VGG):
        model.avgpool = nn.AdaptiveAvgPool2d(1)  # where we average, it would flatten 7 x 7 places
    model.set_submodule(head, nn.Identity())
    return model.eval()


@pytest.mark.parametrize("name", FULL)
def test_a_full_backbone_computes_what_torchvision_computes_with_its_weights(name):
    _, make, head, size = FULL[name]
    backbone = changed(loop.untrained_backbone(parsed(name), 0))
    with torch.device("meta"):  # a hundred million weights of a classifier are drawn in vain otherwise
        oracle = headless(make(), head)
    oracle.load_state_dict(backbone.state_dict(), strict=True, assign=True)
    pixels = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        torch.testing.assert_close(backbone(pixels), oracle(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("backbone", "model"),
    [
        *(({"kind": "resnet", "depth": depth, "form": "full"}, f"resnet{depth}") for depth in (101, 152)),
        *(({"kind": "vgg", "depth": depth, "form": "full"}, f"vgg{depth}_bn") for depth in (16, 19)),
        ({"kind": "vit", "size": "base", "patch": 16, "image": 224}, "vit_b_16"),
    ],
)
def test_large_backbones_have_the_tensors_of_torchvision(backbone, model):
    with torch.device("meta"):
        ours = plugins.module("backbone", backbone["kind"]).build(plugins.parse("backbone", backbone)).state_dict()
        theirs = getattr(models, model)().state_dict()
    heads = ("fc.", "classifier.", "heads.")
    assert {n: t.shape for n, t in ours.items()} == {n: t.shape for n, t in theirs.items() if not n.startswith(heads)}


def test_a_vit_gives_each_block_as_a_map_of_its_patches():
    backbone = changed(loop.untrained_backbone(parsed("vit"), 0))
    tokens, maps = {}, {}
    backbone.encoder.layers[4].register_forward_hook(lambda m, i, out: tokens.update(at=out))
    backbone.block5.register_forward_hook(lambda m, i, out: maps.update(at=out))
    with torch.inference_mode():
        backbone(torch.randn(2, 3, 48, 48))
    assert maps["at"].shape == (2, 192, 6, 6)
    assert torch.equal(maps["at"][1, :, 2, 3], tokens["at"][1, 1 + 2 * 6 + 3])


def test_positions_of_a_vit_are_interpolated_for_images_of_another_size():
    backbone = loop.untrained_backbone(plugins.parse("backbone", "vit"), 0).eval()
    table = backbone.encoder.pos_embedding.data
    table[:, 1:] = torch.arange(8.0).repeat(8)[None, :, None]  # rises from left to right
    at_28 = backbone._positions(7, 7)[0, 1:, 0].unflatten(0, (7, 7))
    assert torch.equal(backbone._positions(8, 8), table)
    assert torch.allclose(at_28, at_28[0].expand(7, 7), atol=1e-5)
    assert (at_28.diff(dim=1) > 0).all()


def test_the_small_forms_keep_a_higher_resolution_than_the_full_ones():
    for kind, layer, small, full in [("mobilenet_v3", "stage5", 4, 1), ("convnext", "stage4", 2, 1), ("vgg", "block4", 8, 4)]:
        sides = []
        for form in ("small", "full"):
            backbone = loop.untrained_backbone(
                plugins.parse("backbone", {"kind": kind, "form": form, "width": 0.125}), 0
            ).eval()
            backbone.get_submodule(layer).register_forward_hook(lambda m, i, out, sides=sides: sides.append(out.shape[-1]))
            backbone(torch.randn(2, 3, 32, 32))
        assert sides == [small, full], kind


@pytest.mark.parametrize("classes", [5, None], ids=["classifier", "headless"])
@pytest.mark.parametrize("name", [name for name in FULL if name not in ("vgg_bn", "mobilenet_v3_large")])
def test_the_card_of_an_exported_student_tells_how_torchvision_loads_it(name, classes, tmp_path):
    spec = parsed(name)
    backbone = changed(loop.untrained_backbone(spec, 0))
    linear = nn.Linear(backbone.feature_dim, 5)
    (tmp_path / "snapshot").mkdir()
    saved = {f"backbone.{n}": t for n, t in backbone.state_dict().items()} | {
        f"head.{n}": t for n, t in linear.state_dict().items()
    }
    save_file(saved, tmp_path / "snapshot" / "weights.safetensors")
    student = Student.model_validate({"backbone": spec.model_dump(), "schedule": {"epochs": 1}})
    head = "classifier" if classes else "none"
    student_files.export_student(tmp_path / "snapshot", student, FULL[name][3], {}, {}, tmp_path / "out", 5, head=head)
    with torch.device("meta"):
        theirs = as_told(json.loads((tmp_path / "out/student.json").read_text())["torchvision"])
    theirs.load_state_dict(load_file(tmp_path / "out/model.safetensors"), strict=True, assign=True)
    pixels = torch.randn(2, 3, FULL[name][3], FULL[name][3])
    with torch.inference_mode():
        ours = linear(backbone(pixels)) if classes else backbone(pixels)
        torch.testing.assert_close(theirs.eval()(pixels), ours, rtol=1e-4, atol=1e-4)


def as_told(text: str) -> nn.Module:
    """Do what the card says, as a reader would: ``call with part = module; part = module``."""
    call, _, changes = text.partition(" with ")
    names = {"torchvision": torchvision, "torch": torch}
    model = eval(call, names)
    for change in filter(None, changes.split("; ")):
        part, _, module = change.partition(" = ")
        exec(f"model.{part} = {module}", names | {"model": model})
    return model
