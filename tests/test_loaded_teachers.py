"""Teachers with weights trained elsewhere, end to end: torchvision and timm files, artifacts, exported students."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from ktray.cli import main
from ktray.export import student_files
from ktray.features import extraction
from ktray.ops import augmentation
from ktray.pipeline.pair_graph import build
from ktray.spec import Student
from tests.toys import DATA, HOG, STUDENT, toy_pair, toy_spec

torch.set_num_threads(1)

FEW = {**DATA, "count": 60, "size": 32}
JUDGES = [{"kind": "knn"}, {"kind": "knn", "of": "teacher", "name": "teacher_knn"}]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KTRAY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def ran(at: Path, capsys: Any, **changes: Any) -> dict[str, Any]:
    """What `ktray run --local` says of the toy pair with these changes."""
    at.mkdir(parents=True, exist_ok=True)
    (at / "pair.yaml").write_text(yaml.safe_dump(toy_spec(**{"data": FEW, "evals": JUDGES, **changes})))
    assert main(["run", str(at / "pair.yaml"), "--local", "--json", "--quiet"]) == 0, capsys.readouterr().err
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)[0]
    assert {"teacher/parameters", "knn/top1", "teacher_knn/top1"} <= answer["metrics"].keys()
    return answer


def made(home: Path, answer: dict[str, Any]) -> tuple[np.ndarray, torch.Tensor]:
    """Features (N, D) that were clustered, and the pixels (N, H, W, 3) that they were made of."""
    record = json.loads((home / "store" / answer["keys"]["features"] / "record.json").read_text())
    pixels = np.load(home / "store" / record["inputs"]["images"] / "train.npy", allow_pickle=False)
    return extraction.load(home / "store" / answer["keys"]["features"]), torch.from_numpy(pixels)


def standardised(pixels: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    """As torchvision's transforms do it."""
    from torchvision.transforms.v2 import functional

    return functional.normalize(pixels.permute(0, 3, 1, 2).float() / 255, mean, std)


HALF = ([0.5] * 3, [0.5] * 3)
IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize("form", ["state_dict.pth", "in a checkpoint.pth.tar", "weights.safetensors"])
def test_a_checkpoint_in_torchvisions_format_teaches_what_torchvision_computes(
    form: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    torch.manual_seed(1)
    oracle = models.resnet18(num_classes=7)
    oracle.train()(torch.randn(8, 3, 32, 32))  # statistics unlike the initial ones
    file, weights = tmp_path / form, oracle.state_dict()
    if form.endswith("safetensors"):
        save_file(weights, file)
    else:
        torch.save(weights if form.endswith("pth") else {"epoch": 3, "state_dict": weights, "best": 0.5}, file)
    backbone = {"kind": "resnet", "depth": 18, "form": "full"}
    teacher = {"checkpoint": str(file), "backbone": backbone, "layer": "layer2", "normalize": "imagenet"}
    found, pixels = made(home, ran(tmp_path, capsys, teacher=teacher))
    trunk = nn.Sequential(*list(oracle.eval().children())[:6])  # conv1, bn1, relu, maxpool, layer1, layer2
    with torch.inference_mode():
        expected = trunk(standardised(pixels, *IMAGENET)).mean(dim=(2, 3))
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("model", "layer"), [("vit_tiny_patch16_224", "blocks_3"), ("resnet18", "layer2")])
def test_a_checkpoint_in_timms_format_teaches_what_timm_computes(
    model: str, layer: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(1)
    sized = {"img_size": 32} if model.startswith("vit") else {}
    oracle = timm.create_model(model, num_classes=7, **sized).eval()
    save_file({name: tensor.contiguous() for name, tensor in oracle.state_dict().items()}, tmp_path / "timm.safetensors")
    backbone = {"kind": "timm", "model": model, "image": sized.get("img_size")}
    teacher = {"checkpoint": str(tmp_path / "timm.safetensors"), "backbone": backbone, "layer": layer, "normalize": "half"}
    found, pixels = made(home, ran(tmp_path, capsys, teacher=teacher))
    level = [name.replace(".", "_") for name in (info["module"] for info in oracle.feature_info)].index(layer)
    with torch.inference_mode():
        maps = oracle.forward_intermediates(
            standardised(pixels, *HALF), indices=[level], intermediates_only=True, output_fmt="NCHW"
        )[0]
    torch.testing.assert_close(torch.from_numpy(found), maps.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", ["key", "folder"])
def test_the_student_of_one_pair_teaches_another_by_its_key_or_exported(
    place: str, home: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "first.yaml").write_text(yaml.safe_dump(toy_spec(data=FEW, teacher=HOG)))
    assert main(["run", str(tmp_path / "first.yaml"), "--local", "--json", "--quiet"]) == 0
    key = json.loads(capsys.readouterr().out)[0]["keys"]["student"]
    if place == "folder":
        student = Student.model_validate(STUDENT)
        student_files.export_student(home / "store" / key, student, 32, {}, {}, tmp_path / "student", 5, head="classifier")
    checkpoint = key if place == "key" else str(tmp_path / "student")
    teacher = {"checkpoint": checkpoint, "backbone": STUDENT["backbone"], "layer": "conv4"}
    found, pixels = made(home, ran(tmp_path / "second", capsys, teacher=teacher))
    student_files.export_student(home / "store" / key, Student.model_validate(STUDENT), 32, {}, {}, tmp_path / "oracle", 5)
    extract = extraction.layer_extractor(
        student_files.load_student(tmp_path / "oracle"), "conv4", toy_pair(teacher=teacher).teacher.pool
    )  # type: ignore[union-attr]
    torch.testing.assert_close(torch.from_numpy(found), extract(pixels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("by", "numbers"), [("imagenet", IMAGENET), ("half", ([0.5] * 3, [0.5] * 3)), ("ktray", ([0.5] * 3, [0.25] * 3))]
)
def test_pixels_become_what_the_weights_were_trained_on(by: Any, numbers: tuple[list[float], list[float]]) -> None:
    pixels = torch.randint(0, 256, (2, 5, 4, 3), dtype=torch.uint8)
    torch.testing.assert_close(augmentation.normalize(pixels, by), standardised(pixels, *numbers), rtol=1e-5, atol=1e-5)


def test_how_pixels_are_normalized_is_part_of_the_features_and_not_of_the_weights(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    loaded = {"checkpoint": str(tmp_path / "a.safetensors"), "backbone": STUDENT["backbone"]}
    one, two = (
        build(toy_pair(teacher={**loaded, "normalize": by}), lambda data: "content").keys for by in ("half", "imagenet")
    )
    assert one["teacher"] == two["teacher"]
    assert one["features"] != two["features"]
