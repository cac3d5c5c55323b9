"""An exported student is complete, loads where its card says, and reveals nothing about the machine it comes from."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn

from ktray import plugins
from ktray.errors import UserError
from ktray.export import student_files
from ktray.ops import augmentation
from ktray.spec import Student

CLASSES = 7
FULL = {"kind": "resnet", "depth": 18, "form": "full", "width": 1.0}
SMALL = {"kind": "resnet", "depth": 18, "form": "small", "width": 0.25}
ALEXNET = {"kind": "alexnet", "width": 0.25}


def student(backbone: dict) -> Student:
    """A student with this backbone."""
    return Student.model_validate({"backbone": backbone, "schedule": {"epochs": 1}})


def network(backbone: dict) -> nn.Module:
    """The backbone with weights and batch norm statistics that differ from every initial value."""
    spec = plugins.parse("backbone", backbone)
    torch.manual_seed(0)
    built = plugins.module_of("backbone", spec).build(spec)
    with torch.no_grad():
        for name, tensor in built.state_dict().items():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5) if "running_var" in name else tensor.normal_(0, 0.1)
    return built.eval()


def snapshot(directory: Path, backbone: nn.Module, head: nn.Module | None) -> Path:
    """A directory as `loop.fit` leaves it, as far as an export reads it."""
    tensors = {f"backbone.{name}": tensor.contiguous() for name, tensor in backbone.state_dict().items()}
    if head is not None:
        tensors |= {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    directory.mkdir()
    save_file(tensors, directory / "weights.safetensors")
    return directory


def exported(tmp_path: Path, backbone: dict = SMALL, **arguments) -> tuple[Path, nn.Module, nn.Linear]:
    """(exported folder, backbone, head) of a student."""
    built = network(backbone)
    head = nn.Linear(built.feature_dim, CLASSES)
    given = {"size": 32, "metrics": {"knn/top1": 0.5}, "lineage": {}, "out": tmp_path / "student", "classes": CLASSES}
    student_files.export_student(snapshot(tmp_path / "snapshot", built, head), student(backbone), **{**given, **arguments})
    return tmp_path / "student", built, head


def card(directory: Path) -> dict:
    """The exported folder's student.json."""
    return json.loads((directory / "student.json").read_text())


def test_a_full_resnet_with_its_classifier_loads_strictly_into_torchvision(tmp_path):
    directory, built, head = exported(tmp_path, FULL, head="classifier")
    theirs = torchvision.models.resnet18(num_classes=CLASSES)
    theirs.load_state_dict(load_file(directory / "model.safetensors"), strict=True)
    inputs = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(inputs), head(built(inputs)))
    assert card(directory)["torchvision"] == "torchvision.models.resnet18() with fc = torch.nn.Linear(512, 7)"


def test_a_headless_full_resnet_loads_strictly_into_torchvision(tmp_path):
    directory, built, _ = exported(tmp_path, FULL)
    theirs = torchvision.models.resnet18()
    theirs.fc = nn.Identity()
    theirs.load_state_dict(load_file(directory / "model.safetensors"), strict=True)
    inputs = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(theirs.eval()(inputs), built(inputs))


def test_torchvision_is_not_mentioned_for_forms_that_it_does_not_have(tmp_path):
    directory, _, _ = exported(tmp_path, SMALL)
    assert card(directory)["torchvision"] is None


@pytest.mark.parametrize("head", ["classifier", "none"])
@pytest.mark.parametrize("backbone", [SMALL, ALEXNET], ids=["resnet", "alexnet"])
def test_an_exported_student_loads_again_with_the_same_features(backbone, head, tmp_path):
    directory, built, _ = exported(tmp_path, backbone, head=head)
    inputs = torch.randn(2, 3, 32, 32)
    loaded = student_files.load_student(directory)
    assert not loaded.training
    with torch.inference_mode():
        assert torch.equal(loaded(inputs), built(inputs))
    assert loaded.feature_dim == card(directory)["feature_dim"]


@pytest.mark.parametrize("kind", plugins.kinds("backbone"))
def test_every_backbone_can_be_exported_and_loaded(kind, tmp_path):
    narrow = {"width": 0.125} if "width" in plugins.module("backbone", kind).Spec.model_fields else {}
    spec = {"kind": kind, **narrow}
    try:
        built = network(spec)
    except UserError as error:
        if "pip install" not in error.instead:
            raise
        pytest.skip(str(error))
    weights = snapshot(tmp_path / "snapshot", built, nn.Linear(built.feature_dim, 2))
    student_files.export_student(weights, student(spec), 32, {}, {}, tmp_path / "out", 2, head="classifier")
    loaded = student_files.load_student(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in built.state_dict().items())


def test_the_card_says_how_to_feed_the_student(tmp_path):
    directory, _, _ = exported(tmp_path, SMALL, size=40)
    about = card(directory)
    assert about["input"]["size"] == [40, 40]
    assert (about["input"]["layout"], about["input"]["range"]) == ("NCHW", [0, 1])
    assert (about["input"]["mean"], about["input"]["std"]) == ([0.5] * 3, [0.25] * 3)
    assert about["architecture"] == SMALL
    assert about["metrics"] == {"knn/top1": 0.5}
    assert about["head"] is None


def test_the_exported_normalisation_is_that_of_training(tmp_path):
    directory, _, _ = exported(tmp_path)
    about = card(directory)["input"]
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    mean, std = (torch.tensor(about[name]).view(3, 1, 1) for name in ("mean", "std"))
    torch.testing.assert_close((pixels.permute(0, 3, 1, 2) / 255 - mean) / std, augmentation.to_float(pixels))


