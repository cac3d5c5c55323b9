"""timm's networks by name: with the extra as timm computes them, without it an error that says what to install."""

from __future__ import annotations

import sys

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import save_file

from ktray import plugins
from ktray.cli import main
from ktray.errors import UserError
from ktray.training import loop, pretrained, snapshot
from tests.toys import STUDENT, toy_spec

torch.set_num_threads(1)


def spec(model: str, **fields: object):
    """The backbone of this name."""
    return plugins.parse("backbone", {"kind": "timm", "model": model, **fields})


def test_without_the_extra_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'ktray\[timm\]'"):
        loop.untrained_backbone(spec("resnet18"), 0)


@pytest.mark.parametrize(
    ("model", "image", "layers", "maps"),
    [
        ("resnet18", None, ("act1", "layer1", "layer2", "layer3", "layer4"), (512, 2, 2)),
        ("vit_tiny_patch16_224", 64, tuple(f"blocks_{index}" for index in range(12)), (192, 4, 4)),
        ("swin_tiny_patch4_window7_224", 64, ("layers_0", "layers_1", "layers_2", "layers_3"), (768, 2, 2)),
    ],
)
def test_features_and_weights_are_timms_and_layers_are_maps(model, image, layers, maps, tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    oracle = timm.create_model(model, num_classes=3, **({"img_size": image} if image else {})).eval()
    save_file({name: tensor.contiguous() for name, tensor in oracle.state_dict().items()}, tmp_path / "timm.safetensors")
    pretrained.import_weights(spec(model, image=image), tmp_path / "timm.safetensors", tmp_path / "out")
    backbone = loop.untrained_backbone(spec(model, image=image), 1).eval()
    snapshot.load_backbone(backbone, tmp_path / "out")
    seen = []
    backbone.get_submodule(layers[-1]).register_forward_hook(lambda module, inputs, output: seen.append(output))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = oracle.forward_head(oracle.forward_features(pixels), pre_logits=True)
        torch.testing.assert_close(backbone(pixels), expected)
    assert backbone.layers == layers
    assert seen[0].shape == (2, *maps)


TAGGED = {  # as somebody writes it -> what to write
    "resnet18.a1_in1k": "resnet18",
    "timm/resnet50.a1_in1k": "resnet50",
    "hf_hub:timm/vit_base_patch16_224.augreg_in21k": "vit_base_patch16_224",
    "hf-hub:timm/convnext_tiny.in12k_ft_in1k": "convnext_tiny",
    "vit_small_patch14_dinov2.lvd142m": "vit_small_patch14_dinov2",
}
MISSPELT = {
    "ResNet18": "resnet18",
    "vit-tiny-patch16-224": "vit_tiny_patch16_224",
    " resnet18": "resnet18",
    "timm/vgg11": "vgg11",
    "ResNet-50": "resnet50",
    "DenseNet-121": "densenet121",
}


@pytest.mark.parametrize(("model", "plain"), [*TAGGED.items(), *MISSPELT.items()])
def test_a_name_with_a_tag_or_a_hub_says_how_to_write_it(model, plain):
    timm = pytest.importorskip("timm")
    assert timm.is_model(plain)
    with pytest.raises(ValidationError, match=rf"write model: {plain}\b") as refused:
        spec(model)
    assert ("checkpoint: FILE" in str(refused.value)) == (model in TAGGED), "weights come from a file"
    assert spec(plain).model == plain


def test_a_wrong_timm_name_is_an_error_of_its_own_field(tmp_path, monkeypatch, capsys):
    pytest.importorskip("timm")
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    for model, said in (("resnet18.a1_in1k", "write model: resnet18"), ("resnet19", "timm has no model 'resnet19'")):
        student = {**STUDENT, "backbone": {"kind": "timm", "model": model}}
        (tmp_path / "pair.yaml").write_text(yaml.safe_dump(toy_spec(student=student)))
        assert main(["plan", str(tmp_path / "pair.yaml"), "--quiet"]) == 2
        err = capsys.readouterr().err
        assert "student.backbone.model: " in err
        assert said in err
        assert err.count("\n") == 1


def test_a_model_that_timm_does_not_have_is_a_user_error():
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="no model 'resnet19'"):
        loop.untrained_backbone(spec("resnet19"), 0)
    with pytest.raises(UserError, match="takes no image size"):
        loop.untrained_backbone(spec("resnet18", image=32), 0)
