"""An exported student is complete, loads where its card says, and reveals nothing about the machine it comes from."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from ktray import plugins
from ktray.errors import UserError
from ktray.export import programs, student_files
from ktray.images import decoding
from ktray.ops import augmentation
from ktray.ops.augmentation import to_float
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
    assert sorted(path.name for path in directory.iterdir()) == ["README.md", "model.safetensors", "student.json"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_permissions_of_exported_weights_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        directory, _, _ = exported(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in directory.iterdir()} == {
        "model.safetensors": mode,
        "README.md": mode,
        "student.json": mode,
    }


def test_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    def broken(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(student_files, "save_file", broken)
    with pytest.raises(OSError, match="No space left"):
        exported(tmp_path, out=tmp_path / "a/b")
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


@pytest.mark.parametrize(
    ("intact", "flipped"),
    [
        ('"architecture"', '"arbhitecture"'),
        ('"width": 0.25', '"width": 1.25'),
        ('"form": "small"', '"form": "rmall"'),
        ('"mean"', '"meen"'),
        ("0.5", "0.4"),
        ('"sha256"', '"sha257"'),
        ("{", "["),
    ],
)
def test_a_damaged_card_is_never_used(intact, flipped, tmp_path):
    directory, _, _ = exported(tmp_path)
    content = (directory / "student.json").read_text()
    assert intact in content
    (directory / "student.json").write_text(content.replace(intact, flipped, 1))
    with pytest.raises(UserError, match=r"damaged.*Export it again"):
        student_files.load_student(directory)


@pytest.mark.parametrize("change", [{"checksum": None}, {"note": "of Monday"}])
def test_a_card_of_an_older_version_or_with_a_note_is_read(change, tmp_path):
    directory, _, _ = exported(tmp_path)
    about = {name: value for name, value in {**card(directory), **change}.items() if value is not None or name not in change}
    (directory / "student.json").write_text(json.dumps(about))
    student_files.load_student(directory)


def test_a_backbone_from_an_untrusted_package_is_not_imported(tmp_path):
    directory, _, _ = exported(tmp_path)
    about = card(directory)
    about["architecture"] = {"kind": "antigravity.nets"}
    (directory / "student.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="does not trust"):
        student_files.load_student(directory)


# --- programs


VIT = {"kind": "vit", "image": 8}
EVERY_FORM = [  # of every kind; the image size is one that the form is made for
    (ALEXNET, 32),
    ({"kind": "alexnet", "form": "full", "width": 0.25}, 224),
    ({"kind": "alexnet", "form": "grouped", "width": 0.25}, 224),
    ({"kind": "alexnet", "form": "grouped_stride2", "width": 0.25}, 224),
    ({"kind": "vgg", "depth": 11, "width": 0.125}, 32),
    ({"kind": "vgg", "depth": 13, "form": "full", "width": 0.125}, 64),
    (SMALL, 32),
    ({"kind": "resnet", "depth": 50, "form": "full", "width": 0.125}, 64),
    ({"kind": "convnext", "form": "small"}, 32),
    ({"kind": "convnext", "form": "full"}, 64),
    ({"kind": "mobilenet_v3", "form": "small"}, 28),
    ({"kind": "mobilenet_v3", "form": "full"}, 64),
    ({"kind": "airbench"}, 32),
    ({"kind": "vit"}, 32),
    ({"kind": "vit", "readout": "token", "patch": 7, "image": 28}, 28),
    ({"kind": "vit", "image": 32}, 45),  # interpolated positions, and pixels beyond the last patch
    *(
        ({"kind": "timm", "model": model}, size)
        for model, size in (
            ("test_vit", 160),
            ("test_convnext", 160),
            ("mobilenetv3_small_050", 64),
            ("mobilenetv4_conv_small", 64),
            ("edgenext_xx_small", 64),
            ("vit_tiny_patch16_224", 224),
            ("deit_tiny_distilled_patch16_224", 224),
            ("levit_128s", 224),
            ("eva02_tiny_patch14_224", 224),
            ("efficientvit_m0", 224),
            ("swin_tiny_patch4_window7_224", 224),
        )
    ),
]


def run(program: Path, images: torch.Tensor) -> torch.Tensor:
    """What a program computes, by the runtime that its users have."""
    if program.suffix == ".pt2":
        return torch.export.load(program).module()(images)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(program, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def assert_computes(program: Path, network: nn.Module, size: int, batches: tuple[int, ...]) -> None:
    """The program's outputs are those of the network, for images that the export has not tried."""
    torch.manual_seed(1)
    for batch in batches:
        images = torch.randn(batch, 3, size, size)
        with torch.inference_mode():
            expected = network(images)
            torch.testing.assert_close(run(program, images), expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute on an idle core
@pytest.mark.parametrize("form", ["pt2", "onnx"])
@pytest.mark.parametrize(
    ("backbone", "size"), EVERY_FORM, ids=lambda value: "-".join(map(str, getattr(value, "values", list)()))
)
def test_a_program_of_any_backbone_computes_what_torch_does_for_any_batch(backbone, size, form, tmp_path):
    if backbone["kind"] == "timm":
        pytest.importorskip("timm")
    spec = plugins.parse("backbone", backbone)
    torch.manual_seed(0)
    built = plugins.module_of("backbone", spec).build(spec).eval()
    with torch.no_grad():
        for weights in built.parameters():
            weights.add_(torch.randn_like(weights) * 0.02)
    program = programs.write_program(built, None, size, form, tmp_path)
    assert_computes(program, built, size, (1, 2, 3, 5, 8, 13))


def test_every_kind_of_backbone_and_each_of_its_forms_has_its_programs_tested():
    tested = {(spec["kind"], plugins.parse("backbone", spec).model_dump().get("form")) for spec, _ in EVERY_FORM}
    exist = {
        (kind, form)
        for kind in plugins.kinds("backbone")
        for fields in [plugins.module("backbone", kind).Spec.model_fields]
        for form in (get_args(fields["form"].annotation) if "form" in fields else [None])
    }
    assert tested == exist


@pytest.mark.parametrize(
    ("backbone", "size", "head"),
    [(ALEXNET, 32, "classifier"), (VIT, 8, "none")],
    ids=["alexnet", "vit"],
)
def test_a_pt2_program_computes_what_the_student_does_for_any_batch(backbone, size, head, tmp_path):
    directory, built, linear = exported(tmp_path, backbone, size=size, head=head, form="pt2")
    assert_computes(directory / "model.pt2", nn.Sequential(built, linear) if head == "classifier" else built, size, (1, 3, 17))
    assert set(card(directory)["files"]) == {"model.safetensors", "model.pt2"}
    assert student_files.load_student(directory).feature_dim == built.feature_dim


def test_an_onnx_program_computes_what_the_student_does_for_any_batch_in_silence(tmp_path, capfd):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    directory, built, _ = exported(tmp_path, ALEXNET, form="onnx")
    assert capfd.readouterr() == ("", "")
    onnx.checker.check_model(str(directory / "model.onnx"))
    assert_computes(directory / "model.onnx", built, 32, (1, 3, 17))
    graph = onnx.load(directory / "model.onnx").graph
    assert [(value.name, value.type.tensor_type.shape.dim[0].dim_param) for value in (*graph.input, *graph.output)] == [
        ("images", "batch"),
        ("features", "batch"),
    ]


SHAPES = [(32, 32), (100, 50), (33, 20), (301, 400), (20, 32), (7, 90)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_preprocessing_of_a_program_is_pillows_resizing_and_the_normalisation_of_training(shape):
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    wanted = to_float(torch.from_numpy(decoding.fit(pixels, 32))[None])
    found = programs._FromPixels(nn.Identity(), 32)(torch.from_numpy(pixels)[None])
    assert ((found - wanted).abs() * 255 / 4).max() < 1.01, "more than one grey level"
    if shape[0] <= shape[1]:  # of tall images Pillow resizes the columns first, and rounds in between
        assert ((found - wanted).abs() > 1e-5).float().mean() < 0.01


EIGHT_LINES = [("safetensors", False), ("pt2", False), ("pt2", True), ("onnx", False), ("onnx", True)]


@pytest.mark.parametrize(("form", "from_pixels"), EIGHT_LINES)
def test_the_eight_lines_of_the_readme_run_and_yield_the_features_of_the_student(
    form, from_pixels, tmp_path, monkeypatch, capsys
):
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    lineage = {"study": "s`|<b>", "trial": 3, "pair": "hog k=5 -> alexnet", "licences": {"a.pt": "cc-by-nc"}}
    lineage["test"] = {"3": {"metrics": {"knn/top1": 0.61}, "errors": {"knn/top1": 0.02}}}
    directory, built, _ = exported(tmp_path, ALEXNET, form=form, from_pixels=from_pixels, lineage=lineage)
    text = (directory / "README.md").read_text()
    lines = text.split("```python\n")[1].split("\n```")[0]
    assert len(lines.splitlines()) == 8
    assert "| this student, knn/top1 | 0.6100 ± 0.0200 |" in text
    assert "cc-by-nc" in text
    assert "`s'\\|&lt;b>`" in text
    size = (60, 45) if from_pixels else (32, 32)
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    monkeypatch.chdir(directory)
    Image.fromarray(picture).save("photo.png")
    found: dict = {}
    exec(compile(lines, "README.md", "exec"), found)
    assert f"(1, {built.feature_dim})" in capsys.readouterr().out.replace("torch.Size([", "(").replace("])", ")")
    with torch.inference_mode():
        wanted = built(to_float(torch.from_numpy(decoding.fit(picture, 32))[None]))
    features = torch.as_tensor(found["features"]).detach()
    assert float((features - wanted).abs().max()) < (0.05 if from_pixels else 1e-4) * float(wanted.abs().max())
    if from_pixels:
        assert card(directory)["program"]["input"] == {"dtype": "uint8", "layout": "NHWC", "size": "any"}


def test_preprocessing_without_a_program_is_refused_with_what_to_add(tmp_path):
    with pytest.raises(UserError, match="weights alone include no preprocessing"):
        exported(tmp_path, from_pixels=True)
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("missing", ["onnx", "onnxscript", "onnxruntime"])
def test_without_the_packages_for_onnx_the_user_is_told_which_to_install_and_nothing_is_left(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"the package {missing}\. Install it with: pip install 'ktray\[onnx\]'"):
        exported(tmp_path, ALEXNET, form="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["snapshot"]


class FixedBatch(nn.Module):
    """Its code reads the batch size as a number."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) + torch.zeros(len(images), 3)


class TwoAtATime(nn.Module):
    """It does something else for the batch size that it is traced with."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) * (2 if images.shape[0] == 2 else 3)


class Branching(nn.Module):
    """What it does depends on the pixels."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) if images.sum() > 0 else images.amax((2, 3))


class Noisy(nn.Module):
    """It never computes the same twice."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) + torch.rand(images.shape[0], 3)


class Broken(nn.Module):
    """Its features are not finite."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)).log() * 0


class Flattened(nn.Module):
    """It makes one vector of all images."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.reshape(2, -1)


@pytest.mark.parametrize(
    ("network", "problem"),
    [
        (FixedBatch(), "cannot make a program for every batch size"),
        (TwoAtATime(), "cannot make a program for every batch size"),
        (Branching(), "cannot make a program"),
        (Noisy(), "does not compute what the network does"),
        (Broken(), "does not compute what the network does"),
        (Flattened(), "cannot make a program for every batch size"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_network_that_is_no_program_for_every_batch_is_refused_in_one_sentence(network, problem, tmp_path, capfd):
    with pytest.raises(UserError, match=problem) as refused:
        programs.write_program(network, None, 8, "pt2", tmp_path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 600
    assert capfd.readouterr() == ("", "")


# --- places


def refused_places(tmp_path: Path) -> dict[str, Path]:
    """Name -> a place where no student can be written."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "link to a file").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden/.file").write_text("x")
    (tmp_path / "link to a full folder").symlink_to("hidden")
    names = ["file", "file/x", "dangling", "dangling/x", "circle", "circle/x", "pipe", "hidden", "hidden/.file/x"]
    names += ["link to a file", "link to a file/x", "link to a full folder", "n" * 256, "d/" * 3000 + "x", "null\0byte"]
    absolute = ["/dev/null", "/dev/null/x", "/dev/full", "/proc", "/proc/x", "/proc/self/x", "/sys/x", "/", "~no_such_user/x"]
    return {name[:20]: tmp_path / name for name in names} | {name: Path(name) for name in absolute}


def test_a_place_where_no_student_can_be_is_refused_and_nothing_is_left_there(tmp_path):
    built = network(ALEXNET)
    weights, places = snapshot(tmp_path / "snapshot", built, None), refused_places(tmp_path)
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    for name, place in places.items():
        with pytest.raises(UserError) as refused:
            student_files.export_student(weights, student(ALEXNET), 32, {}, {}, place, None)
        assert len(str(refused.value)) < 600, name
        remedy = "or give the full path" if name.startswith("~") else "Name a"
        assert remedy in str(refused.value), name
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before, name


@pytest.mark.parametrize("place", [".", "new", "new/deep"])
def test_a_folder_without_rights_is_refused(place):
    with tempfile.TemporaryDirectory() as top:  # unlike tmp_path, one that others may enter
        folder = Path(top)
        weights = snapshot(folder / "snapshot", network(ALEXNET), None)
        (folder / "locked").mkdir()
        for path, mode in ((folder, 0o755), (weights / "weights.safetensors", 0o644), (folder / "locked", 0o555)):
            path.chmod(mode)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may write anywhere; nobody may not
        try:
            with pytest.raises(UserError, match="Permission denied"):
                student_files.export_student(weights, student(ALEXNET), 32, {}, {}, folder / "locked" / place, None)
        finally:
            os.seteuid(user)
        assert os.listdir(folder / "locked") == []


@pytest.mark.parametrize("place", ["here/is/new", "empty", "link", "n" * 255, "line\nbreak", "é😀", "[a]*?"])
def test_a_place_where_a_student_can_be_gets_exactly_its_files(place, tmp_path):
    (tmp_path / "empty").mkdir(mode=0o750)
    (tmp_path / "link").symlink_to("empty")
    before = (tmp_path / "empty").stat()
    weights = snapshot(tmp_path / "snapshot", network(ALEXNET), None)
    files = student_files.export_student(weights, student(ALEXNET), 32, {}, {}, tmp_path / place, None)
    assert files == [tmp_path / place / name for name in ("model.safetensors", "README.md", "student.json")]
    assert sorted(os.listdir(tmp_path / place)) == ["README.md", "model.safetensors", "student.json"]
    assert not [path for path in tmp_path.rglob(".*")]
    after = (tmp_path / "empty").stat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


def test_an_export_into_the_current_folder_leaves_the_user_in_it(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    weights = snapshot(tmp_path / "snapshot", network(ALEXNET), None)
    monkeypatch.chdir(tmp_path / "here")
    student_files.export_student(weights, student(ALEXNET), 32, {}, {}, Path(), None)
    assert sorted(os.listdir()) == sorted(os.listdir(tmp_path / "here")) == ["README.md", "model.safetensors", "student.json"]


@pytest.mark.parametrize("form", ["safetensors", "pt2"])
@pytest.mark.parametrize("place", ["new/folder", "empty"])
def test_where_a_file_may_not_grow_nothing_is_left(form, place, tmp_path):
    (tmp_path / "empty").mkdir()
    weights = snapshot(tmp_path / "snapshot", network(ALEXNET), None)
    before, soft_and_hard = sorted(tmp_path.rglob("*")), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, soft_and_hard[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            student_files.export_student(weights, student(ALEXNET), 32, {}, {}, tmp_path / place, None, form=form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_and_hard)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("size", [64 << 10, 700 << 10])
@pytest.mark.parametrize("form", ["safetensors", "pt2", "onnx"])
def test_a_full_disk_is_named_as_such_and_nothing_is_left(form, size, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no file system may be mounted here")
    weights = snapshot(tmp_path / "snapshot", network(ALEXNET), None)
    try:
        if form == "safetensors":
            (disk / "ballast").write_bytes(bytes(size - (32 << 10)))
        with pytest.raises(OSError, match="No space left") as full:
            student_files.export_student(weights, student(ALEXNET), 32, {}, {}, disk / "a/b", None, form=form)
        assert full.value.errno == errno.ENOSPC
        assert set(os.listdir(disk)) <= {"ballast"}
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