def test_loading_a_student_does_not_change_the_random_state(tmp_path):
    directory, _, _ = exported(tmp_path)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    student_files.load_student(directory)
    assert torch.equal(torch.rand(3), expected)


def test_a_folder_that_is_not_empty_is_never_written_to(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student/thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not an empty folder"):
        exported(tmp_path)
    assert [path.name for path in (tmp_path / "student").iterdir()] == ["thesis.tex"]


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "student").mkdir()
    directory, _, _ = exported(tmp_path)
    assert sorted(path.name for path in directory.iterdir()) == ["model.safetensors", "student.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_permissions_of_exported_weights_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        directory, _, _ = exported(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == {
        "model.safetensors": mode,
        "student.json": mode,
    }


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def broken(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(student_files, "save_file", broken)
    with pytest.raises(OSError, match="No space left"):
        exported(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot"]


def test_a_student_without_a_classifier_exports_only_headless(tmp_path):
    built = network(SMALL)
    weights = snapshot(tmp_path / "snapshot", built, None)
    with pytest.raises(UserError, match="no linear classifier"):
        student_files.export_student(weights, student(SMALL), 32, {}, {}, tmp_path / "a", None, head="classifier")
    student_files.export_student(weights, student(SMALL), 32, {}, {}, tmp_path / "b", None)
    assert (tmp_path / "b/model.safetensors").exists()
    assert not (tmp_path / "a").exists()


def test_a_snapshot_of_another_network_is_refused(tmp_path):
    weights = snapshot(tmp_path / "snapshot", network(SMALL), None)
    with pytest.raises(RuntimeError, match="size mismatch"):
        student_files.export_student(weights, student({**SMALL, "width": 0.5}), 32, {}, {}, tmp_path / "student", None)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize(
    ("told", "written"),
    [
        ("/home/me/data/cats", "cats"),
        ("parquet:/home/me/cats.parquet?label=label", "parquet:cats.parquet?label=label"),
        ("file:///home/me/store/student-3f9a", "student-3f9a"),
        ("~/data/cats", "cats"),
        ("/home/my name/data/cats", "cats"),
        (r"C:\Users\me\cats", "cats"),
        (Path("/home/me/cats"), "cats"),
        ("resnet18/layer3 k=500 -> alexnet", "resnet18/layer3 k=500 -> alexnet"),
        ("s3://bucket/cats", "s3://bucket/cats"),
        ("student-3f9a1c0b2d44", "student-3f9a1c0b2d44"),
    ],
)
def test_no_path_of_this_machine_is_exported(told, written, tmp_path):
    directory, _, _ = exported(tmp_path, lineage={"inputs": [{"data": told}]})
    assert card(directory)["lineage"] == {"inputs": [{"data": written}]}


def test_metrics_that_are_not_finite_become_null(tmp_path):
    directory, _, _ = exported(tmp_path, metrics={"a": float("nan"), "b": float("inf"), "c": 0.25})
    assert card(directory)["metrics"] == {"a": None, "b": None, "c": 0.25}


@pytest.mark.parametrize("missing", ["model.safetensors", "student.json"])
def test_a_folder_without_a_student_is_named_as_such(missing, tmp_path):
    directory, _, _ = exported(tmp_path)
    (directory / missing).unlink()
    with pytest.raises(UserError, match=f"{missing} is missing"):
        student_files.load_student(directory)


def test_damaged_weights_are_never_used(tmp_path):
    directory, _, _ = exported(tmp_path)
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        student_files.load_student(directory)
    (directory / "model.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match="damaged"):
        student_files.load_student(directory)


def test_a_backbone_from_an_untrusted_package_is_not_imported(tmp_path):
    directory, _, _ = exported(tmp_path)
    about = card(directory)
    about["architecture"] = {"kind": "antigravity.nets"}
    (directory / "student.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="does not trust"):
        student_files.load_student(directory)


@pytest.mark.parametrize("backbone", [SMALL, ALEXNET], ids=["resnet", "alexnet"])
@pytest.mark.parametrize("head", ["classifier", "none"])
def test_a_pt2_program_computes_what_the_student_does_for_any_batch(tmp_path, backbone, head):
    directory, built, linear = exported(tmp_path, backbone, head=head, form="pt2")
    program = torch.export.load(directory / "model.pt2").module()
    for count in (1, 3, 17):
        inputs = torch.randn(count, 3, 32, 32)
        with torch.inference_mode():
            expected = linear(built(inputs)) if head == "classifier" else built(inputs)
            torch.testing.assert_close(program(inputs), expected)
    assert set(card(directory)["files"]) == {"model.safetensors", "model.pt2"}
    assert student_files.load_student(directory).feature_dim == built.feature_dim


def test_an_onnx_program_computes_what_the_student_does_by_onnx_own_evaluator(tmp_path, capfd):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    directory, built, _ = exported(tmp_path, ALEXNET, form="onnx")
    onnx.checker.check_model(str(directory / "model.onnx"))
    evaluator = ReferenceEvaluator(str(directory / "model.onnx"))
    for count in (1, 5):
        inputs = torch.randn(count, 3, 32, 32)
        (found,) = evaluator.run(None, {"images": inputs.numpy()})
        with torch.inference_mode():
            torch.testing.assert_close(torch.from_numpy(found), built(inputs), rtol=1e-4, atol=1e-5)
    assert capfd.readouterr() == ("", "")


def test_without_the_packages_for_onnx_the_user_is_told_which_to_install_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'ktray\[onnx\]'"):
        exported(tmp_path, ALEXNET, form="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot"]
